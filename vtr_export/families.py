"""What we must know of a model before reading a weight: facts from its config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vtr_export.errors import CheckpointError

Config = Mapping[str, Any]
_FRESH: Final = "check it against a fresh download of the model"


@dataclass(frozen=True)
class VisionFacts:
    """A vision tower. ``layers_run`` of its ``layers`` feed the projector; the rest are not ours.

    ``tokens`` is the tower's own sequence length per image, CLS included; ``parameters`` counts
    what the exported encoder holds (embeddings and ``layers_run`` layers).
    """

    layers: int
    layers_run: int
    hidden: int
    heads: int
    intermediate: int
    tokens: int
    image_size: int
    patch_size: int
    channels: int
    has_cls: bool
    parameters: int


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a vision-language model; sizes in elements, ``dtype`` as torch spells it.

    ``tokens_per_image`` is None where it depends on the image's size. ``projector_macs`` are
    multiply-adds per vision token. ``layer_biases`` counts the biases of one decoder layer.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    vocab: int
    context: int
    tied: bool
    dtype: str | None
    tokens_per_image: int | None
    image_token_id: int | None
    vision: VisionFacts | None
    projector_parameters: int
    projector_macs: int
    layer_biases: int = 0
    mrope: bool = False


def read_facts(config: Config, where: str) -> ModelFacts:
    """Facts of a ``config.json``, with transformers' defaults where it is silent.

    Raises CheckpointError for a model type without a reader, a quantised checkpoint, and values
    that are missing or make no sense; ``where`` names the file.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError("the configuration is not a JSON object", where=where, hint=_FRESH)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        _refuse_quantised(part, where)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type](config, where)


def _refuse_quantised(part: object, where: str) -> None:
    if not isinstance(part, Mapping) or part.get("quantization_config") is None:
        return
    quantization = part["quantization_config"]
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise CheckpointError(
        f"the checkpoint is quantised ({method or 'method not named'}); its weights are not plain",
        where=where,
        hint="start from the unquantised checkpoint (without quantization_config)",
    )


# transformers' defaults, read in its configuration classes; None: derived from another value
_LLAMA: Final = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
}
_TEXT_DEFAULTS: Final[Mapping[str, Config]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "qwen2": _LLAMA
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}
_SIGLIP: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}
_VISION_DEFAULTS: Final[Mapping[str, Config]] = {
    "clip_vision_model": _SIGLIP | {"patch_size": 32},
    "siglip_vision_model": _SIGLIP,
}
_LLAVA_TOWER: Final = {  # what transformers builds when vision_config is absent
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class _Section:
    """One object of the configuration, its defaults, and where to point when it is wrong."""

    values: Config
    name: str
    where: str

    def size(self, key: str) -> int:
        """A positive integer."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.name}{key} is {value!r}, not a positive integer",
                where=self.where,
                hint=_FRESH,
            )
        return value

    def side(self, key: str) -> int:
        """A positive integer, or two equal ones (height, width)."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return _Section({key: value[0]}, self.name, self.where).size(key)
        return self.size(key)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.name}{key} is {value!r}, not true or false", where=self.where, hint=_FRESH
            )
        return value


def _section(
    config: Config, key: str, fallback: str, defaults: Mapping[str, Config], where: str
) -> tuple[str, _Section]:
    """The sub-configuration ``key`` over its defaults, and its model type."""
    given = config.get(key)
    if given is None:
        given = _LLAVA_TOWER if key == "vision_config" else {}
    if not isinstance(given, Mapping):
        raise CheckpointError(
            f"{key} is {type(given).__name__}, not an object", where=where, hint=_FRESH
        )
    kind = given.get("model_type") or fallback
    if not isinstance(kind, str) or kind not in defaults:
        raise CheckpointError(
            f"{key}.model_type {kind!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(sorted(defaults))}",
        )
    return kind, _Section({**defaults[kind], **given}, f"{key}.", where)


def _llava(config: Config, where: str) -> ModelFacts:
    """LLaVA-1.5 form: CLIP or SigLIP tower, two-layer projector, LLaMA-like decoder."""
    kind, text = _section(config, "text_config", "llama", _TEXT_DEFAULTS, where)
    tower, vision = _section(config, "vision_config", "clip_vision_model", _VISION_DEFAULTS, where)
    _refuse_sliding_window(kind, text, where)
    features = _feature_layers(config, vision.size("num_hidden_layers"), where)
    facts = _tower(vision, tower == "clip_vision_model", max(features))
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    kv_heads, head_dim = _heads(text, hidden, heads)
    top = _Section(config, "", where)
    bias = 2 * hidden if top.flag("multimodal_projector_bias", True) else 0
    macs = (facts.hidden * len(features) + hidden) * hidden
    return ModelFacts(
        model_type="llava",
        layers=text.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=text.size("intermediate_size"),
        gated=True,
        vocab=text.size("vocab_size"),
        context=text.size("max_position_embeddings"),
        tied=top.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False),
        dtype=_dtype(config) or _dtype(text.values),
        tokens_per_image=facts.tokens - _dropped_tokens(config, where),
        image_token_id=_image_token(config, where),
        vision=facts,
        projector_parameters=macs + bias,
        projector_macs=macs,
        layer_biases=_layer_biases(kind, text, heads * head_dim, kv_heads * head_dim),
    )


def _image_token(config: Config, where: str) -> int:
    value = config.get("image_token_index", config.get("image_token_id", 32000))
    if type(value) is not int or value < 0:
        message = f"image_token_index is {value!r}, not a token id"
        raise CheckpointError(message, where=where, hint=_FRESH)
    return value


def _heads(text: _Section, hidden: int, heads: int) -> tuple[int, int]:
    """Key-value heads and head width."""
    kv_heads = heads
    if text.values.get("num_key_value_heads") is not None:
        kv_heads = text.size("num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(
            f"{heads} heads cannot share {kv_heads} kv heads", where=text.where, hint=_FRESH
        )
    if text.values.get("head_dim") is not None:
        return kv_heads, text.size("head_dim")
    if hidden % heads:
        raise CheckpointError(
            f"hidden {hidden} is no multiple of {heads} heads", where=text.where, hint=_FRESH
        )
    return kv_heads, hidden // heads


def _refuse_sliding_window(kind: str, text: _Section, where: str) -> None:
    window = text.values.get("sliding_window")
    if kind == "qwen2" and not text.flag("use_sliding_window", False):
        return
    if isinstance(window, int) and window < text.size("max_position_embeddings"):
        raise CheckpointError(
            f"attention slides over {window} tokens; only full attention is supported",
            where=where,
            hint='"sliding_window": null in text_config, if the model was trained without it',
        )


def _feature_layers(config: Config, layers: int, where: str) -> tuple[int, ...]:
    """How many tower layers run before each feature that the projector reads."""
    given = config.get("vision_feature_layer", -2)
    wanted = given if isinstance(given, list) and given else [given]
    if any(isinstance(i, bool) or not isinstance(i, int) or not -layers - 1 <= i <= layers
           for i in wanted):  # fmt: skip
        raise CheckpointError(
            f"vision_feature_layer {given!r} does not fit a tower of {layers} layers",
            where=where,
            hint=_FRESH,
        )
    return tuple(i if i >= 0 else layers + 1 + i for i in wanted)


def _dropped_tokens(config: Config, where: str) -> int:
    """``default`` drops the first row of any tower, CLS or not; ``full`` drops none."""
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"vision_feature_select_strategy {strategy!r} is neither 'default' nor 'full'",
            where=where,
            hint=_FRESH,
        )
    return 1 if strategy == "default" else 0


def _tower(vision: _Section, has_cls: bool, layers_run: int) -> VisionFacts:
    """CLIP (CLS token, norm before the layers) or SigLIP (biased patch embedding)."""
    hidden, intermediate = vision.size("hidden_size"), vision.size("intermediate_size")
    image, patch = vision.side("image_size"), vision.side("patch_size")
    channels = vision.size("num_channels")
    tokens = (image // patch) ** 2 + has_cls
    extras = hidden + 2 * hidden if has_cls else hidden  # class embedding and norm, or patch bias
    layer = 4 * (hidden + 1) * hidden + 2 * hidden * intermediate + intermediate + 5 * hidden
    return VisionFacts(
        layers=vision.size("num_hidden_layers"),
        layers_run=layers_run,
        hidden=hidden,
        heads=vision.size("num_attention_heads"),
        intermediate=intermediate,
        tokens=tokens,
        image_size=image,
        patch_size=patch,
        channels=channels,
        has_cls=has_cls,
        parameters=hidden * (channels * patch**2 + tokens) + extras + layers_run * layer,
    )


def _layer_biases(kind: str, text: _Section, q: int, kv: int) -> int:
    if kind == "qwen2":
        return q + 2 * kv
    if kind != "llama":
        return 0
    hidden, intermediate = text.size("hidden_size"), text.size("intermediate_size")
    attention = q + 2 * kv + hidden if text.flag("attention_bias", False) else 0
    return attention + (2 * intermediate + hidden if text.flag("mlp_bias", False) else 0)


def _dtype(config: Config) -> str | None:
    value = config.get("dtype", config.get("torch_dtype"))
    return value if isinstance(value, str) else None


FAMILIES: Final[Mapping[str, Callable[[Config, str], ModelFacts]]] = {"llava": _llava}
TOWERS, DECODERS = tuple(_VISION_DEFAULTS), tuple(_TEXT_DEFAULTS)  # sub-configurations we read
