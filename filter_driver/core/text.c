#include "text.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void
drop_cut_character (char *text, size_t length)
{
  size_t start = length;

  /* Back over continuation bytes to the lead byte of the last character. */
  while (start > 0 && length - start < 4) {
    unsigned char c = (unsigned char) text[start - 1];
    start--;
    if ((c & 0xc0) != 0x80) {
      size_t need = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc0 ? 2 : 1;
      if (length - start < need)
        text[start] = '\0';
      return;
    }
  }
}

void
text_copy (char *to, size_t size, const char *from)
{
  size_t length = strnlen (from, size);

  if (length < size) {
    memmove (to, from, length);
    to[length] = '\0';
    return;
  }
  memmove (to, from, size - 1);
  to[size - 1] = '\0';
  drop_cut_character (to, size - 1);
}

void
text_format (char *to, size_t size, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  int wanted = vsnprintf (to, size, fmt, args);
  va_end (args);
  if (wanted < 0)
    to[0] = '\0';
  else if ((size_t) wanted >= size)
    drop_cut_character (to, size - 1);
}

static int
hex_digit (char c)
{
  if (c >= '0' && c <= '9')
    return c - '0';
  if (c >= 'a' && c <= 'f')
    return c - 'a' + 10;
  if (c >= 'A' && c <= 'F')
    return c - 'A' + 10;
  return -1;
}

bool
uuid_parse (const char *text, uint8_t uuid[16])
{
  size_t byte = 0;

  if (strnlen (text, UUID_TEXT_SIZE) != UUID_TEXT_SIZE - 1)
    return false;
  for (size_t i = 0; i < UUID_TEXT_SIZE - 1;) {
    if (i == 8 || i == 13 || i == 18 || i == 23) {
      if (text[i] != '-')
        return false;
      i++;
      continue;
    }
    int high = hex_digit (text[i]), low = hex_digit (text[i + 1]);
    if (high < 0 || low < 0)
      return false;
    uuid[byte++] = (uint8_t) (high << 4 | low);
    i += 2;
  }
  return byte == 16;
}

void
uuid_format (const uint8_t u[16], char text[UUID_TEXT_SIZE])
{
  snprintf (text, UUID_TEXT_SIZE, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1],
            u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
}
