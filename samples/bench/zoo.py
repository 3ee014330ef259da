"""A tiny random model of every architecture that takes images and text."""

import math
import re

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from zoo_config import tiny_config

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
    if isinstance(module, nn.Embedding) or weight.ndim < 2:
        return 1.0, 0.0
    if weight.ndim == 3:
        return 1 / math.sqrt(weight.shape[-1]), 0.0
    gain = SHARPNESS if _QUERY_KEY.search(name.rpartition(".")[0]) else 1.0
    return gain / math.sqrt(weight[0].numel()), 0.0
