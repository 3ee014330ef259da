"""A checkpoint in another layout: its configuration, tensors and small files in transformers'."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtr_export.layouts import internvl_chat, internvl_files, internvl_tensors

if TYPE_CHECKING:
    from vtr_export.checkpoint import TensorRef

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """How to read a folder whose ``config.json`` is not transformers'.

    ``config`` makes transformers' configuration of the same model, from the folder's own and the
    folder. ``tensors`` takes the tensors of the shards by name to those that transformers' model
    would save, by that configuration. ``files`` are texts by name that stand for the folder's own,
    by both configurations and the folder.
    """

    config: Callable[[Config, Path], dict[str, Any]]
    tensors: Callable[[Config, Mapping[str, "TensorRef"]], dict[str, "TensorRef"]]
    files: Callable[[Config, Config, Path], dict[str, str]]


LAYOUTS: Final[Mapping[str, Layout]] = {  # by model_type
    "internvl_chat": Layout(
        internvl_chat.convert, internvl_tensors.convert, internvl_files.convert
    ),
}


def find_layout(config: Config) -> Layout | None:
    """Of a folder's own ``config.json``; None where that is transformers'."""
    kind = config.get("model_type")
    return LAYOUTS.get(kind) if isinstance(kind, str) else None
