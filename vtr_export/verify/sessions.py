"""Graphs opened for a comparison: as they are, forced, tapped, or as their fp32 twin."""

import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vtr_export.errors import ArtifactError
from vtr_export.manifest import Manifest
from vtr_export.passes.widen import Widen
from vtr_export.runtime.session import Array, Port, Session, Value, open_session
from vtr_export.verify.case import Ints

_FOLDER = "session.model_external_initializers_file_folder_path"
_ERRORS_ONLY = 3
_END = 150  # characters of either end of a long error
SHOWN = ("score.", "stream.")  # outputs that only a verification asks for
_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}


class GraphError(Exception):
    """ONNX Runtime does not open or run a graph: a finding, not an accident."""


@dataclass(frozen=True)
class Parts:
    """Three graphs and how to open them; typed ones are opened as their fp32 twins."""

    vision: Path
    embedding: Path
    decoder: Path
    dtype: str
    shards: Mapping[str, Path]  # linked weights, by location name
    keep: Ints | None  # what a tunable decoder is to be given
    cut_layers: tuple[int, ...] = ()  # the layer each cut stands before
    lowering: tuple[ir.passes.PassBase, ...] = ()  # of the target they are checked for
    beside: bool = False  # image features are no tokens
    compaction: Path | None = None  # of the cache, behind a prefill

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> "Parts":
        """Those of an artifact."""
        graphs = manifest.graphs
        keeps = [stage.keep.numerator for stage in manifest.model.stages if stage.keep is not None]
        return cls(
            vision=folder / graphs.vision_encoder,
            embedding=folder / graphs.embed_tokens,
            decoder=folder / graphs.decoder,
            dtype=manifest.dtype,
            shards=manifest.linked_shards(),
            keep=np.array(keeps, np.int64) if manifest.tunable else None,
            cut_layers=tuple(stage.first_layer for stage in manifest.model.stages[1:]),
            beside=manifest.model.features != "tokens",
            compaction=None if graphs.compact_cache is None else folder / graphs.compact_cache,
        )

    def with_decoder(
        self,
        decoder: Path,
        keep: Ints,
        cut_layers: tuple[int, ...],
        compaction: Path | None,
    ) -> "Parts":
        """The same with another decoder, and what compacts its cache."""
        given = keep if self.keep is not None else None
        return replace(
            self, decoder=decoder, keep=given, cut_layers=cut_layers, compaction=compaction
        )

    def open_compaction(self) -> Session | None:
        """The graph that runs behind a prefill, if there is one."""
        return None if self.compaction is None else self.open(self.compaction)

    def open(
        self,
        file: Path,
        passes: Sequence[ir.passes.PassBase] = (),
        then: Sequence[ir.passes.PassBase] = (),
    ) -> Session:
        """``file`` after ``passes``, lowered, widened, and after ``then``.

        Untouched files go the way every user's go.
        """
        with speaking_of(file.stem):
            steps = (
                *passes,
                *self.lowering,
                *([Widen()] if self.dtype != "fp32" else []),
                *then,
            )
            if not steps:
                return Spoken(open_session(file, shards=self.shards or None), file.stem)
            return Spoken(Rewritten(file, steps, self.shards), file.stem)


@contextmanager
def speaking_of(name: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises into GraphError."""
    try:
        yield
    except ArtifactError as error:
        raise GraphError(error.message) from error
    except Exception as error:
        if not _is_of_onnxruntime(error):
            raise
        raise GraphError(f"{name}: {_shortened(str(error))}") from error


def _is_of_onnxruntime(error: Exception) -> bool:
    """Its own classes have its module; what a bound run raises has not."""
    own = type(error).__module__.startswith("onnxruntime")
    return own or (isinstance(error, RuntimeError) and str(error).startswith("Error in execution"))


def _shortened(message: str) -> str:
    """On one line, without the C++ signature in the middle: the ends say what and why."""
    words = " ".join(message.split())
    return words if len(words) <= 2 * _END else f"{words[:_END]} … {words[-_END:]}"


class Spoken:
    """A session that fails with GraphError."""

    def __init__(self, session: Session, name: str) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self._session, self._name = session, name

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """See :class:`Session`."""
        with speaking_of(self._name):
            return self._session.run(feeds, outputs, resident=resident)


class Rewritten:
    """A graph changed by passes in memory; its weights stay in their files."""

    def __init__(
        self, file: Path, passes: Sequence[ir.passes.PassBase], shards: Mapping[str, Path]
    ) -> None:
        """Open ``file``, which is left as it is."""
        import onnxruntime

        model = ir.load(file)
        for step in passes:
            model = step(model).model
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry(_FOLDER, str(file.parent.absolute()))
        content = ir.to_proto(model).SerializeToString()
        with ExitStack() as stack:
            if shards:
                views = [stack.enter_context(_mapped(path)) for path in shards.values()]
                sizes = [len(view) for view in views]
                options.add_external_initializers_from_files_in_memory(list(shards), views, sizes)
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        self.inputs = {port.name: port for port in map(_port, self._session.get_inputs())}
        self.outputs = {port.name: port for port in map(_port, self._session.get_outputs())}

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """See :class:`Session`."""
        names = list(self.outputs) if outputs is None else list(outputs)
        arrays = {
            name: np.asarray(value).astype(self.inputs[name].dtype, copy=False)
            for name, value in feeds.items()
        }
        return dict(zip(names, self._session.run(names, arrays), strict=True))


class Forced:
    """A decoder whose keep-sets are inputs, with the face of one that chooses by itself.

    ``shown`` collects, call by call, what the graph shows beyond a decoder's outputs.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs = {n: p for n, p in session.inputs.items() if not n.startswith("kept")}
        self._extra = [name for name in session.outputs if name.startswith(SHOWN)]
        sets = {n: p for n, p in session.inputs.items() if n.startswith("kept.")}
        self.outputs = {n: p for n, p in session.outputs.items() if n not in self._extra} | sets
        self._kept: dict[str, Array] = {}
        self.shown: list[dict[str, Array]] = []

    @property
    def cuts(self) -> int:
        """How many keep-sets it takes."""
        return sum(name.startswith("kept.") for name in self._session.inputs)

    def force(
        self, kept: Sequence[Ints], kept_vision: Sequence[Ints], labels: Sequence[Ints] = ()
    ) -> None:
        """Set what the next calls keep, and whose cluster their tokens are."""
        sets = {"kept": kept, "kept_vision": kept_vision, "kept_label": labels}
        self._kept = {
            f"{name}.{cut}": values for name, of in sets.items() for cut, values in enumerate(of)
        }

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """See :class:`Session`."""
        names = [name for name in outputs or self.outputs if name not in self._kept]
        results = self._session.run(
            {**feeds, **self._kept}, [*names, *self._extra], resident=resident
        )
        self.shown.append({name: np.asarray(results.pop(name)) for name in self._extra})
        return {**results, **self._kept}


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        yield view


def _port(node: Any) -> Port:
    return Port(node.name, tuple(node.shape), _NUMPY.get(node.type, node.type))
