"""OpenGVLab's tensors under transformers' names; fused ones in their parts, none of them read."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from vtr_export.errors import CheckpointError

if TYPE_CHECKING:
    from vtr_export.checkpoint import TensorRef

NAMES: Final = (  # of modules; a layer's number and the parameter's name stay
    ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),  # noqa: E501 -- a table
    ("vision_model.embeddings.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),  # noqa: E501 -- a table
    ("vision_model.encoder.layers", "model.vision_tower.encoder.layer"),
    ("mlp1.0", "model.multi_modal_projector.layer_norm"),
    ("mlp1.1", "model.multi_modal_projector.linear_1"),
    ("mlp1.3", "model.multi_modal_projector.linear_2"),
    ("language_model.lm_head", "lm_head"),
    ("language_model.output", "lm_head"),
    ("language_model.model.tok_embeddings", "model.language_model.embed_tokens"),
    ("language_model.model", "model.language_model"),
)  # fmt: skip
IN_VISION: Final = {
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
IN_INTERNLM2: Final = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER: Final = re.compile(r"(.*\.layers?\.\d+)\.(.+?)((?:\.weight|\.bias)?)")


def convert(
    config: Mapping[str, Any], tensors: Mapping[str, "TensorRef"]
) -> dict[str, "TensorRef"]:
    """``config`` is transformers'. Tensors without a place in its model keep their names."""
    text = config["text_config"]
    return dict(part for name, ref in tensors.items() for part in _parts(_rename(name), ref, text))


def _rename(name: str) -> str:
    for ours, theirs in NAMES:
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def _parts(
    name: str, ref: "TensorRef", text: Mapping[str, Any]
) -> Iterator[tuple[str, "TensorRef"]]:
    """The parameters that a tensor of a layer holds: three where it is fused, or one."""
    if (match := _LAYER.fullmatch(name)) is None:
        yield name, ref
        return
    layer, module, kind = match.groups()
    if module == "attn.qkv":
        for number, letter in enumerate("qkv"):
            yield f"{layer}.attention.{letter}_proj{kind}", _rows(ref, 1, (1, 1, 1), number)
    elif module == "attention.wqkv":
        heads = text["num_attention_heads"]
        groups = text.get("num_key_value_heads", heads)
        shares = heads // groups, 1, 1
        for number, letter in enumerate("qkv"):
            yield f"{layer}.self_attn.{letter}_proj{kind}", _rows(ref, groups, shares, number)
    else:
        inside = IN_VISION if "vision_tower" in layer else IN_INTERNLM2
        yield f"{layer}.{inside.get(module, module)}{kind}", ref


def _rows(ref: "TensorRef", groups: int, shares: tuple[int, ...], number: int) -> "TensorRef":
    """Part ``number`` of a tensor whose rows are ``groups`` times all parts after each other.

    ``shares`` is how many of a group's equal shares each part has.
    """
    rows, unit = ref.shape[0], groups * sum(shares)
    if rows % unit:
        raise CheckpointError(
            f"tensor {ref.name!r} has {rows} rows, which are no {unit} equal parts",
            where=str(ref.shard),
            hint="config.json and the weights belong to different models",
        )
    share_bytes = ref.size_bytes // unit
    own = shares[number]
    return replace(
        ref,
        shape=(rows // unit * groups * own, *ref.shape[1:]),
        offset=ref.offset + sum(shares[:number]) * share_bytes,
        size_bytes=groups * own * share_bytes,
        loops=((groups, sum(shares) * share_bytes),) if groups > 1 else (),
    )
