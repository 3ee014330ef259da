"""A tiny random model of every architecture that takes images and text, and facts of each.

python samples/bench/zoo.py writes them into zoo.md.
"""

import math
import re
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from zoo_config import ARCHITECTURES, tiny_config
from zoo_facts import Facts, observe
from zoo_inputs import inputs

INTRODUCTION = """# Architectures that take images and text

Every entry of transformers' image-text-to-text mapping as a tiny random model, and what was seen
of its decoder in one call: written by `python samples/bench/zoo.py`. *Merged*: features of the
image replace placeholder tokens of the prompt; *prepended*: they come before it. Attention is named
inside a layer, or whole where it lies in another list; *of its own*: it does not go through
transformers' attention interface, or not with the same result.

"""
SHARPNESS = 1.6  # scale of q and k: scores get a spread of about SHARPNESS^2
_QUERY_KEY = re.compile(
    r"(^|\.|_)(q|k|qkv|query|key|wq|wk|c_attn|query_key_value)(_[ab])?(_proj)?$"
)
_SCALE = re.compile(r"norm|ln_|_ln|rms|lambda|layer_?scale|scale|gate|alpha|\.D$")


def tiny(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The architecture's model in eval mode, fp32, eager attention, with sharp queries and keys."""
    config = tiny_config(model_type)
    kind = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    config._attn_implementation = "eager"
    model: PreTrainedModel = kind(config)
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draw every weight anew: unit gain in general, sharper q and k, norms and gates near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        for short, weight in module.named_parameters(recurse=False):
            noise = torch.randn(weight.shape, generator=generator)
            scale, shift = _spread(f"{name}.{short}", module, weight)
            weight.copy_(shift + scale * noise)


def _spread(name: str, module: nn.Module, weight: nn.Parameter) -> tuple[float, float]:
    """Standard deviation and mean of a weight."""
    if name.endswith("bias"):
        return 0.1, 0.0
    if "Norm" in type(module).__name__ or (weight.ndim < 2 and _SCALE.search(name)):
        return 0.1, 1.0
    if "quantize.embedding" in name:  # codes lie where an encoder's values do
        return 0.02, 0.0
    if isinstance(module, nn.Embedding) or weight.ndim < 2:
        return 1.0, 0.0
    if weight.ndim == 3:
        return 1 / math.sqrt(weight.shape[-1]), 0.0
    gain = SHARPNESS if _QUERY_KEY.search(name.rpartition(".")[0]) else 1.0
    return gain / math.sqrt(weight[0].numel()), 0.0


def describe(model_type: str) -> Facts:
    """Facts of the architecture, seen in its tiny model."""
    model = tiny(model_type)
    return observe(model, model_type, inputs(model))


HEAD = ("architecture", "class", "decoder's layers", "attention", "vision", "lm_head", "kind",
        "features", "streams into the decoder", "inputs for one image")  # fmt: skip
PAGE = Path(__file__).with_suffix(".md")


def table() -> str:
    """Markdown: a row an architecture; ImportError where timm, the tower of some, is missing."""
    rows = [HEAD, ("---",) * len(HEAD), *(_row(describe(name)) for name in ARCHITECTURES)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(facts: Facts) -> tuple[str, ...]:
    shapes = (f"{name} {list(shape)}" for name, shape in facts.inputs.items())
    return (
        facts.architecture,
        _code(facts.model_class),
        _code(facts.layers),
        _code(*facts.attention),
        _code(facts.vision),
        _code(facts.lm_head),
        facts.kind,
        ", ".join(facts.features),
        ", ".join(facts.streams),
        ", ".join(shapes),
    )


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names if name)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(INTRODUCTION + table(), encoding="utf-8")
