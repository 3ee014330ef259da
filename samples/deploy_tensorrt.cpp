// Ask TensorRT engines about an image: the decoder loop of deploy_tensorrt.py, in C++.
//
//   deploy_tensorrt ENGINE pixels.bin ids.bin IMAGE_TOKEN EOS [MAX_TOKENS] [PLUGIN.so]
//
// ENGINE      the folder that `vtr build` published. Opening a plan runs code of it: check the
//             folder first, with `vtr verify ENGINE --files` or as deploy_tensorrt.py does.
// pixels.bin  pixel_values [1,3,H,W] in the type the vision encoder takes (fp16, or bf16).
// ids.bin     the prompt's token ids, int64, with one IMAGE_TOKEN for each image feature.
//
// The answer's ids go to stdout; numpy's `tofile` writes both files. One row, one image, keeps that
// are frozen. It knows nothing of cuts: every present* output becomes the next past* input.
//   g++ -std=c++17 -O2 -I$TENSORRT/include -I$CUDA/include deploy_tensorrt.cpp
//       -L$TENSORRT/lib -lnvinfer -L$CUDA/lib64 -lcudart -o deploy_tensorrt
// For engines of TensorRT-RTX link -ltensorrt_rtx in place of -lnvinfer. Compiled against the
// public headers of TensorRT 11.1 and CUDA 13.0, run on a stand-in for both; on no GPU yet.
#include <NvInfer.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Bytes = std::vector<char>;
using Ids = std::vector<int64_t>;
using nvinfer1::DataType, nvinfer1::Dims;

constexpr size_t CONTEXT = 0, GENERATION = 1;  // profiles: a prompt; one token after another

void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::runtime_error(otherwise);
}

void check(cudaError_t error, const std::string& what) {
    require(error == cudaSuccess, what + ": " + cudaGetErrorString(error));
}

Bytes read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    require(file.good(), path + " cannot be read");
    return {std::istreambuf_iterator<char>(file), {}};
}

size_t size_of(DataType type) {
    switch (type) {
        case DataType::kINT64: return 8;
        case DataType::kFLOAT: return 4;
        case DataType::kHALF: return 2;
        case DataType::kBF16: return 2;
        default: throw std::runtime_error("a tensor has a type this sample does not know");
    }
}

size_t volume(const Dims& dims) {
    size_t count = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        require(dims.d[i] >= 0, "a shape cannot be told before the engine runs");
        count *= static_cast<size_t>(dims.d[i]);
    }
    return count;
}

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kERROR) std::cerr << message << '\n';
    }
};

// Device memory that grows and never shrinks.
class Memory {
public:
    Memory() = default;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { cudaFree(data_); }

    void* reserve(size_t bytes) {
        if (data_ && bytes <= bytes_) return data_;
        check(cudaFree(data_), "cudaFree");  // waits for what still reads it
        data_ = nullptr;
        bytes_ = std::max<size_t>(256, bytes + bytes / 4);
        check(cudaMalloc(&data_, bytes_), "cudaMalloc");
        return data_;
    }

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

// On the host when fed, on the device when made: as the cache is between two calls.
struct Tensor {
    const void* data;
    Dims dims;
};
using Tensors = std::map<std::string, Tensor>;

Tensor row(const Ids& ids) { return {ids.data(), {2, {1, static_cast<int64_t>(ids.size())}}}; }

// A plan: its weights once, and one execution context for each profile.
class Engine {
public:
    Engine(nvinfer1::IRuntime& runtime, const std::string& path, cudaStream_t stream)
        : stream_(stream) {
        const Bytes plan = read(path);
        engine_.reset(runtime.deserializeCudaEngine(plan.data(), plan.size()));
        require(engine_ != nullptr, "TensorRT does not take " + path);
        for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            require(engine_->getTensorLocation(name) == nvinfer1::TensorLocation::kDEVICE,
                    "the engine is tunable: deploy_tensorrt.py runs it");
            const bool is_input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
            (is_input ? inputs : outputs).push_back(name);
        }
        for (int32_t i = 0; i < engine_->getNbOptimizationProfiles(); ++i) {
            contexts_.emplace_back(engine_->createExecutionContext());
            auto& context = contexts_.back();
            require(context && context->setOptimizationProfileAsync(i, stream),
                    path + " gives no context for a profile");
        }
    }

    Dims shape(const std::string& name) const { return engine_->getTensorShape(name.c_str()); }

    size_t bytes(const std::string& name, const Dims& dims) const {
        return volume(dims) * size_of(engine_->getTensorDataType(name.c_str()));
    }

    // Run once: `wanted` goes to `result`; where all outputs lie comes back.
    Tensors run(size_t profile, const Tensors& fed, const Tensors& cache, const std::string& wanted,
                Bytes& result) {
        auto& context = *contexts_.at(profile);
        turn_ = 1 - turn_;  // two memories a name: no output lies on an input
        for (const auto& name : inputs) {
            const Tensor tensor = cache.count(name) ? cache.at(name) : upload(name, fed.at(name));
            require(context.setInputShape(name.c_str(), tensor.dims),
                    name + " is outside of the engine's profile");
            require(context.setInputTensorAddress(name.c_str(), tensor.data), name);
        }
        Tensors made;
        for (const auto& name : outputs) {
            const Dims dims = context.getTensorShape(name.c_str());
            void* data = memory_[{name, turn_}].reserve(bytes(name, dims));
            require(context.setTensorAddress(name.c_str(), data), name);
            made[name] = {data, dims};
        }
        require(context.enqueueV3(stream_), "TensorRT does not run the engine");
        result.resize(bytes(wanted, made.at(wanted).dims));
        copy(result.data(), made.at(wanted).data, result.size(), cudaMemcpyDeviceToHost);
        check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
        return made;
    }

    std::vector<std::string> inputs, outputs;

private:
    Tensor upload(const std::string& name, const Tensor& host) {
        void* data = memory_[{name, turn_}].reserve(bytes(name, host.dims));
        copy(data, host.data, bytes(name, host.dims), cudaMemcpyHostToDevice);
        return {data, host.dims};
    }

    void copy(void* to, const void* from, size_t size, cudaMemcpyKind way) {
        if (size) check(cudaMemcpyAsync(to, from, size, way, stream_), "cudaMemcpyAsync");
    }

    cudaStream_t stream_;
    int turn_ = 0;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // go before the engine
    std::map<std::pair<std::string, int>, Memory> memory_;
};

// Rows of embed_tokens.npy: they lie behind a header that says how long it is.
struct Table {
    Bytes file;
    size_t row_bytes;

    const char* row(int64_t id) const {
        uint16_t header = 0;
        std::memcpy(&header, &file.at(8), sizeof header);
        const size_t at = 10u + header + static_cast<size_t>(id) * row_bytes;
        require(id >= 0 && at + row_bytes <= file.size(), "a token the model does not know");
        return &file[at];
    }
};

// The input an output becomes (present.0.key: past_key_values.0.key); empty for none.
std::string past(const std::string& output) {
    if (output.rfind("present.", 0) == 0) return "past_key_values." + output.substr(8);
    if (output.rfind("present_", 0) == 0) return "past_" + output.substr(8);
    return "";
}

Bytes encode(Engine& vision, const Bytes& pixels) {
    Dims image = vision.shape("pixel_values");
    image.d[0] = 1;
    require(pixels.size() == vision.bytes("pixel_values", image), "pixels.bin has another size");
    Bytes features;
    vision.run(0, {{"pixel_values", {pixels.data(), image}}}, {}, vision.outputs.at(0), features);
    return features;
}

// The prompt's embeddings, image features in their places; `where` these are.
Bytes embed(const Table& table, const Ids& ids, int64_t image_token, const Bytes& features,
            Ids& where) {
    Bytes embeds;
    for (size_t i = 0; i < ids.size(); ++i) {
        const size_t at = where.size() * table.row_bytes;
        const bool image = ids[i] == image_token;
        require(!image || at + table.row_bytes <= features.size(), "too many image tokens");
        const char* row = image ? &features[at] : table.row(ids[i]);
        embeds.insert(embeds.end(), row, row + table.row_bytes);
        if (image) where.push_back(static_cast<int64_t>(i));
    }
    require(where.size() * table.row_bytes == features.size(), "too few image tokens");
    return embeds;
}

Ids answer(Engine& decoder, const Table& table, Bytes embeds, Ids where, int64_t eos,
           size_t limit) {
    Tensors feeds, cache;
    for (const auto& name : decoder.inputs) {  // an empty cache: what grows is zero
        Dims dims = decoder.shape(name);
        std::replace_if(dims.d, dims.d + dims.nbDims, [](int64_t size) { return size < 0; }, 0);
        dims.d[0] = 1;
        feeds[name] = {nullptr, dims};
    }
    Dims hidden = feeds.at("inputs_embeds").dims;
    Ids mask(embeds.size() / table.row_bytes, 1), positions(mask.size()), said;
    std::iota(positions.begin(), positions.end(), 0);
    Bytes logits;
    for (size_t profile = CONTEXT; said.size() < limit; profile = GENERATION) {
        hidden.d[1] = static_cast<int64_t>(positions.size());
        feeds["inputs_embeds"] = {embeds.data(), hidden};
        feeds["position_ids"] = row(positions);
        feeds["attention_mask"] = row(mask);
        feeds["vision_index"] = row(where);
        const Tensors made = decoder.run(profile, feeds, cache, "logits", logits);
        cache.clear();
        for (const auto& [name, tensor] : made)
            if (!past(name).empty()) cache[past(name)] = tensor;
        std::vector<float> scores(logits.size() / sizeof(float));  // fp32 in every engine
        std::memcpy(scores.data(), logits.data(), logits.size());
        const int64_t token = std::max_element(scores.begin(), scores.end()) - scores.begin();
        if (token == eos) break;
        said.push_back(token);
        embeds.assign(table.row(token), table.row(token) + table.row_bytes);
        positions.assign(1, static_cast<int64_t>(mask.size()));
        mask.push_back(1);
        where.clear();
    }
    return said;
}

void run(const std::vector<std::string>& given) {
    require(given.size() >= 5, "ENGINE pixels.bin ids.bin IMAGE_TOKEN EOS [MAX_TOKENS] [PLUGIN]");
    const bool compacts = std::ifstream(given[0] + "/compact_cache.plan").good();
    require(!compacts, "this schedule narrows the cache: deploy_tensorrt.py does that");
    const Bytes pixels = read(given[1]), raw = read(given[2]);
    Ids ids(raw.size() / sizeof(int64_t)), where;
    std::memcpy(ids.data(), raw.data(), ids.size() * sizeof(int64_t));
    Logger logger;
    const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    require(runtime != nullptr, "TensorRT does not start: is there an NVIDIA driver?");
    auto& plugins = runtime->getPluginRegistry();
    require(given.size() < 7 || plugins.loadLibrary(given[6].c_str()), "the plugin does not load");
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream), "no CUDA stream");
    Engine vision(*runtime, given[0] + "/vision_encoder.plan", stream);
    Engine decoder(*runtime, given[0] + "/decoder.plan", stream);
    const Dims one{3, {1, 1, decoder.shape("inputs_embeds").d[2]}};
    const Table table{read(given[0] + "/embed_tokens.npy"), decoder.bytes("inputs_embeds", one)};
    const Bytes embeds = embed(table, ids, std::stoll(given[3]), encode(vision, pixels), where);
    const size_t limit = given.size() > 5 ? std::stoul(given[5]) : 128;
    const Ids said = answer(decoder, table, embeds, where, std::stoll(given[4]), limit);
    std::copy(said.begin(), said.end(), std::ostream_iterator<int64_t>(std::cout, " "));
    std::cout << '\n';
}

}  // namespace

int main(int argc, char** argv) {
    try {
        run({argv + 1, argv + argc});
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
