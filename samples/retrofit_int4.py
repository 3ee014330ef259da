"""An int4 decoder of another builder, cut by us, its answers checked.

python samples/retrofit_int4.py --out OUT

mobius-onnx builds the decoder of samples/digits/model with GroupQueryAttention, ONNX Runtime's own
tool makes its weights int4, `vtr export --onnx` puts the searched cuts in; then the 128 held-out
questions of samples/digits are asked of both.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import mobius
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtr_export.reference import embed
from vtr_export.retrofit.cut import Request
from vtr_export.retrofit.retrofit import retrofit

DIGITS = Path(__file__).parent / "digits"
SCHEDULE = DIGITS / "gsearch.yaml"
IMAGE_TOKENS, LONGEST_ANSWER = 144, 4


def build(model: LlavaForConditionalGeneration, file: Path) -> Path:
    """The decoder alone, fp32, for ONNX Runtime on a CPU."""
    config = mobius.ArchitectureConfig.from_transformers(model.config.text_config, model.config)
    module = mobius.registry.get("llava")(config)
    package = mobius.build_from_module(
        module, config, task="vision-language", execution_provider="cpu"
    )
    weights = {"decoder.lm_head.weight": model.lm_head.weight}
    for name, weight in model.model.language_model.state_dict().items():
        weights[f"decoder.model.{name}"] = weight
    mobius.apply_weights(package["decoder"], weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    ir.save(package["decoder"], file, external_data=f"{file.name}.data")
    return file


def quantise(given: Path, file: Path) -> Path:
    """Blocks of 32 weights, 4 bits each."""
    settings = nbits.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True)
    quantiser = nbits.MatMulNBitsQuantizer(str(given), algo_config=settings)
    quantiser.process()
    file.parent.mkdir(parents=True, exist_ok=True)
    quantiser.model.save_model_to_file(str(file), use_external_data_format=True)
    return file


class Decoder:
    """A graph, asked greedily; every present is the next past."""

    def __init__(self, file: Path) -> None:
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.outputs = [value.name for value in self.session.get_outputs()]

    def answer(self, model: LlavaForConditionalGeneration, inputs: dict, eos: int) -> list[int]:
        """Token ids, the end left out."""
        embeds, vision = embed(
            model, inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
        )
        cache, tokens, past = {}, [], 0
        while len(tokens) < LONGEST_ANSWER:
            new = embeds.shape[1]
            feeds = {
                "inputs_embeds": embeds.numpy(),
                "attention_mask": np.ones((1, past + new), np.int64),
                "position_ids": np.arange(past, past + new)[None],
                "vision_index": vision.numpy() if not past else np.zeros((1, 0), np.int64),
            }
            found = self.run(feeds, cache)
            past, token = past + new, int(found["logits"][0, -1].argmax())
            if token == eos:
                break
            tokens.append(token)
            embeds = model.get_input_embeddings()(torch.tensor([[token]])).detach()
            cache = {
                name.replace("present_mask", "past_mask").replace("present", "past_key_values"): v
                for name, v in found.items()
            }
        return tokens

    def run(self, feeds: dict, cache: dict) -> dict:
        """One call; what the graph does not take is left out, an empty past is made."""
        given = {}
        for value in self.session.get_inputs():
            empty = [size if isinstance(size, int) else 0 for size in value.shape]
            kind = np.int64 if value.type == "tensor(int64)" else np.float32
            known = feeds.get(value.name, cache.get(value.name))
            given[value.name] = np.zeros([1, *empty[1:]], kind) if known is None else known
        return dict(zip(self.outputs, self.session.run(None, given), strict=True))


def questions(processor: AutoProcessor) -> Iterator[tuple[dict, list[str]]]:
    """Every held-out question as the model takes it, and its answers."""
    for line in (DIGITS / "questions.jsonl").read_text().splitlines():
        asked = json.loads(line)
        content = [{"type": "image"}, {"type": "text", "text": asked["question"]}]
        chat = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        image = Image.open(DIGITS / asked["image"])
        yield dict(processor(images=image, text=prompt, return_tensors="pt")), asked["answers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=128, help="questions to ask")
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(DIGITS / "model").eval()
    processor = AutoProcessor.from_pretrained(DIGITS / "model")
    given = build(model, options.out / "fp32" / "decoder.onnx")
    int4 = quantise(given, options.out / "int4" / "decoder.onnx")
    report = retrofit(
        Request(int4, SCHEDULE, options.out / "cut", image_tokens=IMAGE_TOKENS, force=True)
    )
    print(f"{report.layers} layers, {sorted(set(report.attention))}, compared: {report.verified}")
    print(f"vision tokens per layer: {report.vision_tokens_per_layer}")
    files = {"int4, all tokens": int4, "int4, cut": options.out / "cut" / "decoder.onnx"}
    decoders = {name: Decoder(file) for name, file in files.items()}
    right, total = dict.fromkeys(files, 0), 0
    for inputs, answers in list(questions(processor))[: options.count]:
        total += 1
        for name, decoder in decoders.items():
            tokens = decoder.answer(model, inputs, model.generation_config.eos_token_id)
            right[name] += processor.decode(tokens).strip() in answers
    for name, count in right.items():
        print(f"{name}: {count} of {total} right")


if __name__ == "__main__":
    main()
