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
// those of this folder, no type of TensorRT: compiled by nvcc, by NVRTC and, behind
// host/cuda_on_host.h, by g++.
#include "prune.cuh"
#include "score.cuh"
#include "text.cuh"

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
