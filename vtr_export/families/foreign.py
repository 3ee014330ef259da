"""Models whose checkpoint brings its own code: what is refused unasked, and facts where it ran."""

from collections.abc import Mapping
from typing import Any, Final

from vtr_export.errors import CheckpointError
from vtr_export.families.facts import ModelFacts, VisionFacts
from vtr_export.families.generic import described
from vtr_export.families.section import Config, Section, architectures

RAN: Final = "remote_code"  # of a configuration that its own code has read: file → sha256


def own_code(config: Config) -> dict[str, str]:
    """Class of transformers' that ``config.json`` replaces → ``file.Class`` of the folder.

    Configuration and models alone: what prepares texts and images is not modelling code.
    """
    auto_map = config.get("auto_map")
    found = auto_map if isinstance(auto_map, Mapping) else {}
    return {
        str(name): str(own)
        for name, own in found.items()
        if isinstance(name, str) and (name == "AutoConfig" or name.startswith("AutoModel"))
    }


def refuse_own_code(config: Config, where: str) -> None:
    """CheckpointError where ``config.json`` names modelling code; nothing of it is imported."""
    if not (named := own_code(config)):
        return
    files = sorted({own.rpartition(".")[0] + ".py" for own in named.values()})
    kind = config.get("model_type")
    hint = f"read {' and '.join(files)}; if you trust them, --trust-remote-code runs them"
    if isinstance(kind, str) and kind in architectures():
        hint += f"; without auto_map in config.json, transformers' own {kind} is taken"
    raise CheckpointError(
        f"config.json names modelling code of its own ({', '.join(files)}), "
        "which is not run unless you ask for it",
        where=where,
        hint=hint,
    )


def foreign(config: Config, where: str) -> ModelFacts:
    """Facts of a configuration that its own code has read and written out whole."""
    text = Section(config.get("text_config") or {}, "text_config.", where)
    top = Section(config, "", where)
    tokens = top.number("mm_tokens_per_image") or top.number("image_seq_length")
    tied = any(part.flag("tie_word_embeddings", False) for part in (top, text))
    known = {"tokens_per_image": tokens, "vision": _tower(config, where), "tied": tied}
    return described(config, text, where, **known)


def _tower(config: Config, where: str) -> VisionFacts | None:
    """Of images of one size; what such a tower holds is not counted."""
    given: Any = config.get("vision_config")
    if not isinstance(given, Mapping):
        return None
    vision = Section(given, "vision_config.", where)
    try:
        side, patch = vision.side("image_size"), vision.side("patch_size")
        layers, hidden = vision.size("num_hidden_layers"), vision.size("hidden_size")
        heads = vision.size("num_attention_heads")
    except CheckpointError:  # under names of its own
        return None
    return VisionFacts(
        layers=layers,
        layers_run=layers,
        hidden=hidden,
        heads=heads,
        intermediate=vision.number("intermediate_size") or 4 * hidden,
        tokens=(side // patch) ** 2,
        image_size=side,
        patch_size=patch,
        channels=vision.number("num_channels") or 3,
        has_cls=False,
        parameters=0,
    )
