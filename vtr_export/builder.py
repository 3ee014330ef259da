"""Artifact to a published engine folder: every step of a build, in order."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from vtr_export import __version__
from vtr_export.assemble import ASSETS
from vtr_export.backends.tensorrt import plugin as plugins
from vtr_export.backends.tensorrt.build import Announce, build_plan
from vtr_export.backends.tensorrt.child import Job
from vtr_export.backends.tensorrt.library import Library, device_sm, load
from vtr_export.backends.tensorrt.profiles import (
    Ports,
    choose_ranges,
    decoder_profiles,
    vision_profile,
)
from vtr_export.compile import engine as lowering
from vtr_export.compile import run as apply
from vtr_export.embeddings import write_table
from vtr_export.engine_manifest import (
    Builder,
    Component,
    Engine,
    EngineManifest,
    PluginFacts,
    Profile,
    Request,
)
from vtr_export.errors import EngineError, GateError, InputError, UnavailableError, VtrError
from vtr_export.manifest import Manifest
from vtr_export.passes.allow_unfused import count_unfused
from vtr_export.publish import check_target as check_place
from vtr_export.publish import publish
from vtr_export.published import MANIFEST, hash_files, kind_of, sha256_of
from vtr_export.schedule import Keep
from vtr_export.targets import TOP_K, TURING, check_target

EMBEDDINGS: Final = "embed_tokens.npy"
_MEASURED: Final = ("plugin_layers", "layers", "weights_bytes", "seconds", "peak_rss_bytes")


@dataclass(frozen=True)
class BuildReport:
    """What a build did. ``up_to_date``: nothing, the engine is of this artifact and request."""

    engine: str
    artifact: str
    target: str
    tensorrt: str
    sms: tuple[int, ...]
    engines: tuple[dict[str, Any], ...]
    seconds: float
    up_to_date: bool = False
    plugin: str | None = None
    opened_cuts: tuple[int, ...] = ()
    steps: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``engines`` is what scripts read."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Plan:
    """One graph on its way to a plan."""

    component: Component
    graph: Path
    weights: Mapping[str, Path]
    profiles: tuple[Profile, ...]
    plugin: plugins.Plugin | None
    unfused: int


class _Clock:
    """Seconds by step, each announced as it begins."""

    def __init__(self, announce: Announce | None, detail: Announce | None) -> None:
        self.announce, self.detail, self.steps = announce, detail, dict[str, float]()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        if self.announce is not None:
            self.announce(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.steps[name] = round(time.perf_counter() - start, 3)


def build(
    artifact: str | Path,
    out: str | Path | None = None,
    *,
    target: str = "tensorrt-rtx",
    sms: Sequence[int] = (),
    plugin: str = "auto",
    ranges: Mapping[str, int | None] | None = None,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    unverified: bool = False,
    progress: Announce | None = None,
    detail: Announce | None = None,
) -> BuildReport:
    """Build the plans of ``artifact`` into the folder ``out`` (``ARTIFACT/<target>``).

    ``sms``: 86 is SM 8.6; empty: the GPU that is here. ``ranges``: fields of ``Ranges``, the rest
    chosen. An engine that is there already is replaced when it is of another artifact or request;
    whatever else is there is not. Raises VtrError for what cannot be built; ``out`` is then as it
    was. ``progress`` hears each step as it begins, ``detail`` how far the builder is in it.
    """
    clock, folder = _Clock(progress, detail), Path(artifact)
    with clock.step("read the artifact"):
        manifest = Manifest.load(folder)
        _check_verified(manifest, folder, unverified)
        library, chosen = check_builds(target, tuple(sms), manifest.dtype)
        request = Request(
            sms=tuple(sms),
            plugin=_checked_choice(plugin),
            ranges=choose_ranges(manifest.model, ranges or {}),
            workspace_bytes=workspace_bytes,
            optimization_level=optimization_level,
        )
        found = _find_plugin(folder, manifest, request, target, chosen)
        place = Path(out) if out is not None else folder / target
        before = _previous(place)
        check_place(place, (place / MANIFEST).is_file(), _needed_bytes(folder, manifest))
    made = _Made(folder, manifest, library, chosen, request, found)
    if before is not None and made.is_same(before):
        return _report(place, folder, before, clock, up_to_date=True)
    with clock.step("hash the artifact"):
        manifest.check_hashes(folder, full=True)
    return _report(place, folder, made.publish(place, clock), clock, warnings=made.warnings)


class _Made:
    """What is built, from what, with what."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        library: Library,
        sms: tuple[int, ...],
        request: Request,
        plugin: plugins.Plugin | None,
    ) -> None:
        self.folder, self.manifest, self.library = folder, manifest, library
        self.sms, self.request, self.plugin = sms, request, plugin
        self.warnings: list[str] = []
        self.artifact_sha256 = sha256_of(folder / MANIFEST)
        self.versions = Builder(
            vtr_export=__version__,
            target=library.target,  # type: ignore[arg-type]  # checked by pydantic
            tensorrt=library.version,
        )
        self.keeps = _keeps(manifest)
        most = request.ranges.max_vision_tokens
        self.opened = () if manifest.tunable else opened_cuts(self.keeps, most)

    def is_same(self, before: EngineManifest) -> bool:
        """Whether building again would give what is there."""
        plugin = None if before.plugin is None else before.plugin.sha256
        mine = None if self.plugin is None or before.plugin is None else self.plugin.sha256
        return (before.versions, before.sms, before.artifact_sha256, before.request, plugin) == (
            self.versions,
            self.sms,
            self.artifact_sha256,
            self.request,
            mine,
        )

    def publish(self, place: Path, clock: _Clock) -> EngineManifest:
        """Build everything beside ``place``, then put it there in one step."""
        place.parent.mkdir(parents=True, exist_ok=True)
        with publish(place, force=True) as staging, tempfile.TemporaryDirectory() as scratch:
            with clock.step("lower the graphs"):
                plans = self._lower(Path(scratch))
            with clock.step("replay the lowered decoder"):
                self._check(plans[1])
            engines = tuple(self._build(plan, staging, clock) for plan in plans)
            with clock.step("copy the rest"):
                self._copy(staging)
            manifest = self._describe(staging, engines)
            manifest.save(staging)
        return manifest

    def _lower(self, scratch: Path) -> tuple[_Plan, ...]:
        graphs, ranges = self.manifest.graphs, self.request.ranges
        vision = apply(lowering(), ir.load(self.folder / graphs.vision_encoder))
        images = vision_profile(_ports(vision), ranges, self._tokens_per_image())
        decoder = apply(lowering(self.opened), ir.load(self.folder / graphs.decoder))
        profiles = decoder_profiles(_ports(decoder), ranges, self.keeps)
        serving = self.plugin if plugins.serves(decoder) is None else None
        return (
            self._plan("vision_encoder", graphs.vision_encoder, vision, (images,), scratch, None),
            self._plan("decoder", graphs.decoder, decoder, profiles, scratch, serving),
        )

    def _check(self, decoder: _Plan) -> None:
        """GateError when the decoder says something else than before it was lowered."""
        from vtr_export.verify.lowered import check_lowered, why_not

        size_bytes = sum(file.stat().st_size for file in decoder.weights.values())
        why = why_not(self.manifest, size_bytes)
        if self.opened or decoder.unfused:
            why = why or "its golden vectors are of other cuts, or heads"
        if why:
            self.warnings.append(f"the lowered decoder was not replayed before building: {why}")
            return
        gates = check_lowered(self.folder, self.manifest, decoder.graph, decoder.weights)
        failed = [gate for gate in gates if not gate.passed]
        if failed:
            raise GateError(
                f"lowered for {self.library.target}, the decoder fails {len(failed)} of "
                f"{len(gates)} gates, first {failed[0].name}",
                where=failed[0].detail,
                hint="report the model; vtr verify ARTIFACT says whether the artifact passes",
            )

    def _plan(
        self,
        component: Component,
        graph: str,
        model: ir.Model,
        profiles: tuple[Profile, ...],
        scratch: Path,
        plugin: plugins.Plugin | None,
    ) -> _Plan:
        """The lowered graph in a file of its own; its weights stay where they are."""
        file = scratch / f"{component}.onnx"
        file.write_bytes(ir.to_proto(model).SerializeToString())
        weights = self._weights(model, (self.folder / graph).parent)
        return _Plan(component, file, weights, profiles, plugin, count_unfused(model))

    def _tokens_per_image(self) -> int:
        return self.manifest.model.tokens_per_image or self.request.ranges.max_vision_tokens

    def _weights(self, model: ir.Model, folder: Path) -> dict[str, Path]:
        """The files the graph's weights lie in, by location."""
        shards = self.manifest.linked_shards()
        tensors = (value.const_value for value in model.graph.initializers.values())
        locations = {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
        return {name: shards.get(name, folder / name).absolute() for name in locations}

    def _build(self, plan: _Plan, staging: Path, clock: _Clock) -> Engine:
        file = f"{plan.component}.plan"
        job = Job(
            target=self.library.target,
            graph=plan.graph.absolute(),
            weights=plan.weights,
            plan=staging / file,
            profiles=[
                {name: (b.least, b.best, b.most) for name, b in profile.inputs.items()}
                for profile in plan.profiles
            ],
            sms=self.sms,
            plugin=plan.plugin,
            workspace_bytes=self.request.workspace_bytes,
            optimization_level=self.request.optimization_level,
        )
        with clock.step(f"build the {plan.component.replace('_', ' ')}"):
            built = build_plan(job, clock.detail)
        return Engine(
            component=plan.component,
            file=file,
            profiles=plan.profiles,
            unfused_attentions=plan.unfused,
            **{name: built[name] for name in _MEASURED},
        )

    def _copy(self, staging: Path) -> None:
        """What running needs beside the plans: the embedding table, assets, golden vectors."""
        embedding = self.folder / self.manifest.graphs.embed_tokens
        shards = self.manifest.linked_shards()
        write_table(embedding, staging / EMBEDDINGS, self.manifest.dtype, shards)
        for name in self.manifest.files:
            if name in (*ASSETS, "schedule.yaml") or name.startswith("golden/"):
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.folder / name, staging / name)

    def _describe(self, staging: Path, engines: tuple[Engine, ...]) -> EngineManifest:
        called = any(engine.plugin_layers for engine in engines)
        plugin = None
        if self.plugin is not None and called:
            plugin = PluginFacts(version=self.plugin.version, sha256=self.plugin.sha256)
        return EngineManifest(
            versions=self.versions,
            sms=self.sms,
            plugin=plugin,
            artifact_sha256=self.artifact_sha256,
            artifact=self.manifest,
            request=self.request,
            engines=engines,
            embeddings=EMBEDDINGS,
            opened_cuts=self.opened,
            files=hash_files(staging),
        )


def check_builds(target: str, sms: tuple[int, ...], dtype: str) -> tuple[Library, tuple[int, ...]]:
    """The TensorRT that builds for ``target``, and the SMs it builds for.

    Raises VtrError when it, the SMs or the dtype do not go together, or it is not installed.
    """
    check_target(target, sms, dtype)
    library = load(target)
    return library, _choose_sms(library, sms)


def opened_cuts(keeps: Sequence[Keep], most: int) -> tuple[int, ...]:
    """Numbers of the cuts that keep every token of a call with up to ``most`` vision tokens."""
    return tuple(
        number
        for number, keep in enumerate(keeps)
        if all(keep.of(tokens) == tokens for tokens in range(most + 1))
    )


def _check_verified(manifest: Manifest, folder: Path, unverified: bool) -> None:
    if manifest.verified or unverified:
        return
    raise EngineError(
        "the artifact was published unverified: nobody knows whether its graphs are right",
        where=str(folder),
        hint="export it without --no-verify, or build it as it is with --unverified",
    )


def _choose_sms(library: Library, asked: tuple[int, ...]) -> tuple[int, ...]:
    """What to build for: as asked, else the GPU that is here."""
    if library.builds_ahead and asked:
        if missing := sorted(set(asked) - set(library.compute_capabilities)):
            raise EngineError(
                f"{library.target} {library.version} does not compile for SM {missing[0]}",
                hint=f"one of: {', '.join(map(str, library.compute_capabilities))}",
            )
        return asked
    here = device_sm()
    if here is None:
        hint = (
            "say which GPUs to build for: --sm 86,89,120"
            if library.builds_ahead
            else "run it on the device; for RTX GPUs --target tensorrt-rtx builds anywhere"
        )
        raise UnavailableError(f"{library.target} finds no GPU on this machine", hint=hint)
    if asked not in ((), (here,)):
        raise EngineError(
            f"{library.target} builds for the GPU that is here, SM {here}",
            where=f"--sm {','.join(map(str, asked))}",
            hint="leave --sm out, and build on each device",
        )
    return (here,)


def _checked_choice(plugin: str) -> Any:
    if plugin not in ("auto", "on", "off"):
        raise InputError(f"no plugin choice {plugin!r}", hint="one of: auto, on, off")
    return plugin


def _find_plugin(
    folder: Path, manifest: Manifest, request: Request, target: str, sms: tuple[int, ...]
) -> plugins.Plugin | None:
    """The plugin to build with, if any; EngineError when one is needed and cannot be had."""
    keeps, most = _keeps(manifest), request.ranges.max_vision_tokens
    counted = (keep.denominator if manifest.tunable else keep.of(most) for keep in keeps)
    largest = max((min(most, count) for count in counted), default=0)
    turing = bool(keeps) and target == "tensorrt-rtx" and TURING in sms
    needed = largest > TOP_K or turing
    if needed and request.plugin == "off":
        raise EngineError(
            "TensorRT-RTX multiplies no fp32 matrices for SM 7.5, and scores are such a product"
            if turing
            else f"{largest} tokens may be kept, TensorRT's own TopK takes {TOP_K}",
            where=str(folder),
            hint="build with --plugin auto, or for less: other SMs, a lower --max-vision-tokens",
        )
    found = plugins.find(request.plugin, target, needed=needed) if keeps else None
    if found is None:
        return None
    why = plugins.serves(ir.load(folder / manifest.graphs.decoder))
    missing = sorted(set(sms) - set(found.sms)) if found.sms else []
    if why is None and missing:
        why = f"{found.path} was not compiled for SM {missing[0]}"
    if why is None:
        return found
    if needed or request.plugin == "on":
        hint = "build with --plugin auto: the cuts become TensorRT's own layers"
        raise EngineError(f"the plugin does not serve this artifact: {why}", hint=hint)
    return None


def _keeps(manifest: Manifest) -> tuple[Keep, ...]:
    shares = (stage.keep for stage in manifest.model.stages if stage.keep is not None)
    return tuple(Keep(each.numerator, each.denominator, each.rounding) for each in shares)


def _previous(place: Path) -> EngineManifest | None:
    """The engine that is there, whole or damaged: it may be replaced, an artifact may not."""
    if not (place / MANIFEST).is_file():
        return None
    if (kind := kind_of(place)) != "engine":
        raise EngineError(
            f"the target holds an {kind}: not replaced",
            where=str(place),
            hint="choose another folder with --out",
        )
    try:
        return EngineManifest.load(place)
    except VtrError:
        return None


def _needed_bytes(folder: Path, manifest: Manifest) -> int:
    """What the disk must hold at least: a plan holds its weights."""
    if manifest.weights.mode == "copy":
        return sum(file.bytes for name, file in manifest.files.items() if name.endswith(".data"))
    return sum(shard.stat().st_size for shard in manifest.linked_shards().values())


def _ports(model: ir.Model) -> Ports:
    """Inputs and their shapes: numbers, or the names of what varies."""
    return {
        str(value.name): [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
        for value in model.graph.inputs
    }


def _report(
    place: Path,
    artifact: Path,
    made: EngineManifest,
    clock: _Clock,
    *,
    up_to_date: bool = False,
    warnings: Sequence[str] = (),
) -> BuildReport:
    engines = tuple(
        {
            "component": engine.component,
            "file": str(place / engine.file),
            "bytes": made.files[engine.file].bytes,
            **engine.model_dump(mode="json", exclude={"component", "file"}),
        }
        for engine in made.engines
    )
    return BuildReport(
        engine=str(place),
        artifact=str(artifact),
        target=made.versions.target,
        tensorrt=made.versions.tensorrt,
        sms=made.sms,
        engines=engines,
        seconds=round(sum(clock.steps.values()), 3),
        up_to_date=up_to_date,
        plugin=made.plugin.version if made.plugin is not None else None,
        opened_cuts=made.opened_cuts,
        steps=dict(clock.steps),
        warnings=(*warnings, *_warnings(made)),
    )


def _warnings(made: EngineManifest) -> Iterator[str]:
    for engine in made.engines:
        if engine.unfused_attentions:
            yield (
                f"{engine.component}: no fused kernel takes heads as wide as those of "
                f"{engine.unfused_attentions} attentions; they hold the n x n scores"
            )
