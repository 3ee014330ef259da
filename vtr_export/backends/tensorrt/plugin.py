"""Which plugin stands behind ``vtr::VtrTopKPrune``: a compiled library, the Python one, or none.

Both shells launch the same kernel. A library is trusted by the notes beside it (``<library>.json``,
written by whoever compiled it): they name the kernel's sources by their hash.
"""

import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import onnx_ir as ir

from vtr_export.backends.tensorrt import kernel, python_plugin
from vtr_export.backends.tensorrt.library import MODULES, Library
from vtr_export.errors import EngineError, InputError
from vtr_export.ops.prune import PLUGIN_NAMESPACE, PLUGIN_VERSION, PRUNE, is_prune

Kind = Literal["library", "python"]
VARIABLE: Final = "VTR_PLUGIN_PATH"
_REBUILD: Final = "vtr build-plugin"
_registered: dict[str, Any] = {}  # a creator, or a library's handle, must outlive its engines


@dataclass(frozen=True)
class Plugin:
    """A plugin that can be registered.

    ``sha256`` is that of the kernel's sources, ``path`` a library or the sources' folder, ``sms``
    what it was compiled for (empty: whichever GPU it meets), ``targets`` what loads it.
    ``passed_over`` says why another was not taken.
    """

    kind: Kind
    sha256: str
    path: Path
    sms: tuple[int, ...] = ()
    targets: tuple[str, ...] = tuple(MODULES)
    version: str = PLUGIN_VERSION
    passed_over: tuple[str, ...] = ()

    def register(self, library: Library) -> None:
        """Make TensorRT take it for our node; before parsing or deserialising, once or often.

        Raises EngineError when TensorRT refuses it, or holds another one under the same name.
        """
        registry = library.trt.get_plugin_registry()
        mine = _registered.get(library.target)
        if registry.get_creator(PRUNE, self.version, PLUGIN_NAMESPACE) is not None:
            if mine is not None and mine[0] == (self.kind, self.path):
                return
            raise EngineError(
                f"another plugin {PRUNE} {self.version} is registered already",
                hint="use one process for one plugin",
            )
        held = self._load(library, registry)
        if registry.get_creator(PRUNE, self.version, PLUGIN_NAMESPACE) is None:
            raise EngineError(
                f"{library.target} {library.version} does not load the plugin",
                where=str(self.path),
                hint=f"{_REBUILD}, or build with --plugin off",
            )
        _registered[library.target] = (self.kind, self.path), held

    def _load(self, library: Library, registry: Any) -> Any:
        if self.kind == "library":
            return registry.load_library(str(self.path))
        creator = python_plugin.classes(library.trt)[1]()
        registry.register_creator(creator, PLUGIN_NAMESPACE)
        return creator

    def why_it_cannot_run(self) -> str | None:
        """What launching it lacks on this machine (building lacks nothing); None: nothing."""
        if self.kind == "library":
            return None
        if not _is_there("cuda.bindings"):
            return "to run, it needs cuda-bindings"
        finder = importlib.import_module("cuda.pathfinder")  # comes with cuda-bindings
        try:
            finder.load_nvidia_dynamic_lib("nvrtc")
        except finder.DynamicLibNotFoundError:
            return "to run, it needs nvidia-cuda-nvrtc"
        return None


def find(
    choice: Literal["auto", "on", "off"], target: str, *, needed: bool = False
) -> Plugin | None:
    """The plugin to build or run with.

    ``auto``: a compiled library, else the Python plugin if ``needed`` (a cut keeps more than
    TensorRT's own TopK can), else none. ``on``: a library, else the Python plugin. Raises
    UnavailableError when neither can be had.
    """
    if choice not in ("auto", "on", "off"):
        raise InputError(f"no plugin choice {choice!r}", hint="one of: auto, on, off")
    if choice == "off":
        return None
    refused = []
    for path in candidates():
        library, why = read_library(path, target)
        if library is not None:
            return library
        refused.append(f"{path}: {why}")
    if choice == "auto" and not needed:
        return None
    return in_python(tuple(refused))


def in_python(passed_over: tuple[str, ...] = ()) -> Plugin:
    """The plugin that needs no compiler; UnavailableError where its sources are not."""
    return Plugin("python", kernel.sha256(), kernel.sources(), passed_over=passed_over)


def candidates() -> Iterator[Path]:
    """Libraries that may be there: the one that is asked for, else where ours are written."""
    if named := os.environ.get(VARIABLE):
        path = Path(named).expanduser()
        yield path / kernel.LIBRARY if path.is_dir() else path
    elif kernel.library_path().exists():
        yield kernel.library_path()


def notes_file(library: Path) -> Path:
    """What whoever compiled ``library`` wrote about it."""
    return library.with_name(f"{library.name}.json")


def read_library(path: Path, target: str | None = None) -> tuple[Plugin | None, str]:
    """The plugin in the library ``path``, or why it is refused (for ``target``); loads nothing."""
    if not path.is_file():
        return None, "there is no such file"
    try:
        notes = json.loads(notes_file(path).read_text(encoding="utf-8"))
        said = {key: notes[key] for key in ("plugin", "version", "sha256", "targets", "sms")}
        sms = tuple(int(sm) for sm in said["sms"])
        targets = tuple(str(name) for name in said["targets"])
    except OSError as error:
        return None, f"{notes_file(path).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return None, f"{notes_file(path).name} says too little ({type(error).__name__}: {error})"
    for key, expected in (
        ("plugin", PRUNE),
        ("version", PLUGIN_VERSION),
        ("sha256", kernel.sha256()),
    ):
        if said[key] != expected:
            return None, f"its {key} is {said[key]}, this vtr-export has {expected}"
    if (size := path.stat().st_size) != notes.get("bytes", size):
        return None, f"it has {size} bytes, its notes say {notes['bytes']}"
    if target is not None and target not in targets:
        return None, f"compiled for {', '.join(targets)}, not for {target}"
    return Plugin("library", said["sha256"], path, sms, targets), ""


def serves(model: ir.Model) -> str | None:
    """None when the plugin can stand behind every cut of ``model``; else why not."""
    cuts = [node for node in model.graph if is_prune(node)]
    if not cuts:
        return "no cut of the graph ranks by attention and drops, and does no more"
    return next((why for node in cuts if (why := _refusal(node)) is not None), None)


def _refusal(node: ir.Node) -> str | None:
    if "plugin_namespace" not in node.attributes:
        return (
            f"{node.name} names no plugin: none bends logits (softcap), and old artifacts lack it"
        )
    said = ((name, node.attributes[name].as_string()) for name in python_plugin.SERVED)
    return next((why for name, word in said if (why := python_plugin.refusal(name, word))), None)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False
