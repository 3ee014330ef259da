"""Checkpoint and schedule to a published artifact: every step of an export, in order."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtr_export import assemble
from vtr_export.checkpoint import Checkpoint, find_folder, read_config
from vtr_export.errors import GateError, ScheduleError, UnavailableError
from vtr_export.families import ModelFacts, read_facts
from vtr_export.manifest import File, Gate, Manifest, hash_files
from vtr_export.schedule import Resolved, Schedule

if TYPE_CHECKING:
    from vtr_export.weights import WeightsReport

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to export; see ``vtr export --help``."""

    dtype: str = "fp32"
    weights: str = "copy"
    verify: str = "auto"
    tunable: bool = False
    force: bool = False
    dump: Path | None = None


@dataclass(frozen=True)
class Report:
    """What an export did: seconds by step, this process's peak memory, files with their sizes."""

    artifact: str
    verified: bool
    scope: str
    seconds: float
    peak_rss_bytes: int
    files: dict[str, int]
    vision_tokens_per_layer: tuple[int, ...] | None
    gates: tuple[Gate, ...] = ()
    steps: dict[str, float] = field(default_factory=dict)
    verification: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``gates`` as dicts."""
        return asdict(self) | {"gates": [gate.model_dump() for gate in self.gates]}


class _Clock:
    """Seconds by step, each announced as it begins."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.steps = progress, dict[str, float]()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.steps[name] = round(time.perf_counter() - start, 3)


def export(
    schedule: Schedule | str | Path,
    model: str | Path | None = None,
    out: str | Path = "artifact",
    *,
    dtype: str = "fp32",
    weights: str = "copy",
    verify: str = "auto",
    tunable: bool = False,
    force: bool = False,
    dump: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compile ``model`` (a checkpoint folder or cached hub id) by ``schedule`` into ``out``.

    ``dtype`` fp32, fp16 or bf16; ``weights`` copy or link; ``verify`` auto, all, layers:K or none.
    Raises VtrError for bad input before any weight is read, GateError when the graphs do not say
    what the checkpoint says; ``out`` is then as it was.
    """
    from vtr_export.publish import check_target

    options = Options(dtype, weights, verify, tunable, force, Path(dump) if dump else None)
    clock = _Clock(progress)
    with clock.step("read the configuration"):
        if not isinstance(schedule, Schedule):
            schedule = Schedule.load(schedule)
        folder = find_folder(_model(schedule, model))
        facts = read_facts(read_config(folder)[0], str(folder / "config.json"))
        resolved = schedule.resolve(facts)
        target = Path(out)
        check_target(target, force=force)
    with clock.step("read the headers"):
        checkpoint = Checkpoint.open(folder)
    if dry_run:
        return _dry_report(target, checkpoint, facts, resolved, options, clock)
    return _export(schedule, checkpoint, facts, resolved, target, options, clock)


def _model(schedule: Schedule, model: str | Path | None) -> str | Path:
    """``--model``, or else what the schedule names."""
    found = model if model is not None else schedule.model_location()
    if found is None:
        raise ScheduleError(
            "the schedule names no model",
            where=schedule.source.name,
            hint="add `model: FOLDER` to it, or give --model",
        )
    return found


def _export(
    schedule: Schedule,
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    target: Path,
    options: Options,
    clock: _Clock,
) -> Report:
    from vtr_export.publish import publish

    with publish(target, force=options.force) as staging:
        written = _write_graphs(checkpoint, facts, resolved, staging, options, clock)
        warnings = assemble.copy_assets(checkpoint, staging)
        (staging / "schedule.yaml").write_text(schedule.dump(), encoding="utf-8")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        draft = _manifest(schedule, checkpoint, facts, resolved, staging, options, written)
        draft.save(staging)
        scope, gates, verification = _verify(checkpoint, facts, resolved, staging, options, clock)
        with clock.step("hash the files"):
            known = {name: draft.files[name] for name in draft.files if name.startswith("onnx/")}
            manifest = draft.model_copy(
                update={
                    "files": hash_files(staging, known),
                    "gates": gates,
                    "verified": scope != "none",
                    "scope": scope,
                    "timings": dict(clock.steps),
                    "peak_rss_bytes": peak,
                }
            )
        manifest.save(staging)
    if scope == "none":
        warnings = [*warnings, "not verified: --no-verify was given"]
    return Report(
        artifact=str(target),
        verified=manifest.verified,
        scope=scope,
        seconds=round(sum(clock.steps.values()), 3),
        peak_rss_bytes=peak,
        files={name: file.bytes for name, file in manifest.files.items()},
        vision_tokens_per_layer=manifest.schedule.keep_per_layer,
        gates=gates,
        steps=dict(clock.steps),
        verification=verification,
        warnings=tuple(warnings),
    )


def _write_graphs(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    staging: Path,
    options: Options,
    clock: _Clock,
) -> "WeightsReport":
    """Trace, cut, place the weights and save; the graphs' weights never meet in memory."""
    with clock.step("import torch and transformers"):
        load = _frontend()
    with clock.step("trace"):
        graphs = load(checkpoint, facts, options.dtype)
    with clock.step("cut"):
        from vtr_export.compile import lower

        models = lower(
            graphs, resolved, weights=options.weights, tunable=options.tunable, dump=options.dump
        )
    folder = staging / assemble.ONNX
    folder.mkdir()
    from vtr_export.weights import link_weights, write_weights

    with clock.step("link weights" if options.weights == "link" else "copy weights"):
        if options.weights == "link":
            written = link_weights(models, checkpoint.folder)
        else:
            written = write_weights(models, folder)
    with clock.step("save the graphs"):
        assemble.save_graphs(models, folder)
    return written


def _frontend() -> Callable[[Checkpoint, ModelFacts, str], Any]:
    try:
        from vtr_export.frontends.transformers import load
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vtr_export"):
            raise
        raise UnavailableError(
            f"exporting needs {error.name!r}, which is not installed",
            hint="pip install 'vtr-export[export,cpu]'",
        ) from error
    return load


def _manifest(
    schedule: Schedule,
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    staging: Path,
    options: Options,
    written: "WeightsReport",
) -> Manifest:
    """The manifest of an artifact that nobody verified yet."""
    known = {
        f"{assemble.ONNX}/{name}": File(bytes=file.size_bytes, sha256=file.sha256)
        for name, file in written.files.items()
    }
    return Manifest(
        versions=assemble.versions(),
        source=assemble.source(checkpoint, written.shards),
        dtype=options.dtype,  # type: ignore[arg-type]  # checked by pydantic
        weights=assemble.weights_place(checkpoint, options.weights),
        weights_scanned=written.weights_scanned,
        schedule=assemble.schedule_facts(schedule, resolved),
        model=assemble.decoder_facts(checkpoint, facts, resolved),
        graphs=assemble.graph_files(),
        tunable=options.tunable,
        files=hash_files(staging, known),
    )


def _verify(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    staging: Path,
    options: Options,
    clock: _Clock,
) -> tuple[str, tuple[Gate, ...], dict[str, float]]:
    """Run the parity gates; raises GateError for the first that fails."""
    if options.verify == "none":
        return "none", (), {}
    from vtr_export.verify import choose_scope, verify_export

    scope = choose_scope(facts) if options.verify == "auto" else options.verify
    with clock.step(f"verify ({scope})"):
        outcome = verify_export(
            staging, checkpoint.folder, resolved, dtype=options.dtype, scope=scope
        )
    failed = [gate for gate in outcome.gates if not gate.passed]
    if failed:
        first = failed[0]
        raise GateError(
            f"{first.name}: measured {first.measured:g}, the bar is {first.bar:g}",
            where=first.detail,
            hint="nothing was published; --no-verify publishes it unverified",
        )
    measured = {"seconds": outcome.seconds, "peak_rss_bytes": float(outcome.peak_rss_bytes)}
    return scope, tuple(outcome.gates), measured


def _dry_report(
    target: Path,
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    options: Options,
    clock: _Clock,
) -> Report:
    """What an export would write; no graph is traced and no weight is read."""
    onnx = list(assemble.graph_files().model_dump().values())
    data = [f"{name}.data" for name in onnx] if options.weights == "copy" else []
    assets = [name for name in assemble.ASSETS if (checkpoint.folder / name).is_file()]
    names = sorted([*onnx, *data, *assets, "schedule.yaml", "manifest.json"])
    tokens = resolved.tokens_per_image
    return Report(
        artifact=str(target),
        verified=False,
        scope="none",
        seconds=round(sum(clock.steps.values()), 3),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        files=dict.fromkeys(names, 0),
        vision_tokens_per_layer=None if tokens is None else tuple(resolved.keep_per_layer(tokens)),
        steps=dict(clock.steps),
        warnings=tuple(assemble.missing_assets(checkpoint.folder)),
        dry_run=True,
    )
