"""Checkpoint and schedule to a published artifact: every step of an export, in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vtr_export import assemble
from vtr_export.buildable import check_builds
from vtr_export.builder import build
from vtr_export.checkpoint import Checkpoint, find_folder, read_model_facts
from vtr_export.errors import GateError, InputError, ScheduleError, UnavailableError
from vtr_export.families import ModelFacts
from vtr_export.frontends.remote import run_config
from vtr_export.frontends.tokenizer import write_tokenizer
from vtr_export.manifest import Gate, Manifest
from vtr_export.memory import get_weight_type, weight_bytes
from vtr_export.process import Announce, Clock, peak_rss_bytes
from vtr_export.publish import check_target as check_place
from vtr_export.publish import publish
from vtr_export.published import MANIFEST, hash_files
from vtr_export.schedule import Resolved, Schedule
from vtr_export.target_fit import check_fits_target
from vtr_export.targets import check_name, check_target

if TYPE_CHECKING:
    from vtr_export.verify import Outcome
    from vtr_export.weights import WeightsReport

ENGINES: Final = ("tensorrt", "tensorrt-rtx")
CHOICES: Final = {"dtype": ("fp32", "fp16", "bf16"), "weights": ("copy", "link")}


@dataclass(frozen=True)
class Options:
    """How to export; see ``vtr export --help``. InputError for what no export takes."""

    dtype: str = "fp32"
    weights: str = "copy"
    verify: str = "auto"
    tunable: bool = False
    force: bool = False
    dump: Path | None = None
    target: str = "onnxruntime"
    sms: tuple[int, ...] = ()
    plugin: str = "auto"
    load: Callable[..., Any] | None = None

    @property
    def builds(self) -> bool:
        """Whether engines are built of the artifact."""
        return self.target in ENGINES

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise InputError(f"no {name} {value!r}", hint=f"one of: {', '.join(known)}")
        if self.verify not in ("auto", "none"):
            from vtr_export.verify.scope import layers_of

            layers_of(self.verify, 1)


@dataclass(frozen=True)
class Report:
    """What an export did: seconds by step, this process's peak memory, files with their sizes.

    A dry run knows no size yet: None. Tokens are upper bounds where a threshold drops some.
    """

    artifact: str
    verified: bool
    scope: str
    seconds: float
    peak_rss_bytes: int
    files: Mapping[str, int | None]
    vision_tokens_per_layer: tuple[int, ...] | None
    gates: tuple[Gate, ...] = ()
    steps: dict[str, float] = field(default_factory=dict)
    verification: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    dry_run: bool = False
    build: dict[str, Any] | None = None  # of engines, where a target builds them

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``gates`` as dicts."""
        return asdict(self) | {"gates": [gate.model_dump() for gate in self.gates]}


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
    target: str = "onnxruntime",
    sms: tuple[int, ...] = (),
    plugin: str = "auto",
    trust_remote_code: bool = False,
    load: Callable[..., Any] | None = None,
    progress: Announce | None = None,
    detail: Announce | None = None,
) -> Report:
    """Compile ``model`` (a checkpoint folder or cached hub id) by ``schedule`` into ``out``.

    ``dtype`` fp32, fp16 or bf16; ``weights`` copy or link; ``verify`` auto, all, layers:K or none;
    what ``target`` could not run with one image is refused, and where it builds engines (for
    ``sms``, 86 is SM 8.6) they are built into ``out/<target>``. ``trust_remote_code`` runs code
    that the checkpoint brings; ``load`` traces instead of ours. VtrError for bad input before
    any weight is read, GateError when graphs and checkpoint disagree; ``out`` is then as it was.
    """
    dump = Path(dump) if dump else None
    options = Options(dtype, weights, verify, tunable, force, dump, target, sms, plugin, load)
    clock = Clock(progress)
    with clock.step("read the configuration"):
        if not isinstance(schedule, Schedule):
            schedule = Schedule.load(schedule)
        folder = find_folder(_model(schedule, model))
        ran = run_config(folder, trust_remote_code)
        facts = read_model_facts(folder, ran)
        resolved = schedule.resolve(facts)
        _check_target(schedule, facts, resolved, options)
        check_place(Path(out), force, _needed_bytes(facts, options))
    with clock.step("read the headers"):
        checkpoint = Checkpoint.open(folder, ran)
        assemble.check_assets(checkpoint, resolved, verified=options.verify != "none")
    if dry_run:
        return _dry_report(Path(out), checkpoint, facts, resolved, options, clock)
    done = _export(schedule, checkpoint, facts, resolved, Path(out), options, clock)
    return _with_engines(done, options, progress, detail) if options.builds else done


def _check_target(
    schedule: Schedule, facts: ModelFacts, resolved: Resolved, options: Options
) -> None:
    """Refuse what the target, its GPUs, or what is installed here could not build."""
    target, sms, plugin = options.target, options.sms, options.plugin
    tokens, normed = resolved.entering(facts.tokens_per_image or 0), facts.sandwiched
    if not options.builds:
        check_name(target)
        check_fits_target(schedule, resolved, tokens, target, sandwiched=normed, plugin="off")
        return
    check_target(target, sms, options.dtype)
    check_fits_target(schedule, resolved, tokens, target, sms=sms, sandwiched=normed, plugin=plugin)
    check_builds(target, sms, options.dtype)


def _with_engines(
    done: Report, options: Options, progress: Announce | None, detail: Announce | None
) -> Report:
    """``done``, and engines of its artifact."""
    built = build(
        done.artifact,
        target=options.target,
        sms=options.sms,
        plugin=options.plugin,
        unverified=True,  # as this export was asked to
        progress=progress,
        detail=detail,
    )
    return replace(done, build=built.to_json(), seconds=round(done.seconds + built.seconds, 3))


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


def _needed_bytes(facts: ModelFacts, options: Options) -> int:
    """What the target's disk must hold at least."""
    return weight_bytes(facts, get_weight_type(options.dtype)) if options.weights == "copy" else 0


def _export(
    schedule: Schedule,
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    target: Path,
    options: Options,
    clock: Clock,
) -> Report:
    if options.dump is not None:
        _make(options.dump)
    with publish(target, force=options.force) as staging:
        written = _write_graphs(checkpoint, facts, resolved, staging, options, clock)
        warnings = assemble.copy_assets(checkpoint, staging, write_tokenizer)
        warnings += assemble.limits(facts)
        (staging / "schedule.yaml").write_text(schedule.dump(), encoding="utf-8")
        peak = peak_rss_bytes()
        draft = assemble.draft(
            checkpoint,
            assemble.schedule_facts(schedule, resolved),
            assemble.decoder_facts(checkpoint, facts, resolved),
            staging,
            written,
            dtype=options.dtype,
            weights=options.weights,
            tunable=options.tunable,
            needs=assemble.needed(facts),
        )
        draft.save(staging)
        scope, outcome = _verify(checkpoint, facts, resolved, staging, options, clock)
        gates = () if outcome is None else outcome.gates
        if options.target == "tensorrt-10":
            gates += _lower(staging, draft, clock)
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
        size_bytes = (staging / MANIFEST).stat().st_size
    warnings += ["not verified: --no-verify was given"] if outcome is None else outcome.warnings
    return Report(
        artifact=str(target),
        verified=manifest.verified,
        scope=scope,
        seconds=clock.seconds,
        peak_rss_bytes=peak,
        files={name: file.bytes for name, file in manifest.files.items()} | {MANIFEST: size_bytes},
        vision_tokens_per_layer=manifest.schedule.keep_per_layer,
        gates=gates,
        steps=dict(clock.steps),
        verification=_measured(outcome),
        warnings=tuple(warnings),
    )


def _write_graphs(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    staging: Path,
    options: Options,
    clock: Clock,
) -> "WeightsReport":
    """Trace, cut, place the weights and save; the graphs' weights never meet in memory."""
    with clock.step("import torch and transformers"):
        load = options.load or _frontend()
    with clock.step("trace"):
        graphs = load(checkpoint, facts, options.dtype, whole=bool(resolved.vision))
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


def _frontend() -> Callable[..., Any]:
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


def _verify(
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    staging: Path,
    options: Options,
    clock: Clock,
) -> tuple[str, "Outcome | None"]:
    """Run the parity gates; raises GateError for the first that fails."""
    scope = _scope(facts, options)
    if scope == "none":
        return scope, None
    from vtr_export.verify import verify_export

    with clock.step(f"verify ({scope})"):
        asked = staging, checkpoint.folder, resolved
        trusted = bool(checkpoint.code)
        outcome = verify_export(*asked, dtype=options.dtype, scope=scope, trusted=trusted)
    if not outcome.passed:
        raise _failure(outcome.gates)
    return scope, outcome


def _failure(gates: Sequence[Gate]) -> GateError:
    """What the first failed gate found."""
    from vtr_export.verify.gates import measured, required

    failed = [gate for gate in gates if not gate.passed]
    first = failed[0]
    return GateError(
        f"{len(failed)} of {len(gates)} parity gates failed, first {first.name}: "
        f"{measured(first)}, required {required(first)}",
        where=first.detail,
        hint="nothing was published; --no-verify publishes it unverified",
    )


def _lower(staging: Path, draft: Manifest, clock: Clock) -> tuple[Gate, ...]:
    """Graphs for TensorRT 10 beside the artifact's own; GateError when they say otherwise."""
    from vtr_export.lowering import lower_artifact

    with clock.step("lower for TensorRT 10"):
        gates = tuple(lower_artifact(staging, draft))
    if not all(gate.passed for gate in gates):
        raise _failure(gates)
    return gates


def _scope(facts: ModelFacts, options: Options) -> str:
    """How much of the model is verified."""
    if options.verify == "none":
        return "none"
    from vtr_export.verify import check_scope, choose_scope

    if options.verify == "auto":
        return choose_scope(facts, dtype=options.dtype)
    return check_scope(options.verify, facts.layers)


def _measured(outcome: "Outcome | None") -> dict[str, float]:
    """What the verification took."""
    if outcome is None:
        return {}
    return {"seconds": outcome.seconds, "peak_rss_bytes": float(outcome.peak_rss_bytes)}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--dump cannot be written: {error.strerror}",
            where=str(folder),
            hint="give a folder that you may write to",
        ) from None


def _dry_report(
    target: Path,
    checkpoint: Checkpoint,
    facts: ModelFacts,
    resolved: Resolved,
    options: Options,
    clock: Clock,
) -> Report:
    """What an export would write; no graph is traced and no weight is read."""
    onnx = list(assemble.graph_files(resolved.compacts).names())
    data = [f"{name}.data" for name in onnx] if options.weights == "copy" else []
    golden = assemble.GOLDEN if _scope(facts, options) == "all" else ()
    own = {name for name in assemble.ASSETS if (checkpoint.folder / name).is_file()}
    assets = own | set(checkpoint.files)
    names = sorted([*onnx, *data, *golden, *assets, "schedule.yaml", MANIFEST])
    tokens = resolved.tokens_per_image
    return Report(
        artifact=str(target),
        verified=False,
        scope="none",
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        files=dict.fromkeys(names),
        vision_tokens_per_layer=None if tokens is None else tuple(resolved.keep_per_layer(tokens)),
        steps=dict(clock.steps),
        warnings=(*assemble.missing_assets(checkpoint.folder), *assemble.limits(facts)),
        dry_run=True,
    )
