"""OPT: learned positions, biases everywhere, an MLP without a gate."""

from vtr_export.families.decoders import DecoderFacts
from vtr_export.families.section import Config, Section, is_tied, section_of

OFFSET = 2  # rows that stand before the first position's in the table


def read_opt(config: Config, where: str) -> DecoderFacts:
    """The decoder under ``text_config``; those of 350M parameters are refused."""
    text = section_of(config, "text_config", "opt", where)[1]
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    inner, positions = text.size("ffn_dim"), text.size("max_position_embeddings")
    _check(text, hidden, heads)
    dtype = config.get("dtype", config.get("torch_dtype", text.values.get("dtype")))
    return DecoderFacts(
        layers=text.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        vocab=text.size("vocab_size"),
        context=positions,
        tied=is_tied(config, text),
        dtype=dtype if isinstance(dtype, str) else None,
        layer_biases=_layer_biases(text, hidden, inner),
        gated=False,
        learned_positions=positions + OFFSET,
        norm_biases=hidden,
    )


def _check(text: Section, hidden: int, heads: int) -> None:
    if hidden % heads:
        raise text.error(f"hidden_size {hidden} is no multiple of {heads} heads")
    width = text.number("word_embed_proj_dim") or hidden
    late = not text.flag("do_layer_norm_before", True)
    if late or text.flag("_remove_final_layer_norm", False) or width != hidden:
        raise text.error(
            "do_layer_norm_before, _remove_final_layer_norm or word_embed_proj_dim ask for OPT's "
            "older form",
            "export a checkpoint whose norms stand before attention and MLP",
        )
    if not text.flag("layer_norm_elementwise_affine", True):
        raise text.error("layer_norm_elementwise_affine is false: norms without weights")


def _layer_biases(text: Section, hidden: int, inner: int) -> int:
    """Of norms; of the linear layers where ``enable_bias`` says so."""
    linear = 5 * hidden + inner if text.flag("enable_bias", True) else 0
    return 2 * hidden + linear
