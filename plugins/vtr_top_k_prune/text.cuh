// vtr_text_*: where rows of text ask, their softmax, then what they make of the vision tokens.
#pragma once

#include "multiply.cuh"
#include "workspace.cuh"

namespace {

struct TextShared : Multiplied {
    float rows[MOST_HEADS][VTR_ITEM];  // of each token, by each row of a tile
    float sums[VTR_ITEM];              // of each token, over rows
    int keys[VTR_ITEM];                // where each token's key stands in its row of the batch
    float2 softmax[2][MOST_HEADS];     // of a pass; the other half may still be read
    int warps[2][SCORE_WARPS];
};

// Where a row that may ask begins in the mask.
__device__ inline long long mask_at(const Params& p, int batch, int row) {
    const int within = p.mask_rows - vtr_rows(p) + row;
    return (1LL * batch * p.mask_rows + (within < 0 ? 0 : within)) * p.total;
}

__device__ inline bool is_asking(const Params& p, int batch, int first_text, int row) {
    const int rows = vtr_rows(p), position = p.length - rows + row;
    if (row >= rows - 1) return row == rows - 1;
    return position >= first_text && p.mask[mask_at(p, batch, rows - 1) + p.total - rows + row];
}

// A bit for each row of a tile.
__device__ inline unsigned asking_rows(const Params& p, int batch, int first_text, int tile) {
    const int shift = vtr_row_shift(p);
    unsigned bits = 0;
    for (int i = 0; i < 1 << shift; ++i)
        if (is_asking(p, batch, first_text, (tile << shift) + i)) bits |= 1u << i;
    return bits;
}

// By all threads of a block, to all of them.
template <class Join>
__device__ inline int reduce_block(int (&warps)[SCORE_WARPS], int value, Join join) {
    for (int by = WARP / 2; by > 0; by /= 2) value = join(value, __shfl_xor_sync(ALL_LANES, value, by));
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
    __syncthreads();
    value = warps[0];
    for (int i = 1; i < SCORE_WARPS; ++i) value = join(value, warps[i]);
    return value;
}

__device__ inline int find_first_text(const Params& p, TextShared& s, int batch) {
    const unsigned char* seen = p.mask + mask_at(p, batch, vtr_rows(p) - 1) + p.total - p.length;
    int end = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < p.vision; i += VTR_SCORE_THREADS) {
        const long long column = p.vision_index[1LL * batch * p.vision + i];
        if (column < 0 || column >= p.length) continue;
        if (column >= end && seen[column]) end = (int)column + 1;
    }
    return reduce_block(s.warps[0], end, [](int a, int b) { return a > b ? a : b; });
}

// For the launches behind this one.
__device__ inline void leave_asked(const Params& p, TextShared& s, int batch, int first_text) {
    int count = 0;
    for (int row = threadIdx.x; row < vtr_rows(p); row += VTR_SCORE_THREADS)
        count += is_asking(p, batch, first_text, row);
    count = reduce_block(s.warps[1], count, [](int a, int b) { return a + b; });
    if (threadIdx.x != 0) return;
    *asked_of(p, batch) = {first_text, count};
    reinterpret_cast<uint2*>(p.workspace)[batch] = make_uint2(0, 0);  // counters of vtr_prune
}

// Up to MOST_HEADS pairs of a row and a head of one group, multiplied in one pass: pair
// (head << shift) + row. Of a larger group, one row in several passes.
struct Pass {
    int batch, kv_head, tile, done;  // heads of the group in passes before
    int shift, heads;
    __device__ int pairs() const { return heads << shift; }
    __device__ int rows() const { return 1 << shift; }
};

__device__ inline Pass pass_of(const Params& p, int batch, int kv_head, int tile, int done) {
    Pass pass{batch, kv_head, tile, done, vtr_row_shift(p), 0};
    pass.heads = smaller(MOST_HEADS >> pass.shift, p.heads / p.kv_heads - done);
    return pass;
}

template <class T, int WIDTH>
__device__ inline void stage_pass(const Params& p, Multiplied& s, const Reading& r, const Pass& pass) {
    const int head = pass.kv_head * (p.heads / p.kv_heads) + pass.done, rows = vtr_rows(p);
    stage<T, WIDTH, MOST_HEADS>(p, s, r, [&](int pair) {
        const int row = (pass.tile << pass.shift) + pair % pass.rows();
        const int at = p.query_rows - rows + row;
        if (pair >= pass.pairs() || row >= rows || at < 0) return -1LL;
        return (1LL * pass.batch * p.heads + head + (pair >> pass.shift)) * p.query_rows + at;
    });
}

__device__ inline float shrink(float from, float to) { return from == to ? 1.0f : expf(from - to); }

// Takes the keys of a chunk into the maximum and sum of each pair. A warp, a pair.
__device__ inline void accumulate(const Params& p, TextShared& s, const Pass& pass, int first, int count) {
    const int lane = threadIdx.x % WARP, rows = vtr_rows(p);
    for (int pair = threadIdx.x / WARP; pair < pass.pairs(); pair += SCORE_WARPS) {
        const int row = smaller((pass.tile << pass.shift) + pair % pass.rows(), rows - 1);
        const unsigned char* seen = p.mask + mask_at(p, pass.batch, row) + first;
        float logits[VTR_MOST_CHUNK / WARP], most = -infinity(), sum = 0.0f;
#pragma unroll
        for (int i = 0; i < VTR_MOST_CHUNK / WARP; ++i) {
            const int key = i * WARP + lane;
            logits[i] = key < count && seen[key] ? s.logits[pair][key] : -infinity();
            most = fmaxf(most, logits[i]);
        }
        most = warp_max(most);
#pragma unroll
        for (int i = 0; i < VTR_MOST_CHUNK / WARP; ++i)
            if (logits[i] != -infinity()) sum += expf(logits[i] - most);
        sum = warp_sum(sum);
        if (lane != 0) continue;
        const float2 before = s.softmax[0][pair];
        const float both = fmaxf(before.x, most);
        sum = before.y * shrink(before.x, both) + sum * shrink(most, both);
        s.softmax[0][pair] = make_float2(both, sum);
    }
}

// Maximum and sum of the rows of one tile, for the heads of a group, over a share of the keys.
template <class T, int WIDTH>
__device__ void text_softmax(const Params& p, TextShared& s) {
    const int batch = blockIdx.z, splits = vtr_key_splits(p), lane = threadIdx.x % WARP;
    const int tile = blockIdx.x / splits, split = blockIdx.x % splits;
    const int begin = (int)(1LL * p.total * split / splits);
    const int end = (int)(1LL * p.total * (split + 1) / splits);
    const int first_text = find_first_text(p, s, batch);
    if (blockIdx.x == 0 && blockIdx.y == 0) leave_asked(p, s, batch, first_text);
    if (!asking_rows(p, batch, first_text, tile)) return;
    for (int done = 0; done < p.heads / p.kv_heads; done += MOST_HEADS) {
        const Pass pass = pass_of(p, batch, blockIdx.y, tile, done);
        const int warp = threadIdx.x / WARP;
        for (int pair = warp; lane == 0 && pair < MOST_HEADS; pair += SCORE_WARPS)
            s.softmax[0][pair] = make_float2(-infinity(), 0.0f);
        for (int first = begin; first < end; first += VTR_MOST_CHUNK) {
            const int count = smaller(VTR_MOST_CHUNK, end - first);
            const long long base = (1LL * batch * p.kv_heads + blockIdx.y) * p.total + first;
            multiply<T, WIDTH, MOST_HEADS>(
                p, s, pass.pairs(), count, [&](int key) { return base + key; },
                [&](const Reading& r) { if (first == begin) stage_pass<T, WIDTH>(p, s, r, pass); });
            accumulate(p, s, pass, first, count);
        }
        for (int pair = warp; lane == 0 && pair < pass.pairs(); pair += SCORE_WARPS)
            statistics_of(p, batch, blockIdx.y, tile, (done << pass.shift) + pair)[split] = s.softmax[0][pair];
    }
}

// Takes the probabilities of a pass into what each asking row makes of each token.
__device__ inline void take_in(const Params& p, TextShared& s, const Pass& pass, const float2* softmax,
                               unsigned asking, int count) {
    for (int row = 0; row < pass.rows(); ++row) {
        if (!(asking >> row & 1u)) continue;
        const unsigned char* seen = p.mask + mask_at(p, pass.batch, (pass.tile << pass.shift) + row);
        for (int i = threadIdx.x; i < count; i += VTR_SCORE_THREADS) {
            const bool is_seen = seen[s.keys[i]];
            float score = s.rows[row][i];
            for (int pair = row; pair < pass.pairs(); pair += pass.rows()) {
                // the probability of a key that is not seen: zero, or NaN where the row's sum is
                const float odds = is_seen ? expf(s.logits[pair][i] - softmax[pair].x) : 0.0f;
                score = join(p.max_heads, score, odds / softmax[pair].y);
            }
            s.rows[row][i] = score;
        }
    }
}

// Probabilities of VTR_ITEM vision tokens by the rows of a tile. What one token's thread writes, no
// other reads.
template <class T, int WIDTH>
__device__ inline void ask_tile(const Params& p, TextShared& s, int tile, unsigned asking,
                                int count, int& passes) {
    const int batch = blockIdx.z, group = p.heads / p.kv_heads, splits = vtr_key_splits(p);
    const int rows = 1 << vtr_row_shift(p);
    for (int i = threadIdx.x; i < count; i += VTR_SCORE_THREADS)
        for (int row = 0; row < rows; ++row) s.rows[row][i] = 0.0f;
    for (int kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
        const long long base = (1LL * batch * p.kv_heads + kv_head) * p.total;
        for (int done = 0; done < group; done += MOST_HEADS) {
            const Pass pass = pass_of(p, batch, kv_head, tile, done);
            float2* softmax = s.softmax[passes++ % 2];
            multiply<T, WIDTH, MOST_HEADS>(
                p, s, pass.pairs(), count, [&](int key) { return base + s.keys[key]; },
                [&](const Reading& r) {
                    stage_pass<T, WIDTH>(p, s, r, pass);
                    const int lane = threadIdx.x % WARP;
                    for (int pair = threadIdx.x / WARP; pair < pass.pairs(); pair += SCORE_WARPS) {
                        const int at = (done << pass.shift) + pair;
                        const float2 merged = merge(statistics_of(p, batch, kv_head, tile, at), splits, lane);
                        if (lane == 0) softmax[pair] = merged;
                    }
                });
            take_in(p, s, pass, softmax, asking, count);
        }
    }
    for (int i = threadIdx.x; i < count; i += VTR_SCORE_THREADS)
        for (int row = 0; row < rows; ++row) s.sums[i] += s.rows[row][i];
}

// Sums over this block's share of the asking rows, for VTR_ITEM vision tokens.
template <class T, int WIDTH>
__device__ void text_score(const Params& p, TextShared& s) {
    const int batch = blockIdx.z, first = blockIdx.x * VTR_ITEM, split = blockIdx.y;
    const int count = smaller(VTR_ITEM, p.vision - first), tiles = vtr_row_tiles(p, vtr_rows(p));
    const int first_text = asked_of(p, batch)->first_text;
    for (int i = threadIdx.x; i < count; i += VTR_SCORE_THREADS) {
        s.keys[i] = p.total - p.length + column_at(p, 1LL * batch * p.vision + first + i);
        s.sums[i] = 0.0f;
    }
    __syncthreads();
    int passes = 0;
    for (int tile = split; tile < tiles; tile += gridDim.y) {
        const unsigned asking = asking_rows(p, batch, first_text, tile);
        if (asking) ask_tile<T, WIDTH>(p, s, tile, asking, count, passes);
    }
    auto* sums = reinterpret_cast<float*>(p.workspace + vtr_sums_at(p));
    for (int i = threadIdx.x; i < count; i += VTR_SCORE_THREADS)
        sums[(1LL * batch * gridDim.y + split) * p.vision + first + i] = s.sums[i];
}

template <class T>
__device__ void text_softmax(const Params& p, TextShared& s) {
    if (p.wide) text_softmax<T, 4 * T::PER_WORD>(p, s);
    else text_softmax<T, 1>(p, s);
}

template <class T>
__device__ void text_score(const Params& p, TextShared& s) {
    if (p.wide) text_score<T, 4 * T::PER_WORD>(p, s);
    else text_score<T, 1>(p, s);
}

}  // namespace
