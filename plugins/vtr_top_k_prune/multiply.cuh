// Logits of a few queries with the keys of a chunk: keys are read once for all of them.
#pragma once

#include "lanes.cuh"

namespace {

struct Multiplied {
    alignas(16) float query[MOST_HEADS * VTR_MAX_HEAD_DIM];  // fp32, times scale; read by fours
    float logits[MOST_HEADS][VTR_MOST_CHUNK];
};

// The lanes that read one key together, and in how many steps.
struct Reading {
    int lanes, steps;
    int lane;      // of this thread within its key
    int key;       // of this thread's first slot within a tile
    int slot;      // keys between two slots of a thread
    int tile;      // keys that the block reads at once
};

template <int WIDTH>
__device__ inline Reading reading(int head_dim, int thread) {
    Reading r;
    r.lanes = AT_ONCE;
    while (r.lanes < WARP && r.lanes * WIDTH < head_dim) r.lanes *= 2;
    r.steps = (head_dim + r.lanes * WIDTH - 1) / (r.lanes * WIDTH);
    r.lane = thread % r.lanes;
    r.key = thread / r.lanes;
    r.slot = VTR_SCORE_THREADS / r.lanes;
    r.tile = AT_ONCE * r.slot;
    return r;
}

// Where element ``e`` of a query lies: four in a row for one lane, then the next lane's.
template <int WIDTH>
__device__ inline int query_at(const Reading& r, int e) {
    if constexpr (WIDTH == 1) return e;
    const int step = e / (r.lanes * WIDTH), within = e % WIDTH;
    const int lane = e / WIDTH % r.lanes;
    return ((step * (WIDTH / 4) + within / 4) * r.lanes + lane) * 4 + within % 4;
}

template <int WIDTH>
__device__ inline void read_query(const float* query, const Reading& r, int step,
                                  float (&values)[WIDTH]) {
    if constexpr (WIDTH == 1) {
        values[0] = query[step * r.lanes + r.lane];
    } else {
        constexpr int QUADS = WIDTH / 4;
        const auto* fours = reinterpret_cast<const float4*>(query) + step * QUADS * r.lanes + r.lane;
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) {
            const float4 four = fours[quad * r.lanes];
            values[4 * quad] = four.x;
            values[4 * quad + 1] = four.y;
            values[4 * quad + 2] = four.z;
            values[4 * quad + 3] = four.w;
        }
    }
}

// Sums four values over ``lanes`` neighbours; lane i holds the sum of value i % 4. Both partners
// of an exchange add the same two numbers: the sum does not depend on the slot.
__device__ inline float sum_four(const float (&v)[AT_ONCE], int lanes, int lane) {
    const bool odd = lane & 1, high = lane & 2;
    float low_pair = odd ? v[1] : v[0], high_pair = odd ? v[3] : v[2];
    low_pair += __shfl_xor_sync(ALL_LANES, odd ? v[0] : v[1], 1);
    high_pair += __shfl_xor_sync(ALL_LANES, odd ? v[2] : v[3], 1);
    float sum = high ? high_pair : low_pair;
    sum += __shfl_xor_sync(ALL_LANES, high ? low_pair : high_pair, 2);
    for (int by = 4; by < lanes; by *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, by);
    return sum;
}

// HEADS queries to shared memory: ``row_of`` gives each one's row among all of them, or -1 for
// zeros, which are also what lies beyond their width.
template <class T, int WIDTH, int HEADS, class RowOf>
__device__ inline void stage(const Params& p, Multiplied& s, const Reading& r, RowOf row_of) {
    const int padded = r.lanes * r.steps * WIDTH;
    const auto* query = static_cast<const typename T::Element*>(p.query);
    for (int i = threadIdx.x; i < HEADS * padded; i += VTR_SCORE_THREADS) {
        const int g = i / padded, e = i % padded;
        const long long row = row_of(g);
        float value = 0.0f;
        if (row >= 0 && e < p.head_dim) value = T::read(query[row * p.head_dim + e], 0) * p.scale;
        s.query[g * padded + query_at<WIDTH>(r, e)] = value;
    }
}

// Logits of ``heads`` (at most HEADS) queries with ``count`` keys. ``key_at`` gives each one's row
// among all keys; ``prepare`` puts the queries into shared memory while the first keys come.
template <class T, int WIDTH, int HEADS, class KeyAt, class Prepare>
__device__ inline void multiply(const Params& p, Multiplied& s, int heads, int count,
                                KeyAt key_at, Prepare prepare) {
    const Reading r = reading<WIDTH>(p.head_dim, threadIdx.x);
    const int padded = r.lanes * r.steps * WIDTH;
    const int rounds = (count + r.tile - 1) / r.tile * r.steps;
    const auto fetch = [&](int round, uint4(&raw)[AT_ONCE]) {
        const int e = (round % r.steps * r.lanes + r.lane) * WIDTH;
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            const int key = round / r.steps * r.tile + u * r.slot + r.key;
            raw[u] = make_uint4(0, 0, 0, 0);
            if (key < count && e < p.head_dim)
                raw[u] = load<T, WIDTH>(p.keys, key_at(key) * p.head_dim + e);
        }
    };
    uint4 next[AT_ONCE];
    fetch(0, next);
    prepare(r);
    __syncthreads();
    float sums[HEADS][AT_ONCE];
    for (int round = 0; round < rounds; ++round) {
        const int step = round % r.steps;
        float keys[AT_ONCE][WIDTH];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) unpack<T, WIDTH>(next[u], keys[u]);
        if (round + 1 < rounds) fetch(round + 1, next);
#pragma unroll
        for (int g = 0; g < HEADS; ++g) {
            float query[WIDTH];
            read_query<WIDTH>(s.query + g * padded, r, step, query);
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u) {
                float sum = step ? sums[g][u] : 0.0f;
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) sum = fmaf(keys[u][i], query[i], sum);
                sums[g][u] = sum;
            }
            if (step + 1 < r.steps) continue;
            const float logit = sum_four(sums[g], r.lanes, r.lane);
            const int key = round / r.steps * r.tile + r.lane * r.slot + r.key;
            if (r.lane < AT_ONCE && g < heads && key < count) s.logits[g][key] = logit;
        }
    }
    __syncthreads();
}

}  // namespace
