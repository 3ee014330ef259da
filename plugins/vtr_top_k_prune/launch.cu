// Queues one call on a stream, through the CUDA runtime that the library carries.
#include "launch.cuh"

#include "kernel.cu"
#include "launch.h"

namespace {

// Static shared memory and this must not exceed 48 KiB together unless a kernel asks for more.
constexpr int UNASKED_SHARED_BYTES = 32 << 10;

}  // namespace

cudaError_t vtr_queue(VtrTopKPruneParams p, VtrKernel score, cudaStream_t stream) {
    int device = 0, multiprocessors = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const auto count = cudaDevAttrMultiProcessorCount;
    if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, count, device)) return error;
    vtr_divide(p, score == VTR_SCORE_FP32 ? 4 : 2, multiprocessors);
    const void* const kernels[] = {(const void*)vtr_score_fp32, (const void*)vtr_score_fp16,
                                   (const void*)vtr_score_bf16, (const void*)vtr_prune,
                                   (const void*)vtr_text_softmax_fp32, (const void*)vtr_text_softmax_fp16,
                                   (const void*)vtr_text_softmax_bf16, (const void*)vtr_text_score_fp32,
                                   (const void*)vtr_text_score_fp16, (const void*)vtr_text_score_bf16};
    const auto start = [&](VtrKernel kernel, int x, int y, int z, int threads, int shared_bytes) -> int {
        if (shared_bytes > UNASKED_SHARED_BYTES) {
            const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
            if (const cudaError_t error = cudaFuncSetAttribute(kernels[kernel], most, shared_bytes))
                return error;
        }
        void* arguments[] = {&p};
        return cudaLaunchKernel(kernels[kernel], dim3(x, y, z), dim3(threads), arguments, shared_bytes,
                                stream);
    };
    return (cudaError_t)vtr_launch(p, score, start);
}
