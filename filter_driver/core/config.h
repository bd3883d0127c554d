/* The filter's config file (docs/control-protocol.md), read once at start; unknown keys are an error. */
#pragma once

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "superblock.h"

#define SOCKET_PATH_SIZE 108 /* unix(7): sun_path */
#define EXPORT_NAME_SIZE 256
#define STALL_MS_MIN 100
#define STALL_MS_MAX 600000

enum mirror_type { MIRROR_NBD, MIRROR_FILE };

struct disk_config {
  char name[16];
  uint64_t size_bytes;
  char mirror_export[EXPORT_NAME_SIZE]; /* MIRROR_NBD */
  char mirror_path[PATH_MAX];           /* MIRROR_FILE */
};

struct config {
  uint8_t protection[16];
  char vm[64];
  char state_dir[PATH_MAX - 64];
  char control_socket[SOCKET_PATH_SIZE];
  uint32_t stall_ms;
  enum mirror_type mirror_type;
  char mirror_socket[SOCKET_PATH_SIZE];     /* MIRROR_NBD */
  char superblock_export[EXPORT_NAME_SIZE]; /* MIRROR_NBD */
  char superblock_path[PATH_MAX];           /* MIRROR_FILE */
  unsigned disk_count;
  struct disk_config disks[DISKS_MAX];
};

int config_load (struct config *config, const char *path, char *why, size_t why_size);
