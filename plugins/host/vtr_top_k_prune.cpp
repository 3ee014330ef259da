// vtr_top_k_prune on a CPU: its kernels for a test to launch, and what params.h says of a call.
#include "cuda_on_host.h"

#include "../vtr_top_k_prune/kernel.cu"
#include "../vtr_top_k_prune/launch.h"

namespace {

void start(VtrKernel kernel, const Params& p, dim3 grid, unsigned threads, size_t shared_bytes) {
    static void (*const kernels[])(Params) = {vtr_score_fp32, vtr_score_fp16, vtr_score_bf16, vtr_prune,
                                            vtr_text_softmax_fp32, vtr_text_softmax_fp16,
                                            vtr_text_softmax_bf16, vtr_text_score_fp32,
                                            vtr_text_score_fp16, vtr_text_score_bf16};
    if (threads == VTR_PRUNE_BLOCK) threads = VTR_PRUNE_THREADS;  // a build may have smaller blocks
    if (threads == VTR_SCORE_BLOCK) threads = VTR_SCORE_THREADS;
    host::launch(kernels[kernel], p, grid, threads, shared_bytes);
}

}  // namespace

extern "C" {

void host_order(int is_reversed) { host::is_reversed = is_reversed; }

void host_start(int kernel, const Params* p, const unsigned* grid, unsigned threads, size_t shared_bytes) {
    start((VtrKernel)kernel, *p, {grid[0], grid[1], grid[2]}, threads, shared_bytes);
}

// A whole call as the library launches it.
void host_call(Params* p, int dtype, int element_bytes, int multiprocessors) {
    vtr_divide(*p, element_bytes, multiprocessors);
    vtr_launch(*p, (VtrKernel)dtype, [&](VtrKernel kernel, int x, int y, int z, int threads, int shared) {
        start(kernel, *p, {(unsigned)x, (unsigned)y, (unsigned)z}, threads, shared);
        return 0;
    });
}

void host_divide(Params* p, int element_bytes, int multiprocessors) { vtr_divide(*p, element_bytes, multiprocessors); }
long long host_workspace_bytes(const Params* p) { return vtr_workspace_bytes(*p); }
long long host_shared_bytes(const Params* p) { return vtr_shared_bytes(*p); }

}
