"""A text decoder's facts: LLaMA and those that are built like it."""

from dataclasses import dataclass
from typing import Final

from vtr_export.errors import CheckpointError
from vtr_export.families.section import FRESH, Config, Section, is_tied, section_of

QKV_BIASES: Final = ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")  # always, and nowhere else
MIXTURES: Final = ("qwen3_vl_moe_text",)  # of experts, in every layer
QK_NORMS: Final = ("qwen3", "qwen3_vl_text", *MIXTURES)  # of head_dim weights each
GEMMAS: Final = ("gemma", "gemma2", "gemma3_text")
SANDWICHED: Final = GEMMAS[1:]  # a norm behind attention and MLP, too
CAPPED: Final = ("gemma2",)  # Gemma 3 reads the value and leaves it
BIASES_ASKED: Final = ("llama", "cohere2", *QK_NORMS, *GEMMAS)  # where attention_bias says so
PARALLEL: Final = ("cohere2",)  # attention and MLP read one norm
ENCODER_DECODERS: Final = ("t5", "mt5", "umt5")  # text_config's types whose layers cross-attend
DECODERS: Final = (
    "llama",
    "mistral",
    "mllama_text_model",
    *QKV_BIASES,
    *QK_NORMS,
    *GEMMAS,
    *PARALLEL,
)


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
    window: int | None = None
    softcap: float | None = None
    learned_positions: int = 0
    norm_biases: int = 0
    sandwiched: bool = False


def read_decoder(
    config: Config, fallback: str, where: str, *, key: str = "text_config", prefix: bool = False
) -> DecoderFacts:
    """The decoder under ``key``; ``fallback`` is its type where the file does not name it.

    ``prefix``: the family says itself which tokens see what comes behind them.
    """
    kind, text = section_of(config, key, fallback, where)
    if kind not in DECODERS:
        raise CheckpointError(
            f"text_config.model_type {kind!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(DECODERS)}",
        )
    if not prefix and text.values.get("use_bidirectional_attention"):
        raise text.error("use_bidirectional_attention is true: no such decoder generates text")
    positions, window = text.size("max_position_embeddings"), _window(kind, text)
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    kv_heads, head_dim = _heads(text, hidden, heads)
    return DecoderFacts(
        layers=text.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_intermediate(kind, text),
        vocab=text.size("vocab_size"),
        context=min(positions, window or positions),
        tied=is_tied(config, text),
        dtype=_dtype(config) or _dtype(text.values),
        layer_biases=_layer_biases(kind, text, heads * head_dim, kv_heads * head_dim, head_dim),
        window=window if window is not None and window < positions else None,
        softcap=text.positive("attn_logit_softcapping") if kind in CAPPED else None,
        sandwiched=kind in SANDWICHED,
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


def _window(kind: str, text: Section) -> int | None:
    """Tokens up to which every layer sees all that came before: the least window or chunk."""
    types = text.values.get("layer_types")
    kinds = types if isinstance(types, list) else ["sliding_attention", "chunked_attention"]
    sizes = []
    if "sliding_attention" in kinds and (
        not kind.startswith("qwen") or text.flag("use_sliding_window", False)
    ):
        sizes.append(text.number("sliding_window"))
    if "chunked_attention" in kinds:
        sizes.append(text.number("attention_chunk_size"))
    return min((size for size in sizes if size is not None), default=None)


def _intermediate(kind: str, text: Section) -> int:
    """Of all experts together, where there are some: the graph runs them all."""
    if kind not in MIXTURES:
        return text.size("intermediate_size")
    if text.values.get("mlp_only_layers") or text.size("decoder_sparse_step") > 1:
        raise text.error(
            "mlp_only_layers or decoder_sparse_step give some layers no experts",
            "export a model whose layers are alike",
        )
    return _experts(text) * text.size("moe_intermediate_size")


def _experts(text: Section) -> int:
    """Transformers 5 writes another name than the hub's files have."""
    return text.number("num_local_experts") or text.size("num_experts")


def _layer_biases(kind: str, text: Section, q: int, kv: int, head_dim: int) -> int:
    hidden, intermediate = text.size("hidden_size"), text.size("intermediate_size")
    count = 2 * hidden if kind in SANDWICHED else 0
    if kind in PARALLEL:
        count -= hidden
    if kind in (*QK_NORMS, "gemma3_text"):
        count += 2 * head_dim
    if kind in QKV_BIASES:
        count += q + 2 * kv
    if kind in BIASES_ASKED and text.flag("attention_bias", False):
        count += q + 2 * kv + hidden
    if kind in MIXTURES:
        count += hidden * _experts(text)
    if kind == "llama" and text.flag("mlp_bias", False):
        count += 2 * intermediate + hidden
    return count


def _dtype(config: Config) -> str | None:
    value = config.get("dtype", config.get("torch_dtype"))
    return value if isinstance(value, str) else None
