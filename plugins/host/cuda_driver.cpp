// As much of a CUDA driver as vtr_export/backends/tensorrt/kernel.py asks for, on a CPU: built as
// libcuda.so.1 it lets cuda-python launch the kernels' host build. A module must be machine code.
#include <cstdint>
#include <cstring>

#include "vtr_top_k_prune.cpp"

namespace {

constexpr int OK = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500;
constexpr int MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, SHARED_OPTIN = 97;  // of a device
constexpr int STATIC_SHARED = 1, DYNAMIC_SHARED = 8;                            // of a function
constexpr int STATIC_SHARED_BYTES = 9504, MOST_SHARED_BYTES = 99 << 10;
const char* const NAMES[] = {"vtr_score_fp32", "vtr_score_fp16", "vtr_score_bf16", "vtr_prune",
                             "vtr_text_softmax_fp32", "vtr_text_softmax_fp16", "vtr_text_softmax_bf16",
                             "vtr_text_score_fp32", "vtr_text_score_fp16", "vtr_text_score_bf16"};
int context, allowed_shared_bytes = 48 << 10;

}  // namespace

extern "C" {

int cuInit(unsigned) { return OK; }
int cuDriverGetVersion(int* version) { *version = 13000; return OK; }
int cuCtxGetCurrent(void** current) { *current = &context; return OK; }
int cuCtxGetDevice(int* device) { *device = 0; return OK; }

int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case MULTIPROCESSORS: *value = 9; return OK;
        case MAJOR: *value = 8; return OK;
        case MINOR: *value = 6; return OK;
        case SHARED_OPTIN: *value = MOST_SHARED_BYTES; return OK;
    }
    return INVALID_VALUE;
}

int cuModuleLoadData(void** module, const void* image) {
    *module = &context;
    return std::memcmp(image, "\x7f" "ELF", 4) ? INVALID_IMAGE : OK;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
    for (const char* const& known : NAMES) {
        if (std::strcmp(known, name)) continue;
        *function = const_cast<const char**>(&known);
        return OK;
    }
    return NOT_FOUND;
}

int cuFuncGetAttribute(int* value, int attribute, void*) {
    *value = STATIC_SHARED_BYTES;
    return attribute == STATIC_SHARED ? OK : INVALID_VALUE;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != DYNAMIC_SHARED || function != &NAMES[VTR_PRUNE]) return INVALID_VALUE;
    if (value + STATIC_SHARED_BYTES > MOST_SHARED_BYTES) return INVALID_VALUE;
    allowed_shared_bytes = value;
    return OK;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
                   unsigned tz, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
    if (ty != 1 || tz != 1 || extra || !stream) return INVALID_VALUE;
    if ((int)shared_bytes > allowed_shared_bytes) return INVALID_VALUE;
    const int kernel = (int)(static_cast<const char* const*>(function) - NAMES);
    const unsigned grid[] = {x, y, z};
    host_start(kernel, static_cast<const Params*>(parameters[0]), grid, threads, shared_bytes);
    return OK;
}

int cuGetProcAddress_v2(const char* name, void** found, int, uint64_t, int* status) {
    const struct { const char* name; void* function; } known[] = {
        {"cuInit", (void*)cuInit},
        {"cuDriverGetVersion", (void*)cuDriverGetVersion},
        {"cuCtxGetCurrent", (void*)cuCtxGetCurrent},
        {"cuCtxGetDevice", (void*)cuCtxGetDevice},
        {"cuDeviceGetAttribute", (void*)cuDeviceGetAttribute},
        {"cuModuleLoadData", (void*)cuModuleLoadData},
        {"cuModuleGetFunction", (void*)cuModuleGetFunction},
        {"cuFuncGetAttribute", (void*)cuFuncGetAttribute},
        {"cuFuncSetAttribute", (void*)cuFuncSetAttribute},
        {"cuLaunchKernel", (void*)cuLaunchKernel},
        {"cuGetProcAddress", (void*)cuGetProcAddress_v2},
    };
    *found = nullptr;
    for (const auto& each : known)
        if (!std::strcmp(each.name, name)) *found = each.function;
    if (status) *status = *found ? 0 : 1;
    return *found ? OK : NOT_FOUND;
}
}
