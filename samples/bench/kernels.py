"""Where the time of a prefill goes, and how large every value is: ONNX Runtime's own profile."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from decoders import Decoder, Prompt
from measure import table

from vtr_export.runtime.session import DTYPES, Port, Value


@dataclass(frozen=True)
class Kernel:
    """One run of one node."""

    node: str
    op: str
    milliseconds: float
    outputs: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each


class Profiled:
    """A session on the CPU that writes down every kernel it runs."""

    def __init__(self, graph: Path, threads: int, folder: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/run"
        self._session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {node.name: _port(node) for node in self._session.get_inputs()}
        self.outputs = {node.name: _port(node) for node in self._session.get_outputs()}

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        resident: Collection[str] = (),
    ) -> dict[str, Value]:
        """Run once; nothing is resident."""
        names = list(outputs or self.outputs)
        cast = {name: np.asarray(value).astype(self.inputs[name].dtype, copy=False)
                for name, value in feeds.items()}  # fmt: skip
        return dict(zip(names, self._session.run(names, cast), strict=True))

    def end(self) -> Any:
        """The events so far."""
        return json.loads(Path(self._session.end_profiling()).read_text())


def _port(node: Any) -> Port:
    return Port(node.name, tuple(node.shape), DTYPES.get(node.type, node.type))


def profile(graph: Path, prompt: Prompt, threads: int) -> list[Kernel]:
    """The kernels of one prefill, in order; one prefill went before it."""
    with tempfile.TemporaryDirectory() as folder:
        session = Profiled(graph, threads, folder)
        decoder = Decoder(session)
        for _ in range(2):
            decoder.logits(prompt)
        kernels = list(_kernels(session.end()))
    return kernels[len(kernels) // 2 :]


def _kernels(events: Any) -> Iterator[Kernel]:
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        outputs = tuple(
            (dtype, tuple(shape))
            for output in facts.get("output_type_shape", ())
            for dtype, shape in output.items()
        )
        name = event["name"].removesuffix("_kernel_time")
        yield Kernel(name, facts.get("op_name", "?"), event["dur"] / 1e3, outputs)


def by_operator(kernels: Sequence[Kernel], most: int = 12) -> str:
    """A table of the costliest operators."""
    spent, count = defaultdict[str, float](float), defaultdict[str, int](int)
    for kernel in kernels:
        spent[kernel.op] += kernel.milliseconds
        count[kernel.op] += 1
    total = sum(spent.values())
    rows = [("operator", "kernels", "ms", "share")]
    costliest = sorted(spent, key=lambda op: -spent[op])[:most]
    rows += [
        (op, str(count[op]), f"{spent[op]:.1f}", f"{spent[op] / total:.1%}") for op in costliest
    ]
    rows.append(("all", str(len(kernels)), f"{total:.1f}", "100%"))
    return table(rows)
