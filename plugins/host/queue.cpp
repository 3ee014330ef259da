// What launch.cu does with a GPU, on the CPU; the launches of the last call are kept for a test.
#include "vtr_top_k_prune.cpp"

struct CUstream_st;

namespace {

constexpr int MULTIPROCESSORS = 9;
std::vector<int> launches;  // kernel, grid x, y, z

}  // namespace

int vtr_queue(VtrTopKPruneParams p, VtrKernel score, CUstream_st*) {
    launches.clear();
    vtr_divide(p, score == VTR_SCORE_FP32 ? 4 : 2, MULTIPROCESSORS);
    return vtr_launch(p, score, [&](VtrKernel kernel, int x, int y, int z, int threads, int shared) {
        launches.insert(launches.end(), {(int)kernel, x, y, z});
        start(kernel, p, {(unsigned)x, (unsigned)y, (unsigned)z}, threads, shared);
        return 0;
    });
}

extern "C" int shell_launches(const int** all) {
    *all = launches.data();
    return (int)launches.size() / 4;
}
