"""Other exporters, each in a process of its own: what they make of the same checkpoint.

python samples/bench/peers.py transformers-whole MODEL OUT     a VLM, as its user exports it
python samples/bench/peers.py transformers-decoder MODEL OUT   its decoder, twice
python samples/bench/peers.py mobius-decoder MODEL OUT         the same by mobius-onnx

The last line is JSON: seconds by step, the components. mobius-onnx may live in another venv: run
this file with that interpreter (it needs torch, transformers and onnxscript beside it).
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import peak_rss_bytes

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        self.steps[name] = round(time.perf_counter() - start, 3)


def transformers_whole(args: argparse.Namespace, clock: Clock) -> list[str]:
    """``OnnxExporter.export_for_generation`` on the whole model, one image and a few words."""
    with clock.step("import"):
        import torch
        from transformers import LlavaForConditionalGeneration
        from transformers.exporters import OnnxConfig, OnnxExporter
    with clock.step("load"):
        model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype="auto").eval()
    config = model.config
    size, tokens = config.vision_config.image_size, config.image_seq_length
    words = [5, 6, 7, 8]
    ids = torch.tensor([[1, *[config.image_token_id] * tokens, *words]])
    sample = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, 3, size, size, dtype=model.dtype),
    }
    with clock.step("export"):
        made = OnnxExporter().export_for_generation(model, sample, OnnxConfig(dynamic=True))
    with clock.step("save"):
        made.save_pretrained(args.out)
    return list(made.components)


def transformers_decoder(args: argparse.Namespace, clock: Clock) -> list[str]:
    """The language model as a text generator, fused for ONNX Runtime unless told otherwise."""
    import torch
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration
    from transformers.exporters import OnnxConfig, OnnxExporter

    llava = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    with torch.device("meta"):
        model = LlamaForCausalLM(llava.config.text_config)
    model.model, model.lm_head = llava.model.language_model, llava.lm_head
    ids = torch.randint(5, model.config.vocab_size, (2, 9))
    config = OnnxConfig(dynamic=True, ort_fusions=args.provider)
    with clock.step("export"):
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made = OnnxExporter().export_for_generation(model.eval(), sample, config)
    if args.last:
        keep_last_position(made.components["prefill"].program)
    with clock.step("save"):
        made.save_pretrained(args.out)
    return list(made.components)


def mobius_decoder(args: argparse.Namespace, clock: Clock) -> list[str]:
    """The decoder of ``mobius.build``; 0.1.0 finds no LLaVA's weights, so they are named here."""
    import mobius
    from safetensors.torch import load_file

    with clock.step("export"):
        package = mobius.build(
            str(args.model),
            dtype=DTYPES[args.dtype],
            load_weights=False,
            execution_provider=args.provider or "default",
        )
        weights = {}
        for shard in sorted(args.model.glob("*.safetensors")):
            for name, tensor in load_file(shard).items():
                if name.startswith("language_model."):
                    weights[name.replace("language_model", "decoder", 1)] = tensor
        mobius.apply_weights(package["decoder"], weights)
    if args.last:
        keep_last_position(package["decoder"])
    with clock.step("save"):
        package.save(str(args.out), components=lambda name: name == "decoder", progress_bar=False)
    return ["decoder"]


def keep_last_position(model: Any) -> None:
    """Give the logits' matrix product the last position only, as a prefill needs no other."""
    import numpy as np
    import onnx_ir as ir

    node = next(value for value in model.graph.outputs if value.name == "logits").producer()
    while node.op_type != "MatMul":
        node = node.inputs[0].producer()
    last = ir.Value(name="last", const_value=ir.tensor(np.array([-1]), name="last"))
    model.graph.register_initializer(last)
    gather = ir.node("Gather", [node.inputs[0], last], attributes={"axis": 1})
    model.graph.insert_before(node, gather)
    node.replace_input_with(0, gather.outputs[0])


PEERS = {
    "transformers-whole": transformers_whole,
    "transformers-decoder": transformers_decoder,
    "mobius-decoder": mobius_decoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--provider", help="fuse for this provider of ONNX Runtime: cpu, cuda")
    parser.add_argument("--last", action="store_true", help="logits of the last position only")
    args = parser.parse_args()
    clock = Clock()
    components = PEERS[args.peer](args, clock)
    report = {"components": components, "steps": clock.steps, "peak_rss_bytes": peak_rss_bytes()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
