"""``vtr verify``: whether an artifact, or an engine of it, says what its checkpoint says."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from vtr_export.cli.output import Json, TrustRemoteCode, columns, progress, report, warn
from vtr_export.errors import InputError

if TYPE_CHECKING:
    from vtr_export.manifest import Gate

NOT_EXECUTED: Final = 3  # exit status: what was looked at is right, the engine did not run


def verify(
    artifact: Annotated[
        Path, typer.Argument(help="Folder that vtr export or vtr build published.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Its checkpoint: compare with that, by torch."),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="With --model: auto, all, or layers:K for the first K layers.")
    ] = "auto",
    onnxruntime: Annotated[
        Path | None,
        typer.Option(help="Of an engine: compare with this artifact in ONNX Runtime, too."),
    ] = None,
    files: Annotated[
        bool, typer.Option("--files", help="Of an engine: look at its files alone; no GPU needed.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Replay golden vectors of an artifact or engine.

    Neither needs torch. An engine needs its GPU: where it cannot run, its files are checked and the
    exit status is 3.
    """
    from vtr_export.published import kind_of

    if model is None and scope != "auto":
        raise InputError("golden vectors are replayed whole", hint="--scope goes with --model")
    if kind_of(artifact) == "engine":
        _engine(artifact, model, onnxruntime, files, as_json)
        return
    if onnxruntime is not None or files:
        option = "--files" if files else "--onnxruntime"
        raise InputError(
            f"{option} goes with an engine, and this is an artifact", hint="leave it out"
        )
    with progress() as announce:
        if model is None:
            from vtr_export.verify import verify_artifact

            announce("hash the files and replay the golden vectors")
            gates: Sequence[Gate] = verify_artifact(artifact)
        else:
            announce("compare with the checkpoint")
            gates = _against(artifact, model, scope, trust_remote_code)
    failed = sum(not gate.passed for gate in gates)
    values = {
        "artifact": str(artifact),
        "passed": not failed,
        "gates": [gate.model_dump() for gate in gates],
    }
    summary = f"{failed} of {len(gates)} gates failed" if failed else f"all {len(gates)} gates pass"
    report(values, [*gate_lines(gates), summary], as_json)
    if failed:
        raise typer.Exit(1)


def _engine(
    folder: Path, model: str | None, onnxruntime: Path | None, files: bool, as_json: bool
) -> None:
    if model is not None:
        raise InputError(
            "an engine is compared with its artifact's golden vectors, not with a checkpoint",
            hint="vtr verify ARTIFACT --model FOLDER compares the artifact",
        )
    from vtr_export.verify.engine import verify_engine

    with progress() as announce:
        announce("hash the files" if files else "hash the files and replay the golden vectors")
        found = verify_engine(folder, artifact=onnxruntime, run=not files)
    passed = not found.failed
    values = {
        "engine": str(folder),
        "executed": found.executed,
        "passed": passed if found.executed or not passed else None,
        "checked": found.checked,
        "not_checked": found.not_checked,
        "gates": [gate.model_dump() for gate in found.gates],
    }
    lines = [*gate_lines(found.gates), *(f"checked: {what}" for what in found.checked)]
    lines += [f"NOT checked: {what}" for what in found.not_checked]
    lines.append(_summary(found.executed, found.failed, len(found.gates)))
    report(values, lines, as_json)
    if not passed:
        raise typer.Exit(1)
    if not (found.executed or files):
        raise typer.Exit(NOT_EXECUTED)


def _summary(executed: bool, failed: int, count: int) -> str:
    if failed:
        return f"{failed} of {count} gates failed"
    return f"all {count} gates pass" if executed else "the engine was NOT executed"


def gate_lines(gates: "Sequence[Gate]") -> list[str]:
    """What was measured beside what is required."""
    from vtr_export.verify.gates import measured, required

    head = [("", "gate", "measured", "required", "")] if gates else []
    words = {True: "ok", False: "FAILED"}
    rows = [(words[g.passed], g.name, measured(g), required(g), g.detail) for g in gates]
    return columns([*head, *rows])


def _against(artifact: Path, model: str, scope: str, trusted: bool) -> "Sequence[Gate]":
    """The gates of an export, on an artifact that was published before."""
    from vtr_export.checkpoint import Checkpoint, find_folder
    from vtr_export.families import read_facts
    from vtr_export.frontends.remote import run_config
    from vtr_export.manifest import Manifest
    from vtr_export.schedule import Schedule
    from vtr_export.verify import check_scope, choose_scope, verify_export

    manifest = Manifest.load(artifact)
    folder = find_folder(model)
    checkpoint = Checkpoint.open(folder, run_config(folder, trusted))
    source = manifest.source
    if (checkpoint.config_sha256, checkpoint.code) != (source.config_sha256, source.remote_code):
        warn([f"{checkpoint.folder} is not the checkpoint this artifact was exported from"])
    facts = read_facts(checkpoint.config, str(checkpoint.folder / "config.json"))
    if scope == "auto":
        scope = choose_scope(facts, dtype=manifest.dtype)
    schedule = Schedule.parse(manifest.schedule.text, str(artifact / "schedule.yaml"))
    outcome = verify_export(
        artifact,
        checkpoint.folder,
        schedule.resolve(facts),
        dtype=manifest.dtype,
        scope=check_scope(scope, facts.layers),
        golden=False,
        trusted=trusted,
    )
    warn(outcome.warnings)
    return outcome.gates
