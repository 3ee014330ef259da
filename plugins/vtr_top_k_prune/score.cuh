// vtr_score_*: the last row's logits, and each chunk's maximum and sum.
#pragma once

#include "multiply.cuh"

namespace {

struct ScoreShared : Multiplied {
    unsigned char seen[VTR_MOST_CHUNK];
};

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

}  // namespace
