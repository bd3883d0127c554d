/* Bounded text: copies that always end in NUL and never cut a UTF-8 character; UUIDs. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void text_copy (char *to, size_t size, const char *from);
void text_format (char *to, size_t size, const char *fmt, ...) __attribute__ ((format (printf, 3, 4)));

#define UUID_TEXT_SIZE 37
/* Only the canonical form, 8-4-4-4-12 hexadecimal digits; RFC 4122 byte order. */
bool uuid_parse (const char *text, uint8_t uuid[16]);
void uuid_format (const uint8_t uuid[16], char text[UUID_TEXT_SIZE]);
