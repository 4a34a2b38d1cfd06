/* The passes of int8_lora.h: the drivers of both families, one after the other. */
#include "int8_lora.h"

#include "../common/arena.h"
#include "../common/sizes.h"

bool clipft_int8_lora_forward(const clipft_int8_lora *l, const clipft_host *host, const clipft_view *x, float *v, const clipft_view *y)
{
    const clipft_view none = {0};
    const int64_t rank = l->lora.lora_b.cols, stride = clipft_round_up(y->cols, CLIPFT_RANK_PAD);
    clipft_int8_chain chain = {.layers = {l->layer}, .count = 1, .quick_gelu = l->lora.quick_gelu};
    clipft_arena arena = {0};
    bool ok = false;
    if (!l->lora.lora_b.data) return clipft_int8_run(&chain, host, x, y);
    clipft_arena_reserve(&arena, rank * stride, sizeof(float));
    if (clipft_arena_allocate(&arena)) {
        float *panel = clipft_arena_take(&arena, rank * stride, sizeof(float));
        clipft_lora_pack(clipft_view_transposed(l->lora.lora_b), l->lora.scale, panel, stride);
        chain.branch = (clipft_int8_branch){v, panel, rank, clipft_lora_padded(rank), stride};
        ok = clipft_lora_down(&l->lora, host, x, &none, v) && clipft_int8_run(&chain, host, x, y);
    }
    clipft_arena_free(&arena);
    return ok;
}

bool clipft_int8_lora_backward(const clipft_int8_lora *l, const clipft_host *host, const clipft_view *x, const clipft_view *dy,
                               const float *v, float *u, const clipft_int8_lora_gradients *d)
{
    const clipft_int8_chain chain = {.layers = {l->layer}, .count = 1, .factor = l->factor};
    const bool branch = l->lora.lora_a.data, down = branch && (d->x.data || d->lora_a.data);
    if (d->bias.data && !clipft_column_sums(host, dy, &d->bias)) return false;
    if ((down || d->lora_b.data) && !clipft_lora_gradient_up(&l->lora, host, dy, v, down ? u : NULL, &d->lora_b)) return false;
    if (d->x.data && !clipft_int8_run(&chain, host, dy, &d->x)) return false;
    if (down) return clipft_lora_gradient_down(&l->lora, host, x, u, &d->lora_a, &d->x, true);
    return !d->x.data || !l->lora.quick_gelu || clipft_quick_gelu_backward(host, &d->x, x, &d->x);
}
