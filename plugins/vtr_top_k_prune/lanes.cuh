// What every kernel stands on: types as they lie in memory, and what lanes of a warp do together.
#pragma once

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

}  // namespace
