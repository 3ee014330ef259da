// Which kernels one call needs, on what grids. ``start`` launches: (kernel, grid x, y, z, threads,
// dynamic shared bytes) -> 0, or an error that ends the call.
#pragma once

#include "params.h"

enum VtrKernel {
    VTR_SCORE_FP32, VTR_SCORE_FP16, VTR_SCORE_BF16, VTR_PRUNE,
    VTR_TEXT_SOFTMAX_FP32, VTR_TEXT_SOFTMAX_FP16, VTR_TEXT_SOFTMAX_BF16,
    VTR_TEXT_SCORE_FP32, VTR_TEXT_SCORE_FP16, VTR_TEXT_SCORE_BF16,
};

constexpr int VTR_SCORE_BLOCK = 128, VTR_PRUNE_BLOCK = 1024;

// What follows from the rest: fields from ``chunk`` on.
inline void vtr_divide(VtrTopKPruneParams& p, int element_bytes, int multiprocessors) {
    p.chunk = vtr_chunk(p.batch, p.kv_heads, p.total);
    p.tiles = vtr_tiles(p, multiprocessors);
    p.wide = p.head_dim * element_bytes % 16 == 0 && reinterpret_cast<unsigned long long>(p.keys) % 16 == 0;
}

// ``score``: VTR_SCORE_*, for the type of the keys; with ``text`` the two of that type instead.
template <class Start>
int vtr_launch(const VtrTopKPruneParams& p, VtrKernel score, Start start) {
    if (vtr_is_ranked(p) && p.text) {
        const auto softmax = (VtrKernel)(VTR_TEXT_SOFTMAX_FP32 + score);
        const auto sum = (VtrKernel)(VTR_TEXT_SCORE_FP32 + score);
        const int blocks = vtr_row_tiles(p, vtr_rows(p)) * vtr_key_splits(p);
        const int items = (int)vtr_divide_up(p.vision, VTR_ITEM);
        if (const int error = start(softmax, blocks, p.kv_heads, p.batch, VTR_SCORE_BLOCK, 0)) return error;
        if (const int error = start(sum, items, vtr_row_splits(p), p.batch, VTR_SCORE_BLOCK, 0)) return error;
    } else if (vtr_is_ranked(p)) {
        const int chunks = (int)vtr_divide_up(p.total, p.chunk);
        if (const int error = start(score, chunks, p.kv_heads, p.batch, VTR_SCORE_BLOCK, 0)) return error;
    }
    return start(VTR_PRUNE, p.tiles, p.batch, 1, VTR_PRUNE_BLOCK, (int)vtr_shared_bytes(p));
}
