"""``vtr verify``: whether an artifact says what its checkpoint says."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtr_export.cli.output import Json, columns, progress, report, warn
from vtr_export.errors import InputError

if TYPE_CHECKING:
    from vtr_export.manifest import Gate


def verify(
    artifact: Annotated[Path, typer.Argument(help="Folder that vtr export published.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Its checkpoint: compare with that, by torch."),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="With --model: auto, all, or layers:K for the first K layers.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Replay an artifact's golden vectors, without torch."""
    if model is None and scope != "auto":
        raise InputError("golden vectors are replayed whole", hint="--scope goes with --model")
    with progress() as announce:
        if model is None:
            from vtr_export.verify import verify_artifact

            announce("hash the files and replay the golden vectors")
            gates: Sequence[Gate] = verify_artifact(artifact)
        else:
            announce("compare with the checkpoint")
            gates = _against(artifact, model, scope)
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


def gate_lines(gates: "Sequence[Gate]") -> list[str]:
    """What was measured beside what is required."""
    from vtr_export.verify.gates import measured, required

    head = [("", "gate", "measured", "required", "")] if gates else []
    words = {True: "ok", False: "FAILED"}
    rows = [(words[g.passed], g.name, measured(g), required(g), g.detail) for g in gates]
    return columns([*head, *rows])


def _against(artifact: Path, model: str, scope: str) -> "Sequence[Gate]":
    """The gates of an export, on an artifact that was published before."""
    from vtr_export.checkpoint import Checkpoint
    from vtr_export.families import read_facts
    from vtr_export.manifest import Manifest
    from vtr_export.schedule import Schedule
    from vtr_export.verify import check_scope, choose_scope, verify_export

    manifest = Manifest.load(artifact)
    checkpoint = Checkpoint.open(model)
    if checkpoint.config_sha256 != manifest.source.config_sha256:
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
    )
    warn(outcome.warnings)
    return outcome.gates
