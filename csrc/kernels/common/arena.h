/* A driver's work space: one 64-byte aligned block cut into pieces. Claim each piece, allocate once, claim each again in the same order,
 * free once. */
#ifndef CLIPFT_ARENA_H
#define CLIPFT_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct clipft_arena {
    char *base;
    size_t used, size;
    bool overflow;
} clipft_arena;

/* Room for `count` items: makes sure that there will be and returns NULL, or, once the block is allocated, takes it. */
void *clipft_arena_claim(clipft_arena *arena, int64_t count, size_t item);

/* False when there is no memory, or more was claimed than a size holds. */
bool clipft_arena_allocate(clipft_arena *arena);
void clipft_arena_free(clipft_arena *arena);

/* The two halves of clipft_arena_claim, for a driver that claims a few pieces in one place. */
void clipft_arena_reserve(clipft_arena *arena, int64_t count, size_t item);
void *clipft_arena_take(clipft_arena *arena, int64_t count, size_t item);

#endif
