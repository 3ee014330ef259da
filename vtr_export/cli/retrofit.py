"""``vtr export --onnx``: cuts for a decoder that another tool exported."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtr_export.cli.output import columns, progress, report, runs
from vtr_export.cli.verify import gate_lines
from vtr_export.errors import InputError
from vtr_export.process import size

if TYPE_CHECKING:
    from vtr_export.retrofit.cut import Request
    from vtr_export.retrofit.retrofit import Report

Onnx = Annotated[
    Path | None,
    typer.Option("--onnx", help="Cut this decoder (ONNX, from any exporter), not a checkpoint."),
]
ImageTokens = Annotated[
    int | None,
    typer.Option(min=1, help="With --onnx: vision tokens of an image; without it, shares only."),
]
ImageTokenId = Annotated[
    int | None,
    typer.Option(
        min=0, help="With --onnx and input_ids: these ids are vision tokens; no vision_index then."
    ),
]
VisionMask = Annotated[
    bool,
    typer.Option(
        "--vision-mask", help="With --onnx: the decoder takes vision_mask, not vision_index."
    ),
]
EmbeddingFile = Annotated[
    Path | None,
    typer.Option(
        "--embedding",
        help="With --onnx: the graph that makes inputs_embeds; published with a vision_mask.",
    ),
]


def check_options(
    is_foreign: bool, checkpoint: Mapping[str, bool], onnx: Mapping[str, bool]
) -> None:
    """InputError for an option that is given and belongs to the other kind of export."""
    wrong = [name for name, given in (checkpoint if is_foreign else onnx).items() if given]
    if wrong:
        kind = "a foreign decoder (--onnx)" if is_foreign else "a checkpoint"
        raise InputError(f"{wrong[0]} says nothing about {kind}", hint=f"leave {wrong[0]} out")


def cut_foreign(request: "Request", as_json: bool, verbose: bool) -> None:
    """Cut, compare, publish, report."""
    from vtr_export.retrofit.retrofit import retrofit

    with progress() as announce:
        done = retrofit(request, announce)
    report(done.to_json(), _lines(done, verbose), as_json)


def _lines(done: "Report", verbose: bool) -> Iterator[str]:
    total = size(sum(done.files.values()))
    yield f"wrote {done.artifact}: {len(done.files)} files, {total}"
    kinds = sorted(set(done.attention))
    yield f"{done.layers} layers, attention: {', '.join(kinds)}"
    if done.vision_tokens_per_layer is not None:
        yield f"vision tokens per layer: {runs(done.vision_tokens_per_layer)}"
    yield f"inputs: {', '.join(name for name in done.inputs if not name.startswith('past_'))}"
    yield f"compared with the given decoder: {'yes' if done.verified else 'no'}"
    yield f"{done.seconds:.1f} s"
    if verbose:
        yield from columns([(f"{seconds:8.2f} s", name) for name, seconds in done.steps.items()])
        yield from gate_lines(done.gates)
