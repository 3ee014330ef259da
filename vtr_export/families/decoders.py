"""A text decoder's facts: LLaMA and those that are built like it."""

from dataclasses import dataclass
from typing import Final

from vtr_export.errors import CheckpointError
from vtr_export.families.section import FRESH, Config, Section, section_of

QKV_BIASES: Final = ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")  # always, and nowhere else
QK_NORMS: Final = ("qwen3", "qwen3_vl_text")  # of head_dim weights each
DECODERS: Final = ("llama", "mistral", *QKV_BIASES, *QK_NORMS)


@dataclass(frozen=True)
class DecoderFacts:
    """Sizes in elements; see ``ModelFacts``."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    tied: bool
    dtype: str | None
    layer_biases: int
    gated: bool = True


def read_decoder(
    config: Config, fallback: str, where: str, *, key: str = "text_config"
) -> DecoderFacts:
    """The decoder under ``key``; ``fallback`` is its type where the file does not name it."""
    kind, text = section_of(config, key, fallback, where)
    if kind not in DECODERS:
        raise CheckpointError(
            f"text_config.model_type {kind!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(DECODERS)}",
        )
    _refuse_sliding_window(kind, text)
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    kv_heads, head_dim = _heads(text, hidden, heads)
    top = Section(config, "", where)
    return DecoderFacts(
        layers=text.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=text.size("intermediate_size"),
        vocab=text.size("vocab_size"),
        context=text.size("max_position_embeddings"),
        tied=top.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False),
        dtype=_dtype(config) or _dtype(text.values),
        layer_biases=_layer_biases(kind, text, heads * head_dim, kv_heads * head_dim, head_dim),
    )


def _heads(text: Section, hidden: int, heads: int) -> tuple[int, int]:
    """Key-value heads and head width."""
    kv_heads = heads
    if text.values.get("num_key_value_heads") is not None:
        kv_heads = text.size("num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(
            f"{heads} heads cannot share {kv_heads} kv heads", where=text.where, hint=FRESH
        )
    if text.values.get("head_dim") is not None:
        return kv_heads, text.size("head_dim")
    if hidden % heads:
        raise CheckpointError(
            f"hidden {hidden} is no multiple of {heads} heads", where=text.where, hint=FRESH
        )
    return kv_heads, hidden // heads


def _refuse_sliding_window(kind: str, text: Section) -> None:
    window = text.values.get("sliding_window")
    if kind.startswith("qwen") and not text.flag("use_sliding_window", False):
        return
    if isinstance(window, int) and window < text.size("max_position_embeddings"):
        raise CheckpointError(
            f"attention slides over {window} tokens; only full attention is supported",
            where=text.where,
            hint='"sliding_window": null in text_config, if the model was trained without it',
        )


def _layer_biases(kind: str, text: Section, q: int, kv: int, head_dim: int) -> int:
    if kind in QKV_BIASES:
        return q + 2 * kv
    if kind in QK_NORMS:
        return 2 * head_dim
    if kind != "llama":
        return 0
    hidden, intermediate = text.size("hidden_size"), text.size("intermediate_size")
    attention = q + 2 * kv + hidden if text.flag("attention_bias", False) else 0
    return attention + (2 * intermediate + hidden if text.flag("mlp_bias", False) else 0)


def _dtype(config: Config) -> str | None:
    value = config.get("dtype", config.get("torch_dtype"))
    return value if isinstance(value, str) else None
