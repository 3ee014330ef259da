"""``vtr verify``: whether an artifact says what its checkpoint says."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vtr_export.cli.output import Json, columns, progress, report, warn

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
    with progress() as announce:
        if model is None:
            from vtr_export.verify import verify_artifact

            announce("hash the files and replay the golden vectors")
            gates: Sequence[Gate] = verify_artifact(artifact)
        else:
            announce("compare with the checkpoint")
            gates = _against(artifact, model, scope)
    passed = all(gate.passed for gate in gates)
    values = {
        "artifact": str(artifact),
        "passed": passed,
        "gates": [gate.model_dump() for gate in gates],
    }
    report(values, gate_lines(gates), as_json)
    if not passed:
        raise typer.Exit(1)


def gate_lines(gates: "Sequence[Gate]") -> list[str]:
    """What was measured beside its bar."""
    return columns(
        [
            (
                "ok" if gate.passed else "FAILED",
                gate.name,
                f"{gate.measured:.6g}",
                f"bar {gate.bar:g}",
                gate.detail,
            )
            for gate in gates
        ]
    )


def _against(artifact: Path, model: str, scope: str) -> "Sequence[Gate]":
    """The gates of an export, on an artifact that was published before."""
    from vtr_export.checkpoint import Checkpoint
    from vtr_export.families import read_facts
    from vtr_export.manifest import Manifest
    from vtr_export.schedule import Schedule
    from vtr_export.verify import choose_scope, verify_export

    manifest = Manifest.load(artifact)
    checkpoint = Checkpoint.open(model)
    if checkpoint.config_sha256 != manifest.source.config_sha256:
        warn([f"{checkpoint.folder} is not the checkpoint this artifact was exported from"])
    facts = read_facts(checkpoint.config, str(checkpoint.folder / "config.json"))
    schedule = Schedule.parse(manifest.schedule.text, str(artifact / "schedule.yaml"))
    outcome = verify_export(
        artifact,
        checkpoint.folder,
        schedule.resolve(facts),
        dtype=manifest.dtype,
        scope=choose_scope(facts) if scope == "auto" else scope,
        golden=False,
    )
    warn(outcome.warnings)
    return outcome.gates
