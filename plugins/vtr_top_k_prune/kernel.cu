// vtr::VtrTopKPrune in two launches, or three; graphs/ops/ defines what it computes.
//
// 1. vtr_score_*  logits of the last query row against every key, fp32, and each chunk's maximum
//                 and sum (the softmax is merged later): keys are read once for all heads of a group.
// 2. vtr_prune    blocks of a row first share the reduction over heads (each token's score), then
//                 each finds the same exact threshold by radix selection, marks survivors in a
//                 bitmap, and gathers its share of the rows.
//
// Where rows of text ask, 1. is two launches, and 2. adds up what they leave:
// 1a. vtr_text_softmax_*  maximum and sum of every asking row and head, over the keys it may see.
// 1b. vtr_text_score_*    logits of the vision keys once more, as probabilities, reduced over heads
//                         and added up over the rows of the block.
//
// Every sum has one order, the same for every token: equal keys get equal scores. No header but
// params.h, no type of TensorRT: compiled by nvcc, by NVRTC and, behind host/cuda_on_host.h, by g++.
#include "params.h"

#ifndef VTR_SCORE_THREADS
#define VTR_SCORE_THREADS 128
#define VTR_PRUNE_THREADS 1024
#endif
#ifndef VTR_DYNAMIC_SHARED
#define VTR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace {

using Params = VtrTopKPruneParams;
using uint64 = unsigned long long;
static_assert(sizeof(Params) == 152, "kernel.py builds the same structure");

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;
constexpr int AT_ONCE = 4;   // keys that a lane works on at a time
constexpr int MOST_HEADS = VTR_MOST_HEADS;
constexpr int SCORE_WARPS = VTR_SCORE_THREADS / WARP;
constexpr int PRUNE_WARPS = VTR_PRUNE_THREADS / WARP;
constexpr int PARTS = VTR_PRUNE_THREADS / VTR_ITEM;  // threads that share the heads of one token

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }
__device__ inline bool is_nan(float value) { return value != value; }
__device__ inline int smaller(int a, int b) { return a < b ? a : b; }

__device__ inline float from_half(unsigned bits) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
#else
    return host_half(bits);
#endif
}

// How elements of a type lie in 32-bit words.
struct Fp32 {
    using Element = unsigned;
    static constexpr int PER_WORD = 1;
    static __device__ float read(unsigned word, int) { return __uint_as_float(word); }
};
struct Fp16 {
    using Element = unsigned short;
    static constexpr int PER_WORD = 2;
    static __device__ float read(unsigned word, int part) {
        return from_half(part ? word >> 16 : word & 0xffffu);
    }
};
struct Bf16 {
    using Element = unsigned short;
    static constexpr int PER_WORD = 2;
    static __device__ float read(unsigned word, int part) {
        return __uint_as_float(part ? word & 0xffff0000u : word << 16);
    }
};

// WIDTH elements: 16 bytes, or one where rows are not aligned to that.
template <class T, int WIDTH>
__device__ inline uint4 load(const void* data, long long element) {
    if constexpr (WIDTH > 1) return static_cast<const uint4*>(data)[element / WIDTH];
    else return make_uint4(static_cast<const typename T::Element*>(data)[element], 0, 0, 0);
}

template <class T, int WIDTH>
__device__ inline void unpack(const uint4& raw, float (&values)[WIDTH]) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values[i] = T::read(words[i / T::PER_WORD], i % T::PER_WORD);
}

__device__ inline float warp_max(float value) {
    for (int by = WARP / 2; by > 0; by /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, by));
    return value;
}

__device__ inline float warp_sum(float value) {
    for (int by = WARP / 2; by > 0; by /= 2) value += __shfl_xor_sync(ALL_LANES, value, by);
    return value;
}

// Inclusive.
__device__ inline int warp_scan(int value, int lane) {
    for (int by = 1; by < WARP; by *= 2) {
        const int below = __shfl_up_sync(ALL_LANES, value, by);
        if (lane >= by) value += below;
    }
    return value;
}

// ---- first launch: logits and statistics ----

struct Multiplied {
    alignas(16) float query[MOST_HEADS * VTR_MAX_HEAD_DIM];  // fp32, times scale; read by fours
    float logits[MOST_HEADS][VTR_MOST_CHUNK];
};
struct ScoreShared : Multiplied {
    unsigned char seen[VTR_MOST_CHUNK];
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

// Maximum and sum of the visible keys of a chunk, and the logits of the columns of this call.
__device__ inline void summarise(const Params& p, const ScoreShared& s, int head, int heads,
                                 int first, int count) {
    const int lane = threadIdx.x % WARP, past = p.total - p.length;
    auto* statistics = reinterpret_cast<float2*>(p.workspace + vtr_statistics_at(p));
    auto* logits = reinterpret_cast<float*>(p.workspace + vtr_logits_at(p));
    for (int g = threadIdx.x / WARP; g < heads; g += SCORE_WARPS) {
        const long long row = 1LL * blockIdx.z * p.heads + head + g;
        float most = -infinity(), sum = 0.0f;
        for (int i = lane; i < count; i += WARP)
            if (s.seen[i]) most = fmaxf(most, s.logits[g][i]);
        most = warp_max(most);
        for (int i = lane; i < count; i += WARP) {
            const float logit = s.logits[g][i];
            if (s.seen[i] && logit != -infinity()) sum += expf(logit - most);
            if (first + i >= past) logits[row * p.length + first + i - past] = logit;
        }
        sum = warp_sum(sum);
        if (lane == 0) statistics[row * gridDim.x + blockIdx.x] = make_float2(most, sum);
    }
}

template <class T, int WIDTH, int HEADS>
__device__ void score_group(const Params& p, ScoreShared& s) {
    const int group = p.heads / p.kv_heads;
    const int first = blockIdx.x * p.chunk, count = smaller(p.chunk, p.total - first);
    const long long base = (1LL * blockIdx.z * p.kv_heads + blockIdx.y) * p.total + first;
    for (int done = 0; done < group; done += HEADS) {
        const int head = blockIdx.y * group + done, heads = smaller(HEADS, group - done);
        const auto row_of = [&](int g) {
            return g < heads ? (1LL * blockIdx.z * p.heads + head + g + 1) * p.query_rows - 1 : -1;
        };
        multiply<T, WIDTH, HEADS>(
            p, s, heads, count, [&](int key) { return base + key; },
            [&](const Reading& r) {
                stage<T, WIDTH, HEADS>(p, s, r, row_of);
                const long long row = (1LL * blockIdx.z + 1) * p.mask_rows - 1;
                for (int i = threadIdx.x; i < count; i += VTR_SCORE_THREADS)
                    s.seen[i] = p.mask[row * p.total + first + i];
            });
        summarise(p, s, head, heads, first, count);  // what it reads, nobody writes before a barrier
    }
}

template <class T>
__device__ void score(const Params& p, ScoreShared& s) {
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0)  // counters of vtr_prune
        reinterpret_cast<uint2*>(p.workspace)[blockIdx.z] = make_uint2(0, 0);
    constexpr int WIDE = 4 * T::PER_WORD;
    const int group = p.heads / p.kv_heads;
    if (!p.wide) score_group<T, 1, MOST_HEADS>(p, s);
    else if (group == 1) score_group<T, WIDE, 1>(p, s);
    else if (group == 2) score_group<T, WIDE, 2>(p, s);
    else if (group <= 4) score_group<T, WIDE, 4>(p, s);
    else score_group<T, WIDE, MOST_HEADS>(p, s);
}

// ---- where rows of text ask: their softmax, then what they make of the vision tokens ----

struct TextShared : Multiplied {
    float rows[MOST_HEADS][VTR_ITEM];  // of each token, by each row of a tile
    float sums[VTR_ITEM];              // of each token, over rows
    int keys[VTR_ITEM];                // where each token's key stands in its row of the batch
    float2 softmax[2][MOST_HEADS];     // of a pass; the other half may still be read
    int warps[2][SCORE_WARPS];
};

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

// ---- last launch: scores, selection, gather ----

struct PruneShared {
    float parts[PARTS][VTR_ITEM];
    unsigned histogram[256];
    int sums[2][PRUNE_WARPS];
    int total[2];
    unsigned item;
    int digit, needed, found;
    int rows[VTR_PRUNE_THREADS];
};

// A row's bitmaps over its columns, with the bits before each word, and its heads' softmax.
struct Row {
    float2* softmax;
    unsigned *alive, *kept;
    int *alive_before, *kept_before;
};

__device__ inline Row layout(const Params& p, unsigned char* shared) {
    Row row;
    const int words = vtr_words(p);
    row.softmax = reinterpret_cast<float2*>(shared);
    row.alive = reinterpret_cast<unsigned*>(row.softmax + p.heads);
    row.kept = row.alive + words;
    row.alive_before = reinterpret_cast<int*>(row.kept + words);
    row.kept_before = row.alive_before + words;
    return row;
}

// Every head's maximum and sum over all chunks. A warp, a head.
__device__ inline void merge_statistics(const Params& p, const Row& row, int batch) {
    const int lane = threadIdx.x % WARP;
    const int chunks = (int)vtr_divide_up(p.total, p.chunk);
    const auto* all = reinterpret_cast<const float2*>(p.workspace + vtr_statistics_at(p));
    for (int head = threadIdx.x / WARP; head < p.heads; head += PRUNE_WARPS) {
        const float2 merged = merge(all + (1LL * batch * p.heads + head) * chunks, chunks, lane);
        if (lane == 0) row.softmax[head] = merged;
    }
    __syncthreads();
}

// A number whose order is that of the score; NaN is -1 and a token that nobody sees -2.
__device__ inline unsigned rank_of(float score, bool seen) {
    const float value = !seen ? -2.0f : is_nan(score) ? -1.0f : score;
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A part of a token's score: probabilities of every PARTS-th head, or sums over every PARTS-th share
// of the asking rows.
__device__ inline float part_of(const Params& p, const Row& row, int batch, int token, int part) {
    if (token >= p.vision) return 0.0f;
    float score = 0.0f;
    if (p.text) {
        const auto* sums = reinterpret_cast<const float*>(p.workspace + vtr_sums_at(p));
        const int splits = vtr_row_splits(p);
        for (int split = part; split < splits; split += PARTS)
            score += sums[(1LL * batch * splits + split) * p.vision + token];
        return score;
    }
    const auto* logits = reinterpret_cast<const float*>(p.workspace + vtr_logits_at(p));
    const int column = column_at(p, 1LL * batch * p.vision + token);
#pragma unroll 4
    for (int head = part; head < p.heads; head += PARTS) {
        const long long at = (1LL * batch * p.heads + head) * p.length + column;
        const float2 softmax = row.softmax[head];
        score = join(p.max_heads, score, expf(logits[at] - softmax.x) / softmax.y);
    }
    return score;
}

// Scores of VTR_ITEM vision tokens, reduced in one fixed order.
__device__ inline void rank_item(const Params& p, PruneShared& s, const Row& row, int batch,
                                 int item) {
    const int token = item * VTR_ITEM + threadIdx.x % VTR_ITEM, part = threadIdx.x / VTR_ITEM;
    auto* ranks = reinterpret_cast<unsigned*>(p.workspace + vtr_ranks_at(p));
    float score = part_of(p, row, batch, token, part);
    s.parts[part][threadIdx.x % VTR_ITEM] = score;
    __syncthreads();
    if (part == 0 && token < p.vision) {
        const bool largest = p.max_heads && !p.text;
        for (int i = 1; i < PARTS; ++i) score = join(largest, score, s.parts[i][threadIdx.x]);
        if (!p.max_heads) score /= p.heads;
        if (p.text) score /= asked_of(p, batch)->count;
        const long long entry = 1LL * batch * p.vision + token;
        const long long last = (1LL * batch + 1) * p.mask_rows - 1;
        const long long key = last * p.total + p.total - p.length + column_at(p, entry);
        ranks[entry] = rank_of(score, p.mask[key]);
    }
    __syncthreads();
}

// The blocks of a row take items until none is left, then wait for those still being worked on.
// Whoever holds one is running and waits for nobody: no block can wait for one not yet started.
__device__ inline void rank_tokens(const Params& p, PruneShared& s, const Row& row, int batch) {
    auto* counters = reinterpret_cast<unsigned*>(p.workspace) + 2 * batch;
    const unsigned items = (unsigned)vtr_divide_up(p.vision, VTR_ITEM);
    for (bool merged = false;; merged = true) {
        if (threadIdx.x == 0) s.item = atomicAdd(counters, 1u);
        __syncthreads();
        const unsigned item = s.item;  // written again behind the barriers of rank_item
        if (item >= items) break;
        if (!merged && !p.text) merge_statistics(p, row, batch);
        rank_item(p, s, row, batch, (int)item);
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(counters + 1, 1u);
        }
    }
    if (threadIdx.x == 0) {
        while (*static_cast<volatile unsigned*>(counters + 1) < items) __nanosleep(64);
        __threadfence();
    }
    __syncthreads();
}

// Larger is better: the score first, then the lower index. No two tokens are equal.
__device__ inline uint64 order_of(unsigned rank, int token) {
    return (uint64)rank << 32 | (0xffffffffu - (unsigned)token);
}

// The digit of the ``needed``-th best number, how many of that digit are needed and how many exist.
__device__ inline void find_digit(PruneShared& s, int lane, int needed) {
    const int own = 256 / WARP, top = 255 - lane * own;
    int count = 0;
    for (int i = 0; i < own; ++i) count += s.histogram[top - i];
    const int upto = warp_scan(count, lane);
    int left = needed - (upto - count);
    if (left <= 0 || left > count) return;
    int digit = top;
    for (; left > (int)s.histogram[digit]; --digit) left -= s.histogram[digit];
    s.digit = digit;
    s.needed = left;
    s.found = s.histogram[digit];
}

// The least order among the best ``share`` tokens of [first, first + size): radix selection, eight
// bits at a time, which ends as soon as all that agree so far are needed.
__device__ inline uint64 threshold(PruneShared& s, const unsigned* ranks, int first, int size,
                                   int share) {
    if (share <= 0) return ~0ull;
    if (share >= size) return 0;
    uint64 prefix = 0;
    int needed = share;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += VTR_PRUNE_THREADS) s.histogram[i] = 0;
        __syncthreads();
        for (int i = first + threadIdx.x; i < first + size; i += VTR_PRUNE_THREADS) {
            const uint64 order = order_of(ranks[i], i);
            if (shift == 56 || order >> (shift + 8) == prefix)
                atomicAdd(&s.histogram[order >> shift & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x < WARP) find_digit(s, threadIdx.x, needed);
        __syncthreads();
        prefix = prefix << 8 | (uint64)s.digit;
        needed = s.needed;
        if (s.found == needed) return prefix << shift;
    }
    return prefix;
}

__device__ inline void keep_token(const Params& p, const Row& row, int batch, int token) {
    const long long column = p.vision_index[1LL * batch * p.vision + token];
    if (column < 0 || column >= p.length) return;
    atomicOr(&row.alive[column / 32], 1u << column % 32);
    atomicOr(&row.kept[column / 32], 1u << column % 32);
}

__device__ inline void keep_best(const Params& p, PruneShared& s, const Row& row, int batch,
                                 int first, int size, int share) {
    const auto* ranks = reinterpret_cast<const unsigned*>(p.workspace + vtr_ranks_at(p)) +
                        1LL * batch * p.vision;
    const uint64 least = threshold(s, ranks, first, size, share);
    for (int i = first + threadIdx.x; i < first + size; i += VTR_PRUNE_THREADS)
        if (order_of(ranks[i], i) >= least) keep_token(p, row, batch, i);
    __syncthreads();
}

// Bitmaps of the columns that survive and of the vision tokens among them.
__device__ inline void mark(const Params& p, PruneShared& s, const Row& row, int batch) {
    const int words = vtr_words(p);
    for (int i = threadIdx.x; i < words; i += VTR_PRUNE_THREADS) {
        const int bits = smaller(32, p.length - 32 * i);
        row.alive[i] = bits == 32 ? ~0u : (1u << bits) - 1u;
        row.kept[i] = 0u;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.vision; i += VTR_PRUNE_THREADS) {
        const long long column = p.vision_index[1LL * batch * p.vision + i];
        if (column >= 0 && column < p.length) atomicAnd(&row.alive[column / 32], ~(1u << column % 32));
    }
    __syncthreads();
    if (p.keep == 0) return;
    if (p.per_image) {
        const long long given = p.budget[0];
        const int images = given < 1 ? 1 : given > p.vision ? p.vision : (int)given;
        const int size = p.vision / images, share = p.keep / images;
        for (int i = 0; i < images; ++i) keep_best(p, s, row, batch, i * size, size, share);
        return;
    }
    const long long given = p.budget[batch];
    const int budget = given < 0 ? 0 : given > p.keep ? p.keep : (int)given;
    keep_best(p, s, row, batch, 0, p.vision, budget);
    // slots beyond the budget are filled by the first entries: a row's pads
    for (int i = threadIdx.x; i < p.keep - budget; i += VTR_PRUNE_THREADS)
        keep_token(p, row, batch, i);
    __syncthreads();
}

// Bits before each word, and in all.
__device__ inline void count_bits(const Params& p, PruneShared& s, const Row& row) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, words = vtr_words(p);
    int alive_before = 0, kept_before = 0;
    for (int base = 0; base < words; base += VTR_PRUNE_THREADS) {
        const int word = base + threadIdx.x;
        const int alive = word < words ? __popc(row.alive[word]) : 0;
        const int kept = word < words ? __popc(row.kept[word]) : 0;
        int alive_upto = warp_scan(alive, lane), kept_upto = warp_scan(kept, lane);
        if (lane == WARP - 1) {
            s.sums[0][warp] = alive_upto;
            s.sums[1][warp] = kept_upto;
        }
        __syncthreads();
        alive_upto += alive_before;
        kept_upto += kept_before;
        for (int i = 0; i < PRUNE_WARPS; ++i) {
            if (i < warp) alive_upto += s.sums[0][i];
            if (i < warp) kept_upto += s.sums[1][i];
            alive_before += s.sums[0][i];
            kept_before += s.sums[1][i];
        }
        if (word < words) {
            row.alive_before[word] = alive_upto - alive;
            row.kept_before[word] = kept_upto - kept;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        s.total[0] = alive_before;
        s.total[1] = kept_before;
    }
    __syncthreads();
}

// The column of set bit ``number``.
__device__ inline int column_of(const unsigned* bits, const int* before, int words, int number) {
    int low = 0, high = words - 1;  // the last word with at most ``number`` bits before it
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (before[middle] <= number) low = middle;
        else high = middle - 1;
    }
    unsigned word = bits[low];
    for (int skip = number - before[low]; skip > 0; --skip) word &= word - 1;
    return 32 * low + __popc((word & (0u - word)) - 1u);
}

template <class Unit>
__device__ inline void copy_rows(const Params& p, const int* rows, int count, long long from,
                                 long long to) {
    const unsigned units = p.row_bytes / sizeof(Unit), all = units * (unsigned)count;
    const auto* source = static_cast<const Unit*>(p.hidden) + from * units;
    auto* target = static_cast<Unit*>(p.kept_hidden) + to * units;
    for (unsigned i = threadIdx.x; i < all; i += AT_ONCE * VTR_PRUNE_THREADS) {
        Unit values[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            const unsigned at = i + u * VTR_PRUNE_THREADS;
            if (at < all) values[u] = source[1LL * rows[at / units] * units + at % units];
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            const unsigned at = i + u * VTR_PRUNE_THREADS;
            if (at < all) target[at] = values[u];
        }
    }
}

// This block's share of the surviving rows: their columns, then the rows themselves.
__device__ inline void gather(const Params& p, PruneShared& s, const Row& row, int batch,
                              bool copies_all) {
    const int kept = vtr_kept(p), words = vtr_words(p);
    const int begin = (int)(1LL * kept * blockIdx.x / p.tiles);
    const int end = (int)(1LL * kept * (blockIdx.x + 1) / p.tiles);
    const uint64 addresses = reinterpret_cast<uint64>(p.hidden) |
                             reinterpret_cast<uint64>(p.kept_hidden) | (uint64)p.row_bytes;
    const long long from = 1LL * batch * p.length, to = 1LL * batch * kept;
    const unsigned most_units = 0x10000000u / (unsigned)(p.row_bytes / 2 + 1);
    const int at_once = smaller(VTR_PRUNE_THREADS, most_units < 1 ? 1 : (int)most_units);
    for (int base = begin; base < end; base += at_once) {
        const int count = smaller(at_once, end - base), number = base + threadIdx.x;
        if ((int)threadIdx.x < count) {
            int column = number;
            if (!copies_all)
                column = number < s.total[0] ? column_of(row.alive, row.alive_before, words, number) : 0;
            s.rows[threadIdx.x] = column;
            p.indices[to + number] = column;
        }
        __syncthreads();
        if (addresses % 16 == 0) copy_rows<uint4>(p, s.rows, count, from, to + base);
        else copy_rows<unsigned short>(p, s.rows, count, from, to + base);
        __syncthreads();
    }
}

// Where this block's share of the surviving vision tokens stands among all that survive.
__device__ inline void place_vision(const Params& p, const PruneShared& s, const Row& row, int batch,
                                    bool copies_all) {
    const int begin = (int)(1LL * p.keep * blockIdx.x / p.tiles);
    const int end = (int)(1LL * p.keep * (blockIdx.x + 1) / p.tiles);
    for (int i = begin + threadIdx.x; i < end; i += VTR_PRUNE_THREADS) {
        long long place = 0;
        if (copies_all) {
            place = p.vision_index[1LL * batch * p.vision + i];
        } else if (i < s.total[1]) {
            const int column = column_of(row.kept, row.kept_before, vtr_words(p), i);
            const unsigned below = row.alive[column / 32] & ((1u << column % 32) - 1u);
            place = row.alive_before[column / 32] + __popc(below);
        }
        p.kept_vision_index[1LL * batch * p.keep + i] = place;
    }
}

}  // namespace

// ---- entry points: launch.h has their grids ----

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 4) vtr_score_fp32(Params p) {
    __shared__ ScoreShared shared;
    score<Fp32>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 4) vtr_score_fp16(Params p) {
    __shared__ ScoreShared shared;
    score<Fp16>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 4) vtr_score_bf16(Params p) {
    __shared__ ScoreShared shared;
    score<Bf16>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 3) vtr_text_softmax_fp32(Params p) {
    __shared__ TextShared shared;
    text_softmax<Fp32>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 3) vtr_text_softmax_fp16(Params p) {
    __shared__ TextShared shared;
    text_softmax<Fp16>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 3) vtr_text_softmax_bf16(Params p) {
    __shared__ TextShared shared;
    text_softmax<Bf16>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 3) vtr_text_score_fp32(Params p) {
    __shared__ TextShared shared;
    text_score<Fp32>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 3) vtr_text_score_fp16(Params p) {
    __shared__ TextShared shared;
    text_score<Fp16>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_SCORE_THREADS, 3) vtr_text_score_bf16(Params p) {
    __shared__ TextShared shared;
    text_score<Bf16>(p, shared);
}

extern "C" __global__ void __launch_bounds__(VTR_PRUNE_THREADS, 1) vtr_prune(Params p) {
    VTR_DYNAMIC_SHARED(vtr_dynamic);
    __shared__ PruneShared shared;
    const int batch = blockIdx.y;
    const bool copies_all = p.keep == p.vision;
    const Row row = layout(p, vtr_dynamic);
    if (!copies_all) {
        if (vtr_is_ranked(p)) rank_tokens(p, shared, row, batch);
        mark(p, shared, row, batch);
        count_bits(p, shared, row);
    }
    gather(p, shared, row, batch, copies_all);
    place_vision(p, shared, row, batch, copies_all);
}
