"""``vtr export`` (= ``vtr-export``): checkpoint and schedule to artifact."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtr_export.cli.build import built_lines
from vtr_export.cli.output import (
    Json,
    Plugin,
    Sms,
    Target,
    TrustRemoteCode,
    Verbose,
    columns,
    progress,
    report,
    runs,
    warn,
)
from vtr_export.cli.retrofit import (
    EmbeddingFile,
    ImageTokenId,
    ImageTokens,
    Onnx,
    VisionMask,
    check_options,
    cut_foreign,
)
from vtr_export.cli.verify import gate_lines
from vtr_export.errors import InputError
from vtr_export.process import size

if TYPE_CHECKING:
    from vtr_export.exporter import Report


class Dtype(StrEnum):
    """What weights and activations are held in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Placing(StrEnum):
    """Where the artifact's weights are."""

    COPY = "copy"
    LINK = "link"


def export(
    schedule: Annotated[Path, typer.Option("--schedule", "-s", help="Schedule to compile (YAML).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to publish the artifact.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Checkpoint folder or cached hub id; default: model: of the schedule.",
        ),
    ] = None,
    onnx: Onnx = None,
    image_tokens: ImageTokens = None,
    image_token_id: ImageTokenId = None,
    vision_mask: VisionMask = False,
    embedding: EmbeddingFile = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.FP32,
    weights: Annotated[
        Placing, typer.Option(help="copy travels; link points into the checkpoint's shards.")
    ] = Placing.COPY,
    verify: Annotated[
        str, typer.Option(help="auto, all, or layers:K for the first K layers.")
    ] = "auto",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Publish unverified.")] = False,
    tunable: Annotated[
        bool, typer.Option("--tunable", help="Leave keep a graph input, one number per cut.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    dump: Annotated[
        Path | None, typer.Option(help="Write each graph as text after every pass there.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, read no weight, write nothing.")
    ] = False,
    target: Target = "onnxruntime",
    sm: Sms = None,
    plugin: Plugin = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compile a checkpoint (or ONNX decoder) and a schedule."""
    check_options(
        onnx is not None,
        {
            "--model": model is not None,
            "--dtype": dtype is not Dtype.FP32,
            "--weights": weights is not Placing.COPY,
            "--verify": verify != "auto",
            "--dump": dump is not None,
            "--dry-run": dry_run,
            "--target": target != "onnxruntime",
            "--trust-remote-code": trust_remote_code,
        },
        {
            "--image-tokens": image_tokens is not None,
            "--image-token-id": image_token_id is not None,
            "--vision-mask": vision_mask,
            "--embedding": embedding is not None,
        },
    )
    if onnx is not None:
        from vtr_export.retrofit.cut import Request

        given = onnx, schedule, out, image_tokens, image_token_id, tunable, not no_verify, force
        cut_foreign(Request(*given, vision_mask, embedding), as_json, verbose)
        return
    if no_verify and verify != "auto":
        raise InputError("--verify and --no-verify exclude each other", hint="give one of them")
    from vtr_export.exporter import export as compile_artifact
    from vtr_export.targets import parse_sms

    with progress() as announce:
        done = compile_artifact(
            schedule,
            model,
            out,
            dtype=dtype.value,
            weights=weights.value,
            verify="none" if no_verify else verify,
            tunable=tunable,
            force=force,
            dump=dump,
            dry_run=dry_run,
            target=target,
            sms=() if sm is None else parse_sms(sm),
            plugin=plugin,
            trust_remote_code=trust_remote_code,
            progress=announce,
            detail=announce.detail,
        )
    warn(done.warnings)
    report(done.to_json(), _lines(done, verbose), as_json)


def _lines(done: "Report", verbose: bool) -> Iterator[str]:
    sizes = {name: count for name, count in done.files.items() if count is not None}
    if done.dry_run:
        yield f"would write {done.artifact}: {len(done.files)} files"
    else:
        yield f"wrote {done.artifact}: {len(done.files)} files, {size(sum(sizes.values()))}"
    if done.vision_tokens_per_layer is not None:
        yield f"vision tokens per layer: {runs(done.vision_tokens_per_layer)}"
    if not done.dry_run:
        yield f"verified: {done.scope if done.verified else 'no'}"
    yield f"{done.seconds:.1f} s, peak RSS {size(done.peak_rss_bytes)}"
    if done.build is not None:
        yield from built_lines(done.build, verbose)
    if verbose:
        yield from columns([(f"{seconds:8.2f} s", name) for name, seconds in done.steps.items()])
        yield from gate_lines(done.gates)
        yield from columns(
            [(name, size(sizes[name]) if name in sizes else "") for name in done.files]
        )
