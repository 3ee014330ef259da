// The C++ shell as TensorRT would use it: created from fields, asked for its workspace, enqueued.
// Its own translation unit, because it needs CUDA's headers; queue.cpp launches on the CPU.
#include "../vtr_top_k_prune/plugin.cpp"

extern "C" const char* cudaGetErrorString(cudaError_t) { return "no CUDA here"; }

namespace {

// Each shape is a count and as many numbers.
const long long* read_dims(const long long* at, Dims& dims) {
    dims.nbDims = (int32_t)*at++;
    for (int i = 0; i < dims.nbDims; ++i) dims.d[i] = *at++;
    return at;
}

IPluginV3OneRuntime* runtime_of(IPluginV3* plugin) {
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

}  // namespace

extern "C" {

// nullptr where the creator refuses.
void* shell_create(float scale, const char* query, const char* heads, const char* rank) {
    std::vector<PluginField> fields{{"scale", &scale, PluginFieldType::kFLOAT32, 1}};
    for (const auto& [name, text] : {std::pair("query", query), {"heads", heads}, {"rank", rank}})
        fields.push_back({name, text, PluginFieldType::kCHAR, (int32_t)strlen(text) + 1});
    const PluginFieldCollection collection{(int32_t)fields.size(), fields.data()};
    int32_t count = 0;
    auto* creator = static_cast<IPluginCreatorV3One*>(getCreators(count)[0]);
    return creator->createPlugin("cut", &collection, TensorRTPhase::kRUNTIME);
}

void shell_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

// ``shapes``: of the inputs, then of the outputs. Returns the bytes of a profile that ends there, or
// (with a workspace) -1 - what enqueue returns.
long long shell_call(void* made, int type, const long long* shapes, const void* const* inputs,
                     void* const* outputs, void* workspace) {
    auto* plugin = static_cast<IPluginV3*>(made);
    PluginTensorDesc tensors[INPUTS + OUTPUTS]{};
    DynamicPluginTensorDesc bounds[INPUTS + OUTPUTS]{};
    for (int i = 0; i < INPUTS + OUTPUTS; ++i) {
        shapes = read_dims(shapes, tensors[i].dims);
        tensors[i].type = (DataType)type;  // of the floats; nothing reads the others'
        bounds[i].desc = tensors[i];
        bounds[i].max = tensors[i].dims;
    }
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    if (!workspace) return (long long)build->getWorkspaceSize(bounds, INPUTS, bounds + INPUTS, OUTPUTS);
    return -1 - runtime_of(plugin)->enqueue(tensors, tensors + INPUTS, inputs, outputs, workspace, nullptr);
}
}
