// What one launch leaves the next, and how it is read.
#pragma once

#include "lanes.cuh"

namespace {

// What the first launch of a row of the batch finds out for the others.
struct Asked {
    int first_text;  // the position behind the last seen vision token
    int count;       // rows that ask
};

__device__ inline Asked* asked_of(const Params& p, int batch) {
    return reinterpret_cast<Asked*>(p.workspace + 8LL * p.batch) + batch;
}

// Where the statistics of a pair of row and head of a tile stand, one for each split of the keys.
__device__ inline float2* statistics_of(const Params& p, int batch, int kv_head, int tile, int pair) {
    const int tiles = vtr_row_tiles(p, vtr_rows(p));
    const int pairs = (p.heads / p.kv_heads) << vtr_row_shift(p);
    const long long at = ((1LL * batch * p.kv_heads + kv_head) * tiles + tile) * pairs + pair;
    return reinterpret_cast<float2*>(p.workspace + vtr_statistics_at(p)) + at * vtr_key_splits(p);
}

// The column of an entry of ``vision_index``: never one outside, whatever is asked.
__device__ inline int column_at(const Params& p, long long entry) {
    const long long column = p.vision_index[entry];
    return column < 0 || column >= p.length ? 0 : (int)column;
}

// Maximum and sum over all of ``count`` parts, by one warp.
__device__ inline float2 merge(const float2* parts, int count, int lane) {
    float most = -infinity(), sum = 0.0f;
    for (int i = lane; i < count; i += WARP) most = fmaxf(most, parts[i].x);
    most = warp_max(most);
    for (int i = lane; i < count; i += WARP) sum += parts[i].y * expf(parts[i].x - most);
    return make_float2(most, warp_sum(sum));
}

__device__ inline float join(bool largest, float a, float b) {
    if (!largest) return a + b;
    return b > a || is_nan(b) ? b : a;
}

}  // namespace
