"""Facts of an architecture without a reader of its own: what its sections say, and why it may not.

What such a decoder holds and costs is an estimate: norms, biases and routers are not counted.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from vtr_export.errors import CheckpointError
from vtr_export.families.decoders import ENCODER_DECODERS
from vtr_export.families.facts import Attends, ModelFacts
from vtr_export.families.opt import OFFSET
from vtr_export.families.section import FRESH, Config, Section, defaults, filled, is_tied

REFERRING: Final = "reference_sliding_attention"  # to all of the prompt, and a window behind it
SEEN: Final = ("full_attention", "sliding_attention", "chunked_attention", REFERRING)  # by all
CROSSING: Final = "image features enter through cross-attention, not as tokens of the prompt"
NO_IMAGE: Final = "it takes no image"
BY_TYPE: Final[Mapping[str, str]] = {  # what no field says
    "blip": CROSSING,
    "evolla": NO_IMAGE,
    "mistral4": NO_IMAGE,
    "git": "features stand before the prompt and have no tokens in it",
    "diffusion_gemma": "it fills blocks of tokens in many steps (block diffusion)",
    "pi0": "its decoder is an expert that makes actions, not text",
    "kosmos-2.5": "words beside an image are in its segment, which no token tells",
}
BY_FIELD: Final[Mapping[str, str]] = {
    "index_topk": "each row chooses the keys it sees (a sparse indexer)",
    "index_topk_blocks": "each row chooses the blocks it sees (a sparse indexer)",
    "num_kv_shared_layers": "layers read the keys of other layers (KV sharing)",
    "hc_mult": "several residual streams",
    "altup_num_inputs": "several residual streams",
    "conv_kernel_size": "layers convolve over tokens",
    "layers_block_type": "layers without attention (recurrent, or none)",
}
APART: Final = ("ernie4_5_vl_moe",)  # whose images' tokens have experts of their own
PREFIXES: Final[Mapping[str, Attends]] = {"molmo2": "images"}
WHOLE: Final = (
    "gemma4",
    "gemma4_unified",
)  # tokens of an image see each other where a field says so


MASKED: Final = ("kosmos-2",)  # no token stands for an image; positions count from the pad's id


def generic(config: Config, where: str) -> ModelFacts:
    """Facts read off the sections; CheckpointError says what such a schedule cannot follow."""
    config = filled(config)
    kind, top = config["model_type"], Section(config, "", where)
    own = config.get("text_config")
    text_kind = own.get("model_type") if isinstance(own, Mapping) else None
    if config.get("is_encoder_decoder") or text_kind in ENCODER_DECODERS:
        raise _refusal(kind, "it is an encoder-decoder", where)
    if kind in BY_TYPE:
        raise _refusal(kind, BY_TYPE[kind], where)
    text = _decoder_section(config, where)
    tokens, tied = top.number("mm_tokens_per_image"), is_tied(config, text)
    return described(config, text, where, tokens_per_image=tokens, tied=tied)


def described(config: Config, text: Section, where: str, **known: Any) -> ModelFacts:
    """Facts of a decoder whose every value stands in ``text``; ``known``: other fields."""
    kind = config["model_type"]
    _check_layers(kind, text)
    heads, hidden = text.size("num_attention_heads"), text.size("hidden_size")
    kv_heads = text.number("num_key_value_heads") or heads
    positions, window = text.size("max_position_embeddings"), _window(text)
    rope = text.values.get("rope_parameters")
    dtype = config.get("dtype", config.get("torch_dtype", text.values.get("dtype")))
    is_tabled = kind in MASKED or text.values.get("model_type") == "opt"
    facts: dict[str, Any] = {"tokens_per_image": None, "vision": None, **known}
    return ModelFacts(
        model_type=kind,
        layers=text.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_key_dim(text) or text.number("head_dim") or hidden // heads,
        value_dim=text.number("v_head_dim") if _key_dim(text) else None,
        intermediate=_intermediate(text),
        gated=True,
        vocab=text.size("vocab_size"),
        context=min(positions, window or positions),
        dtype=dtype if isinstance(dtype, str) else None,
        image_token_id=_place(kind, config, text, where),
        projector_parameters=0,
        projector_macs=0,
        mrope="mrope_section" in str(rope),
        sections=_sections(rope),
        planes=_planes(config),
        marked=_marked(kind, config, where),
        answer=text.size("sliding_window") if REFERRING in str(_types(text)) else None,
        window=window if window is not None and window < positions else None,
        attends=_attends(kind, text),
        learned_positions=positions + OFFSET if is_tabled else 0,
        first_position=_behind_pad(text) if kind in MASKED else 0,
        estimated=True,
        **facts,
    )


def _refusal(kind: str, reason: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{kind} cannot be pruned: {reason}",
        where=where,
        hint="a schedule needs a decoder whose every layer attends to the prompt's image tokens",
    )


def _decoder_section(config: Config, where: str) -> Section:
    """``text_config`` over its defaults, or the whole where the decoder's values are at the top."""
    kind = defaults()[config["model_type"]].get("sub_configs", {}).get("text_config")
    if kind is None:
        return Section(_derived(config, config["model_type"]), "", where)
    given = config.get("text_config") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError("text_config is not an object", where=where, hint=FRESH)
    named = given.get("model_type")
    own = _derived(given, named if isinstance(named, str) and named in defaults() else kind)
    return Section(own, "text_config.", where)


def _derived(given: Config, kind: str) -> Config:
    """``given`` over what the class of ``kind`` says, and what follows from other fields."""
    own = defaults()[kind]
    found: dict[str, Any] = {**own, **given}
    for alias, name in own.get("aliases", {}).items():
        if alias in given:
            found.setdefault(name, given[alias])
            found[name] = given.get(name, given[alias])
        elif name in found:
            found[alias] = found[name]
    for name, rule in own.get("derived", {}).items():
        if found.get(name) is None or found[name] == rule:
            found[name] = _follows(rule, found)
    return found


def _follows(rule: Any, values: Mapping[str, Any]) -> Any:
    """A rule of ``defaults.json``: a field, a quotient of two, or a value."""
    if not isinstance(rule, str):
        return rule
    first, *rest = (values.get(part) for part in rule.split(" // "))
    if not isinstance(first, int) or not rest:
        return first
    return first // rest[0] if isinstance(rest[0], int) and rest[0] else None


def _check_layers(kind: str, text: Section) -> None:
    """Refuse what the cuts, or their proof, cannot follow."""
    types = text.values.get("layer_types")
    others = [t for t in types if t not in SEEN] if isinstance(types, list) else []
    if isinstance(types, Mapping):
        others = [t for part in types.values() for t in part if t not in SEEN]
    if others:
        raise _refusal(kind, f"a layer is of the kind {others[0]!r}", text.where)
    for field, reason in BY_FIELD.items():
        if text.values.get(field):
            raise _refusal(kind, f"{reason}: {text.name}{field}", text.where)
    mutual = text.values.get("use_bidirectional_attention")
    if mutual and (kind not in WHOLE or mutual != "vision"):
        raise _refusal(kind, "image tokens see what comes behind them (prefix)", text.where)


def _attends(kind: str, text: Section) -> Attends:
    mutual = text.values.get("use_bidirectional_attention")
    return "images" if kind in WHOLE and mutual else PREFIXES.get(kind, "causal")


def _types(text: Section) -> object:
    return text.values.get("layer_types")


def _window(text: Section) -> int | None:
    """Tokens up to which every layer sees all that came before, and sees it alike."""
    types = _types(text)
    kinds = (
        str(types)
        if types
        else str(["sliding_attention"] * bool(text.values.get("use_sliding_window", True)))
    )
    sizes = []
    if "'sliding_attention'" in kinds:
        sizes.append(text.number("sliding_window"))
    if "chunked_attention" in kinds:
        sizes.append(text.number("attention_chunk_size"))
    if text.values.get("attn_temperature_tuning"):
        sizes.append(text.size("floor_scale") - 1)
    return min((size for size in sizes if size is not None), default=None)


def _intermediate(text: Section) -> int:
    """Of the experts that a token goes through, where there are some."""
    for field in ("intermediate_size", "ffn_dim", "moe_intermediate_size"):
        value = text.values.get(field)
        if isinstance(value, list):
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return 4 * text.size("hidden_size")


def _behind_pad(text: Section) -> int:
    """The first position, where a table of them has the pad's id for a pad's."""
    pad = text.values.get("pad_token_id")
    return 1 + (pad if isinstance(pad, int) else 1)


def _place(kind: str, config: Config, text: Section, where: str) -> int:
    """The id of an image's places; the first behind the words where a mask tells them."""
    return text.size("vocab_size") if kind in MASKED else _image_token(kind, config, where)


def _image_token(kind: str, config: Config, where: str) -> int:
    """Under any of the names it has; CheckpointError where the file names none."""
    names = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    mapped = config.get("vocabulary_map")
    if isinstance(mapped, Mapping) and isinstance(mapped.get("<image>"), int):
        return int(mapped["<image>"])
    raise _refusal(kind, "config.json names no token for an image's places", where)


def _planes(config: Config) -> tuple[int, ...]:
    """DeepStack: features of inner blocks, for the first layers or for those that are named."""
    vision = config.get("vision_config") or {}
    pairs = config.get("deepstack_layer_map") or ()
    named = {layer for _, layer in pairs} | set(config.get("spatial_target_layers") or ())
    first = range(len(vision.get("deepstack_visual_indexes") or ()))
    return tuple(sorted(layer - 1 for layer in named if layer)) or tuple(first)


def _marked(kind: str, config: Config, where: str) -> tuple[int, ...]:
    """An image's places, and what stands around them, where those have experts of their own."""
    if kind not in APART:
        return ()
    top = Section(config, "", where)
    around = (top.size("image_start_token_id"), top.size("image_end_token_id"))
    return (_image_token(kind, config, where), *around)


def _sections(rope: object) -> int:
    """Numbers that a position is of, with mRoPE."""
    found = re.search(r"'mrope_section': \[([^]]*)\]", str(rope))
    return len(found[1].split(",")) if found else 3


def _key_dim(text: Section) -> int | None:
    """Of latent attention, whose keys are made of two parts; None: it is another."""
    if not text.values.get("kv_lora_rank"):
        return None
    return text.size("qk_nope_head_dim") + text.size("qk_rope_head_dim")
