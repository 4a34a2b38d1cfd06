#include "arena.h"

#include <stdlib.h>

enum { ALIGN = 64 };

/* Bytes of `count` items, rounded up; false when they do not fit. */
static bool piece_bytes(int64_t count, size_t item, size_t *bytes)
{
    if (count < 0 || (uint64_t)count > (SIZE_MAX / 4 - ALIGN) / item) return false;
    *bytes = ((size_t)count * item + ALIGN - 1) / ALIGN * ALIGN;
    return true;
}

void clipft_arena_reserve(clipft_arena *arena, int64_t count, size_t item)
{
    size_t bytes;
    if (!piece_bytes(count, item, &bytes) || arena->size > SIZE_MAX / 2 - bytes)
        arena->overflow = true;
    else
        arena->size += bytes;
}

bool clipft_arena_allocate(clipft_arena *arena)
{
    if (arena->overflow) return false;
    arena->base = aligned_alloc(ALIGN, arena->size ? arena->size : ALIGN);
    return arena->base != NULL;
}

void *clipft_arena_take(clipft_arena *arena, int64_t count, size_t item)
{
    size_t bytes = 0;
    void *piece = arena->base + arena->used;
    if (!piece_bytes(count, item, &bytes) || bytes > arena->size - arena->used) abort(); /* taken more than reserved: a bug here */
    arena->used += bytes;
    return piece;
}

void clipft_arena_free(clipft_arena *arena)
{
    free(arena->base);
    *arena = (clipft_arena){0};
}

void *clipft_arena_claim(clipft_arena *arena, int64_t count, size_t item)
{
    if (arena->base) return clipft_arena_take(arena, count, item);
    clipft_arena_reserve(arena, count, item);
    return NULL;
}
