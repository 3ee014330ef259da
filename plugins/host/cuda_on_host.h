// Enough of CUDA to run a kernel's own source on a CPU, for tests: every thread of a block is a
// fiber, blocks run one after another. Fibers switch at barriers and warp exchanges only, and a warp
// runs as far as it can before the next does, in an order that a test chooses, so that a missing
// barrier shows. A barrier that some threads never reach ends the process with a message instead of
// hanging.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static __attribute__((section("host_shared")))
#define __launch_bounds__(...)
#define VTR_DYNAMIC_SHARED(name) unsigned char* name = host::dynamic_shared.data()

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

extern unsigned char __start_host_shared[], __stop_host_shared[];  // the linker's

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;

struct Barrier { unsigned arrived = 0, generation = 0; };
struct Fiber { ucontext_t first; jmp_buf at; bool is_started = false, is_done = true; };

inline std::vector<unsigned char> dynamic_shared;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warps;
inline std::vector<unsigned> exchanged;
inline Barrier block;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline unsigned current, alive;
inline bool moved, is_reversed;

inline void pause() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
    for (;;) {
        body();
        fibers[current].is_done = true;
        --alive;
        pause();
    }
}

inline void wait(Barrier& barrier, unsigned of) {
    const unsigned generation = barrier.generation;
    moved = true;
    if (++barrier.arrived == of) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) pause();
    moved = true;
}

inline unsigned exchange(unsigned bits, unsigned from) {
    const unsigned warp = current / WARP, width = blockDim.x < WARP ? blockDim.x : WARP;
    exchanged[current] = bits;
    wait(warps[warp], width);
    const unsigned got = exchanged[warp * WARP + from % width];
    wait(warps[warp], width);
    return got;
}

inline void resume(unsigned thread) {
    current = thread;
    threadIdx.x = thread;
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.is_started) _longjmp(fiber.at, 1);
    fiber.is_started = true;
    setcontext(&fiber.first);
}

inline void grow(unsigned threads) {
    if (fibers.size() >= threads) return;
    fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        fiber.first.uc_stack.ss_size = STACK_BYTES;
        fiber.first.uc_link = nullptr;
        makecontext(&fiber.first, enter, 0);
    }
}

// One turn of some threads that follow each other; whether any got further.
inline bool run_warp(unsigned begin, unsigned end, unsigned threads) {
    moved = false;
    const unsigned before = alive;
    for (unsigned i = begin; i < end; ++i) {
        const unsigned thread = is_reversed ? threads - 1 - i : i;
        if (!fibers[thread].is_done) resume(thread);
    }
    return moved || alive < before;
}

inline void run_block(unsigned threads) {
    block = {};
    warps.assign((threads + WARP - 1) / WARP, {});
    exchanged.assign(threads, 0);
    alive = threads;
    for (unsigned i = 0; i < threads; ++i) fibers[i].is_done = false;
    while (alive) {
        bool stuck = true;
        for (unsigned i = 0; i < threads; i += WARP) {
            const unsigned end = i + WARP < threads ? i + WARP : threads;
            while (run_warp(i, end, threads)) stuck = false;
        }
        if (stuck) {
            std::fprintf(stderr, "block %u,%u,%u: threads wait at different barriers\n", blockIdx.x,
                         blockIdx.y, blockIdx.z);
            std::abort();
        }
    }
}

template <class Kernel, class Params>
void launch(Kernel kernel, const Params& params, dim3 grid, unsigned threads, size_t shared_bytes) {
    grow(threads);
    gridDim = grid;
    blockDim = {threads};
    body = [&] { kernel(params); };
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
        const unsigned at = is_reversed ? blocks - 1 - i : i;
        blockIdx = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
        // shared memory begins with anything: here with numbers that spoil every sum and maximum
        dynamic_shared.assign(shared_bytes, 0x7f);
        std::memset(__start_host_shared, 0x7f, __stop_host_shared - __start_host_shared);
        run_block(threads);
    }
}

}  // namespace host

inline void __syncthreads() { host::wait(host::block, blockDim.x); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { host::pause(); }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned atomicAdd(unsigned* at, unsigned by) { const unsigned old = *at; *at += by; return old; }
inline unsigned atomicOr(unsigned* at, unsigned bits) { const unsigned old = *at; *at |= bits; return old; }
inline unsigned atomicAnd(unsigned* at, unsigned bits) { const unsigned old = *at; *at &= bits; return old; }
inline float __shfl_xor_sync(unsigned, float value, int by) {
    return __uint_as_float(host::exchange(__float_as_uint(value), (host::current % host::WARP) ^ by));
}
inline int __shfl_xor_sync(unsigned, int value, int by) {
    return (int)host::exchange((unsigned)value, (host::current % host::WARP) ^ by);
}
inline int __shfl_up_sync(unsigned, int value, int by) {
    const unsigned lane = host::current % host::WARP;
    return (int)host::exchange((unsigned)value, lane < (unsigned)by ? lane : lane - by);
}
inline float host_half(unsigned bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 1023u;
    if (exponent == 31u) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
    return std::copysign((float)fraction * 0x1p-24f, __uint_as_float(sign | 0x3f800000u));
}
