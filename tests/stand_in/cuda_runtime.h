// As much of CUDA's runtime as samples/deploy_tensorrt.cpp uses, in host memory. Nothing enqueued
// happens before the stream is synchronised; what is freed is spoilt first.
#pragma once
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <utility>
#include <vector>

enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
using cudaStream_t = int*;

namespace stand_in {
inline std::map<char*, size_t> memory;
inline std::vector<std::function<void()>> queue;
inline int a_stream;

inline void synchronize() {
    const auto steps = std::exchange(queue, {});
    for (const auto& step : steps) step();
}

// It lies in memory that is allocated, and begins where TensorRT wants it to.
inline void check(const void* data, size_t size) {
    const auto* place = static_cast<const char*>(data);
    for (const auto& [start, length] : memory)
        if (start <= place && place + size <= start + length) return;
    assert(!"outside of all memory");
}
}  // namespace stand_in

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    *stream = &stand_in::a_stream;
    return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    assert(stream == &stand_in::a_stream);
    stand_in::synchronize();
    return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** data, size_t size) {
    *data = std::aligned_alloc(256, (size + 255) / 256 * 256);
    std::memset(*data, 0xFF, size);
    stand_in::memory[static_cast<char*>(*data)] = size;
    return cudaSuccess;
}

inline cudaError_t cudaFree(void* data) {
    if (!data) return cudaSuccess;
    stand_in::synchronize();
    const auto found = stand_in::memory.find(static_cast<char*>(data));
    assert(found != stand_in::memory.end());
    std::memset(data, 0xFF, found->second);
    stand_in::memory.erase(found);
    std::free(data);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind way,
                                   cudaStream_t stream) {
    assert(stream == &stand_in::a_stream);
    stand_in::check(way == cudaMemcpyHostToDevice ? to : from, size);
    stand_in::queue.push_back([=] { std::memcpy(to, from, size); });
    return cudaSuccess;
}
