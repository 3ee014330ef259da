"""A checkpoint's own code, run because its user asked for it."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vtr_export.checkpoint import CONFIG, read_config
from vtr_export.errors import CheckpointError, UnavailableError
from vtr_export.families import RAN, own_code
from vtr_export.published import sha256_of

MODELS: Final = (  # the class that a checkpoint's model stands for, the likeliest first
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoModelForCausalLM",
    "AutoModel",
)
NEEDED: Final = ("get_image_features", "get_decoder", "get_input_embeddings")


def run_config(folder: Path, trusted: bool) -> dict[str, Any] | None:
    """The configuration as the folder's own code reads it, whole, and that code's hashes.

    None where the folder has no such code, or nobody trusts it. Raises CheckpointError where the
    code is not in the folder, or fails.
    """
    own = own_code(read_config(folder)[0]) if trusted else {}
    if not own:
        return None
    where = str(folder / CONFIG)
    for reference in own.values():
        if "--" in reference:
            raise CheckpointError(
                f"its code lies in another repository ({reference.partition('--')[0]})",
                where=where,
                hint="put those files into the folder, and their names into auto_map",
            )
    try:
        from transformers import AutoConfig
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"exporting needs {error.name!r}, which is not installed",
            hint="pip install 'vtr-export[export,cpu]'",
        ) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        model = get_class_from_dynamic_module(own[model_name(own, where)], str(folder))
        values = _written_out(config)
    except CheckpointError:
        raise
    except Exception as error:  # foreign code raises what it likes
        raise CheckpointError(
            f"the checkpoint's own code fails: {type(error).__name__}: {error}",
            where=where,
            hint="see that it runs with the transformers that is installed here",
        ) from error
    _check(model, where)
    return {**values, RAN: _loaded(model) | _loaded(type(config))}


def model_name(own: Mapping[str, str], where: str) -> str:
    """The name in ``auto_map`` of the class to build."""
    for name in MODELS:
        if name in own:
            return name
    raise CheckpointError(
        "auto_map names no model of images and text",
        where=where,
        hint=f"one of: {', '.join(MODELS)}",
    )


def _check(model: type, where: str) -> None:
    """What the generic frontend asks of a class before it is built."""
    accessors = [name for name in NEEDED if hasattr(model, name)]
    missing = [name for name in NEEDED[1:] if name not in accessors]
    if missing:
        raise CheckpointError(
            f"its own {model.__name__} has no {missing[0]}, by which its parts are found",
            where=where,
            hint=f"models are exported by transformers' accessors: {', '.join(NEEDED)}",
        )


def _written_out(config: Any) -> dict[str, Any]:
    """Every value of a configuration and of its decoder's, under all of their names."""
    values = _plain(config)
    values["text_config"] = _plain(config.get_text_config())
    return values


def _plain(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    aliases = {name: getattr(config, name, None) for name in config.attribute_map}
    values |= {name: value for name, value in aliases.items() if isinstance(value, int)}
    return _without_code(values)


def _without_code(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_code(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name != "auto_map"
    }


def is_foreign(own: type) -> bool:
    """Whether a class came with a checkpoint."""
    return own.__module__.startswith("transformers_modules.")


def _loaded(own: type) -> dict[str, str]:
    """sha256 by file of what was imported with a class, relative to its folder."""
    if not is_foreign(own):
        return {}
    package = own.__module__.rpartition(".")[0] + "."
    return {
        name.removeprefix(package).replace(".", "/") + ".py": sha256_of(Path(module.__file__))
        for name, module in list(sys.modules.items())
        if name.startswith(package) and module.__file__ and not hasattr(module, "__path__")
    }
