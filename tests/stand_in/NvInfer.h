// As much of TensorRT as samples/deploy_tensorrt.cpp uses, with two toy engines for plans: "vision"
// and "decoder". The decoder has one cut that keeps one vision token; its logits count all that a
// right client hands over: embeddings, cache, masks, positions, indices, and the profile it chose.
// tests/test_deploy_samples.py counts the same in numpy.
#pragma once
#include <algorithm>
#include <cassert>
#include <cstdint>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace nvinfer1 {

enum class DataType { kFLOAT, kHALF, kBF16, kINT64 };
enum class TensorIOMode { kINPUT, kOUTPUT };
enum class TensorLocation { kDEVICE, kHOST };
struct Dims {
    int32_t nbDims;
    int64_t d[8];
};

class ILogger {
public:
    enum class Severity { kINTERNAL_ERROR, kERROR, kWARNING };
    virtual void log(Severity, const char*) noexcept = 0;
};

constexpr int64_t WIDTH = 4, VOCAB = 97, FEATURES = 3;

struct Port {
    const char* name;
    DataType type;
    TensorIOMode mode;
    Dims dims;
};
using Ports = std::vector<Port>;

class IExecutionContext {
public:
    IExecutionContext(const Ports& ports, bool decodes) : ports_(ports), decodes_(decodes) {}

    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t) {
        profile_ = profile;
        return true;
    }

    bool setInputShape(const char* name, const Dims& dims) {
        const std::string given = name;
        if (decodes_ && profile_ == 1 && given == "inputs_embeds" && dims.d[1] != 1) return false;
        if (decodes_ && profile_ == 1 && given == "vision_index" && dims.d[1] != 0) return false;
        if (decodes_ && profile_ == 1 && given == "past_mask.0" && dims.d[1] == 0) return false;
        shapes_[given] = dims;
        return true;
    }

    bool setInputTensorAddress(const char* name, const void* data) {
        return setTensorAddress(name, const_cast<void*>(data));
    }

    bool setTensorAddress(const char* name, void* data) {
        addresses_[name] = data;
        return data != nullptr;
    }

    Dims getTensorShape(const char* name) const {
        const std::string asked = name;
        if (asked == "image_features") return {3, {1, FEATURES, WIDTH}};
        if (asked == "logits") return {3, {1, 1, VOCAB}};
        if (asked == "kept.0") return {2, {1, left()}};
        if (asked == "present_mask.0") return {2, {1, size("past_mask.0", 1) + left()}};
        return {4, {1, 1, size("past_key_values.0.key", 2) + size("inputs_embeds", 1), WIDTH}};
    }

    bool enqueueV3(cudaStream_t) {
        for (const auto& port : ports_) {
            const bool in = port.mode == TensorIOMode::kINPUT;
            const Dims dims = in ? shapes_.at(port.name) : getTensorShape(port.name);
            int64_t count = port.type == DataType::kINT64 ? 8 : 4;
            for (int i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
            stand_in::check(addresses_.at(port.name), static_cast<size_t>(count));
            for (const auto& other : ports_)
                assert(&other == &port || addresses_.at(other.name) != addresses_.at(port.name));
        }
        stand_in::queue.push_back([copy = *this] { copy.decodes_ ? copy.decode() : copy.see(); });
        return true;
    }

private:
    int64_t size(const char* name, int axis) const { return shapes_.at(name).d[axis]; }

    int64_t left() const {
        const int64_t vision = size("vision_index", 1);
        return size("inputs_embeds", 1) - vision + std::min<int64_t>(1, vision);
    }

    template <typename T> T* at(const char* name) const {
        return static_cast<T*>(addresses_.at(name));
    }

    double sum(const char* name, int64_t count) const {
        return double(std::accumulate(at<int64_t>(name), at<int64_t>(name) + count, int64_t{0}));
    }

    void see() const {
        for (int64_t i = 0; i < FEATURES * WIDTH; ++i)
            at<float>("image_features")[i] = at<float>("pixel_values")[i];
    }

    void decode() const {
        const int64_t past = size("past_key_values.0.key", 2), fed = size("inputs_embeds", 1);
        auto* present = at<float>("present.0.key");
        std::copy_n(at<float>("past_key_values.0.key"), past * WIDTH, present);
        std::copy_n(at<float>("inputs_embeds"), fed * WIDTH, present + past * WIDTH);
        const int64_t gone = size("past_mask.0", 1);
        std::copy_n(at<int64_t>("past_mask.0"), gone, at<int64_t>("present_mask.0"));
        std::fill_n(at<int64_t>("present_mask.0") + gone, left(), 1);
        double count = 0;
        for (int64_t i = 0; i < (past + fed) * WIDTH; ++i) count += present[i] * double(i % 7 + 1);
        count += 3.0 * sum("present_mask.0", gone + left());
        count += 5.0 * sum("attention_mask", size("attention_mask", 1));
        count += 11.0 * sum("position_ids", fed);
        count += 13.0 * sum("vision_index", size("vision_index", 1)) + 17.0 * profile_;
        for (int64_t v = 0; v < VOCAB; ++v)
            at<float>("logits")[v] = v == static_cast<int64_t>(count) % VOCAB ? 1.0f : 0.0f;
    }

    Ports ports_;
    bool decodes_;
    int32_t profile_ = 0;
    std::map<std::string, Dims> shapes_;
    std::map<std::string, void*> addresses_;
};

class ICudaEngine {
public:
    explicit ICudaEngine(bool decodes) : decodes_(decodes) {
        constexpr auto IN = TensorIOMode::kINPUT, OUT = TensorIOMode::kOUTPUT;
        constexpr auto REAL = DataType::kFLOAT, WHOLE = DataType::kINT64;
        if (!decodes) {
            ports_ = {{"pixel_values", REAL, IN, {4, {-1, 3, 2, 2}}},
                      {"image_features", REAL, OUT, {3, {-1, FEATURES, WIDTH}}}};
            return;
        }
        ports_ = {{"inputs_embeds", REAL, IN, {3, {-1, -1, WIDTH}}},
                  {"attention_mask", WHOLE, IN, {2, {-1, -1}}},
                  {"position_ids", WHOLE, IN, {2, {-1, -1}}},
                  {"past_key_values.0.key", REAL, IN, {4, {-1, 1, -1, WIDTH}}},
                  {"vision_index", WHOLE, IN, {2, {-1, -1}}},
                  {"past_mask.0", WHOLE, IN, {2, {-1, -1}}},
                  {"logits", REAL, OUT, {3, {-1, 1, VOCAB}}},
                  {"present.0.key", REAL, OUT, {4, {-1, 1, -1, WIDTH}}},
                  {"present_mask.0", WHOLE, OUT, {2, {-1, -1}}},
                  {"kept.0", WHOLE, OUT, {2, {-1, -1}}}};
    }

    int32_t getNbIOTensors() const { return static_cast<int32_t>(ports_.size()); }
    const char* getIOTensorName(int32_t i) const { return ports_.at(i).name; }
    TensorLocation getTensorLocation(const char*) const { return TensorLocation::kDEVICE; }
    TensorIOMode getTensorIOMode(const char* name) const { return find(name).mode; }
    DataType getTensorDataType(const char* name) const { return find(name).type; }
    Dims getTensorShape(const char* name) const { return find(name).dims; }
    int32_t getNbOptimizationProfiles() const { return decodes_ ? 2 : 1; }
    IExecutionContext* createExecutionContext() { return new IExecutionContext(ports_, decodes_); }

private:
    const Port& find(const std::string& name) const {
        const auto is_it = [&](const Port& port) { return port.name == name; };
        return *std::find_if(ports_.begin(), ports_.end(), is_it);
    }

    bool decodes_;
    Ports ports_;
};

struct IPluginRegistry {
    void* loadLibrary(const char*) { return nullptr; }
};

class IRuntime {
public:
    IPluginRegistry& getPluginRegistry() { return registry_; }

    ICudaEngine* deserializeCudaEngine(const void* plan, size_t size) {
        const std::string word(static_cast<const char*>(plan), size);
        return word == "vision" || word == "decoder" ? new ICudaEngine(word == "decoder") : nullptr;
    }

private:
    IPluginRegistry registry_;
};

inline IRuntime* createInferRuntime(ILogger&) { return new IRuntime; }

}  // namespace nvinfer1
