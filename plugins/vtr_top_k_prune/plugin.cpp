// IPluginV3 behind vtr::VtrTopKPrune. Links nothing of TensorRT: TensorRT calls getCreators().
//
// Inputs as TensorRT hands them over: query, keys, mask, vision_index, budget, hidden. keep decides
// an output's length, is read on the host (tensorrt_plugin_shape_input_indices) and not among them.
#include <NvInferRuntime.h>

#include <cstring>
#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "launch.cuh"

#ifdef _WIN32
#define VTR_EXPORTED extern "C" __declspec(dllexport)
#else
#define VTR_EXPORTED extern "C" __attribute__((visibility("default")))
#endif

namespace {

using namespace nvinfer1;

constexpr char NAME[] = "VtrTopKPrune", VERSION[] = "1", NAMESPACE[] = "vtr";
enum Input { QUERY, KEYS, MASK, VISION_INDEX, BUDGET, HIDDEN, INPUTS };
enum Output { KEPT_HIDDEN, INDICES, KEPT_VISION_INDEX, OUTPUTS };

ILoggerFinder* finder = nullptr;

void report(const std::string& what) noexcept {
    ILogger* logger = finder ? finder->findLogger() : nullptr;
    if (logger) logger->log(ILogger::Severity::kERROR, (std::string(NAME) + ": " + what).c_str());
}

// What a node says, and what a plan holds.
struct Fields {
    float scale = 0.0f;
    std::string query, heads, rank;

    // Empty: all there and served.
    std::string refusal() const {
        if (query != "last" && query != "text") return "query '" + query + "' is neither last nor text";
        if (heads != "mean" && heads != "max") return "heads '" + heads + "' is neither mean nor max";
        if (rank != "joint" && rank != "per_image") return "rank '" + rank + "' is neither joint nor per_image";
        return {};
    }
};

std::string text_of(const PluginField& field) {
    const char* text = static_cast<const char*>(field.data);
    return std::string(text, strnlen(text, field.length));
}

Fields read(const PluginFieldCollection& collection) {
    Fields fields;
    for (int i = 0; i < collection.nbFields; ++i) {
        const PluginField& field = collection.fields[i];
        const std::string name = field.name;
        if (!field.data) continue;
        if (name == "scale" && field.type == PluginFieldType::kFLOAT32) fields.scale = *static_cast<const float*>(field.data);
        if (field.type != PluginFieldType::kCHAR) continue;
        if (name == "query") fields.query = text_of(field);
        if (name == "heads") fields.heads = text_of(field);
        if (name == "rank") fields.rank = text_of(field);
    }
    return fields;
}

// ``d`` gives a tensor's dimensions: those of a call, or the largest of a profile.
template <class Tensor, class DimsOf>
VtrTopKPruneParams sizes(const Fields& fields, const Tensor* in, const Tensor* out, DimsOf d) {
    VtrTopKPruneParams p{};
    p.text = fields.query == "text";
    const Dims query = d(in[QUERY]), keys = d(in[KEYS]), hidden = d(in[HIDDEN]);
    p.batch = (int)query.d[0];
    p.heads = (int)query.d[1];
    p.query_rows = (int)query.d[2];
    p.head_dim = (int)query.d[3];
    p.kv_heads = (int)keys.d[1];
    p.total = (int)keys.d[2];
    p.mask_rows = (int)d(in[MASK]).d[2];
    p.vision = (int)d(in[VISION_INDEX]).d[1];
    p.length = (int)hidden.d[1];
    p.keep = (int)d(out[KEPT_VISION_INDEX]).d[1];
    return p;
}

int32_t check_width(int64_t head_dim) {
    if (head_dim <= VTR_MAX_HEAD_DIM) return 0;
    report("heads are wider than " + std::to_string(VTR_MAX_HEAD_DIM) + ": build with --plugin off");
    return -1;
}

// What CUDA said, and what it may have meant.
std::string refusal(const VtrTopKPruneParams& p, cudaError_t error) {
    const std::string said = cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice) return said + ": vtr build-plugin for this GPU's compute capability";
    return said + ": " + std::to_string(p.length) + " columns take " + std::to_string(vtr_shared_bytes(p)) +
           " bytes of shared memory";
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit Plugin(Fields fields) : fields_(std::move(fields)) {
        written_ = {{"scale", &fields_.scale, PluginFieldType::kFLOAT32, 1}};
        for (const auto& [name, text] : {std::pair("query", &fields_.query), {"heads", &fields_.heads}, {"rank", &fields_.rank}})
            written_.push_back({name, text->c_str(), PluginFieldType::kCHAR, (int32_t)text->size() + 1});
        collection_ = {(int32_t)written_.size(), written_.data()};
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(fields_); }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    AsciiChar const* getPluginName() const noexcept override { return NAME; }
    AsciiChar const* getPluginVersion() const noexcept override { return VERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return NAMESPACE; }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

    // ---- build ----

    int32_t getNbOutputs() const noexcept override { return OUTPUTS; }

    int32_t getOutputDataTypes(DataType* out, int32_t, DataType const* in, int32_t) const noexcept override {
        out[KEPT_HIDDEN] = in[HIDDEN];
        out[INDICES] = out[KEPT_VISION_INDEX] = DataType::kINT64;
        return 0;
    }

    // [B, S - V + keep, D], [B, S - V + keep] and [B, keep]
    int32_t getOutputShapes(DimsExprs const* in, int32_t, DimsExprs const* shapes, int32_t count, DimsExprs* out,
                            int32_t, IExprBuilder& math) noexcept override {
        if (count != 1 || shapes[0].nbDims != 1) {
            report("keep is not a shape input: the node lacks tensorrt_plugin_shape_input_indices = [4]");
            return -1;
        }
        const IDimensionExpr *batch = in[HIDDEN].d[0], *keep = shapes[0].d[0];
        const auto* text = math.operation(DimensionOperation::kSUB, *in[HIDDEN].d[1], *in[VISION_INDEX].d[1]);
        const auto* kept = math.operation(DimensionOperation::kSUM, *text, *keep);
        out[KEPT_HIDDEN] = {3, {batch, kept, in[HIDDEN].d[2]}};
        out[INDICES] = {2, {batch, kept}};
        out[KEPT_VISION_INDEX] = {2, {batch, keep}};
        return 0;
    }

    // Linear; query, keys and both hidden states in one of three types.
    bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                   int32_t) noexcept override {
        const PluginTensorDesc& one = tensors[at].desc;
        if (one.format != TensorFormat::kLINEAR) return false;
        if (at == MASK) return one.type == DataType::kBOOL;
        const bool floats = at == QUERY || at == KEYS || at == HIDDEN || at == inputs + KEPT_HIDDEN;
        if (!floats) return one.type == DataType::kINT64;
        const DataType type = tensors[QUERY].desc.type;
        return one.type == type && (type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return check_width(in[QUERY].max.d[3]);
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const* out,
                            int32_t) const noexcept override {
        const auto p = sizes(fields_, in, out, [](const DynamicPluginTensorDesc& tensor) { return tensor.max; });
        return (size_t)vtr_workspace_bytes(p);
    }

    // ---- run ----

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        return check_width(in[QUERY].dims.d[3]);
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        auto p = sizes(fields_, in, out, [](const PluginTensorDesc& tensor) { return tensor.dims; });
        const DataType type = in[QUERY].type;
        const VtrKernel score = type == DataType::kFLOAT  ? VTR_SCORE_FP32
                                : type == DataType::kHALF ? VTR_SCORE_FP16
                                                          : VTR_SCORE_BF16;
        p.query = inputs[QUERY];
        p.keys = inputs[KEYS];
        p.mask = static_cast<const unsigned char*>(inputs[MASK]);
        p.vision_index = static_cast<const long long*>(inputs[VISION_INDEX]);
        p.budget = static_cast<const long long*>(inputs[BUDGET]);
        p.hidden = inputs[HIDDEN];
        p.kept_hidden = outputs[KEPT_HIDDEN];
        p.indices = static_cast<long long*>(outputs[INDICES]);
        p.kept_vision_index = static_cast<long long*>(outputs[KEPT_VISION_INDEX]);
        p.workspace = static_cast<unsigned char*>(workspace);
        p.row_bytes = (int)in[HIDDEN].dims.d[2] * (score == VTR_SCORE_FP32 ? 4 : 2);
        p.scale = fields_.scale;
        p.max_heads = fields_.heads == "max";
        p.per_image = fields_.rank == "per_image";
        const cudaError_t error = vtr_queue(p, score, stream);
        if (error != cudaSuccess) report(refusal(p, error));
        return error;
    }

private:
    Fields fields_;
    std::vector<PluginField> written_;
    PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* collection, TensorRTPhase) noexcept override {
        const Fields fields = read(*collection);
        const std::string refusal = fields.refusal();
        if (refusal.empty()) return new (std::nothrow) Plugin(fields);
        report(refusal);
        return nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override {
        static const PluginField fields[] = {{"scale", nullptr, PluginFieldType::kFLOAT32, 1},
                                             {"query", nullptr, PluginFieldType::kCHAR, 0},
                                             {"heads", nullptr, PluginFieldType::kCHAR, 0},
                                             {"rank", nullptr, PluginFieldType::kCHAR, 0}};
        static const PluginFieldCollection collection{(int32_t)std::size(fields), fields};
        return &collection;
    }
    AsciiChar const* getPluginName() const noexcept override { return NAME; }
    AsciiChar const* getPluginVersion() const noexcept override { return VERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return NAMESPACE; }
};

}  // namespace

VTR_EXPORTED IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static Creator creator;
    static IPluginCreatorInterface* const creators[] = {&creator};
    count = (int32_t)std::size(creators);
    return creators;
}

VTR_EXPORTED void setLoggerFinder(ILoggerFinder* given) { finder = given; }
