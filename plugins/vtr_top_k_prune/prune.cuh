// vtr_prune: scores, an exact selection, and the gather of what survives.
#pragma once

#include "workspace.cuh"

namespace {

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
    // slots beyond the budget are filled by the row's pads, its first entries, as far as there are
    const auto* ranks = reinterpret_cast<const unsigned*>(p.workspace + vtr_ranks_at(p)) +
                        1LL * batch * p.vision;
    for (int i = threadIdx.x; i < p.keep - budget; i += VTR_PRUNE_THREADS)
        if (ranks[i] == rank_of(0.0f, false)) keep_token(p, row, batch, i);
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

// Slots in front that nothing fills: the last column stands there, a row that the next stage masks.
__device__ inline int missing(const Params& p, const PruneShared& s) {
    return vtr_kept(p) - s.total[0];
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
            if (!copies_all) {
                const int alive = number - missing(p, s);
                column = alive < 0 ? p.length - 1 : column_of(row.alive, row.alive_before, words, alive);
            }
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
        long long place = i;
        const int skipped = copies_all ? 0 : missing(p, s), kept = i - skipped;
        if (copies_all) {
            place = p.vision_index[1LL * batch * p.vision + i];
        } else if (kept >= 0 && kept < s.total[1]) {
            const int column = column_of(row.kept, row.kept_before, vtr_words(p), kept);
            const unsigned below = row.alive[column / 32] & ((1u << column % 32) - 1u);
            place = row.alive_before[column / 32] + __popc(below) + skipped;
        }
        p.kept_vision_index[1LL * batch * p.keep + i] = place;
    }
}

}  // namespace
