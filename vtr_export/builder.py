"""Artifact to a published engine folder: every step of a build, in order."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from vtr_export import __version__
from vtr_export.assemble import ASSETS
from vtr_export.backends.tensorrt import plugin as plugins
from vtr_export.backends.tensorrt.build import build_plan
from vtr_export.backends.tensorrt.child import Job
from vtr_export.backends.tensorrt.profiles import (
    Ports,
    compaction_profile,
    decoder_profiles,
    vision_profile,
)
from vtr_export.buildable import Buildable
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
)
from vtr_export.errors import ArtifactError, EngineError, GateError, VtrError
from vtr_export.ops import handed_on
from vtr_export.passes.allow_unfused import AllowUnfused, count_unfused
from vtr_export.process import Announce, Clock
from vtr_export.publish import check_target as check_place
from vtr_export.publish import publish
from vtr_export.published import MANIFEST, hash_files, kind_of, sha256_of

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
    clock, folder = Clock(progress, detail), Path(artifact)
    options = {"workspace_bytes": workspace_bytes, "optimization_level": optimization_level}
    with clock.step("read the artifact"):
        given = Buildable.of(
            folder, target, tuple(sms), plugin, ranges or {}, unverified=unverified, **options
        )
        place = Path(out) if out is not None else folder / target
        before = _previous(place)
        check_place(place, (place / MANIFEST).is_file(), given.needed_bytes)
    build = _Build(given)
    if before is not None and build.is_same(before):
        return _report(place, folder, before, clock, up_to_date=True)
    with clock.step("hash the artifact"):
        given.manifest.check_hashes(folder, full=True)
    made = build.publish(place, clock)
    return _report(place, folder, made, clock, warnings=build.warnings)


class _Build:
    """One build; ``warnings`` grow on the way."""

    def __init__(self, given: Buildable) -> None:
        self.given, self.warnings = given, list[str]()
        self.folder, self.manifest = given.folder, given.manifest
        self.artifact_sha256 = sha256_of(given.folder / MANIFEST)
        self.versions = Builder(
            vtr_export=__version__,
            target=given.library.target,  # type: ignore[arg-type]  # checked by pydantic
            tensorrt=given.library.version,
        )

    def is_same(self, before: EngineManifest) -> bool:
        """Whether building again would give what is there."""
        given = self.given
        called = given.plugin if len(given.opened) < len(given.keeps) else None
        return (
            before.versions == self.versions
            and before.artifact_sha256 == self.artifact_sha256
            and before.sms == given.sms
            and before.request == given.request
            and (before.plugin and before.plugin.sha256) == (called and called.sha256)
        )

    def publish(self, place: Path, clock: Clock) -> EngineManifest:
        """Build everything beside ``place``, then put it there in one step."""
        place.parent.mkdir(parents=True, exist_ok=True)
        with publish(place, force=True) as staging, tempfile.TemporaryDirectory() as scratch:
            with clock.step("lower the graphs"):
                plans = self._lower(Path(scratch))
            with clock.step("replay the lowered graphs"):
                self._check(plans[1])  # the decoder
            engines = tuple(self._build(plan, staging, clock) for plan in plans)
            with clock.step("copy the rest"):
                self._copy(staging)
            manifest = self._describe(staging, engines)
            manifest.save(staging)
        return manifest

    def _lower(self, scratch: Path) -> tuple[_Plan, ...]:
        graphs, ranges = self.manifest.graphs, self.given.request.ranges
        vision = apply(lowering(), ir.load(self.folder / graphs.vision_encoder))
        images = vision_profile(_ports(vision), ranges, self._tokens_per_image())
        decoder = apply(lowering(self.given.opened), ir.load(self.folder / graphs.decoder))
        profiles = decoder_profiles(_ports(decoder), ranges, self.given.keeps)
        serving = self.given.plugin if plugins.serves(decoder) is None else None
        if serving is None:
            _check_bodies(decoder, self.folder)
        return (
            self._plan("vision_encoder", graphs.vision_encoder, vision, (images,), scratch, None),
            self._plan("decoder", graphs.decoder, decoder, profiles, scratch, serving),
            *self._lower_compaction(scratch),
        )

    def _lower_compaction(self, scratch: Path) -> Iterator[_Plan]:
        """The graph that runs behind a prefill, where there is one."""
        if (name := self.manifest.graphs.compact_cache) is not None:
            model = apply(lowering(), ir.load(self.folder / name))
            profile = compaction_profile(_ports(model), self.given.request.ranges, self.given.keeps)
            yield self._plan("compact_cache", name, model, (profile,), scratch, None)

    def _check(self, decoder: _Plan) -> None:
        """GateError when the graphs say something else than before they were lowered."""
        from vtr_export.verify.lowered import check_lowered, why_not

        size_bytes = sum(file.stat().st_size for file in decoder.weights.values())
        why = why_not(self.manifest, size_bytes)
        if self.given.opened:
            why = why or "its golden vectors are of other cuts"
        if why:
            self.warnings.append(f"the lowered graphs were not replayed before building: {why}")
            return
        # ONNX Runtime refuses what that marks, and what it marks computes the same
        steps = lowering(self.given.opened)
        steps = tuple(step for step in steps if not isinstance(step, AllowUnfused))
        gates = check_lowered(self.folder, self.manifest, steps)
        failed = [gate for gate in gates if not gate.passed]
        if failed:
            raise GateError(
                f"lowered for {self.given.library.target}, the graphs fail {len(failed)} of "
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
        return self.manifest.model.tokens_per_image or self.given.request.ranges.max_vision_tokens

    def _weights(self, model: ir.Model, folder: Path) -> dict[str, Path]:
        """The files the graph's weights lie in, by location."""
        shards = self.manifest.linked_shards()
        tensors = (value.const_value for value in model.graph.initializers.values())
        locations = {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
        return {name: shards.get(name, folder / name).absolute() for name in locations}

    def _build(self, plan: _Plan, staging: Path, clock: Clock) -> Engine:
        file = f"{plan.component}.plan"
        job = Job(
            target=self.given.library.target,
            graph=plan.graph.absolute(),
            weights=plan.weights,
            plan=staging / file,
            profiles=[
                {name: (b.least, b.best, b.most) for name, b in profile.inputs.items()}
                for profile in plan.profiles
            ],
            sms=self.given.sms,
            plugin=plan.plugin,
            workspace_bytes=self.given.request.workspace_bytes,
            optimization_level=self.given.request.optimization_level,
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
        if self.given.plugin is not None and called:
            plugin = PluginFacts(version=self.given.plugin.version, sha256=self.given.plugin.sha256)
        return EngineManifest(
            versions=self.versions,
            sms=self.given.sms,
            plugin=plugin,
            artifact_sha256=self.artifact_sha256,
            artifact=self.manifest,
            request=self.given.request,
            engines=engines,
            embeddings=EMBEDDINGS,
            opened_cuts=self.given.opened,
            files=hash_files(staging),
        )


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
    clock: Clock,
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
        seconds=clock.seconds,
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


def _check_bodies(decoder: ir.Model, folder: Path) -> None:
    """ArtifactError for cuts that TensorRT would read wrong, without a word."""
    if handed_on(decoder):
        raise ArtifactError(
            "its cuts hand their scale on from function to function, which TensorRT reads as 0",
            where=str(folder),
            hint="export it again: this release writes such bodies out",
        )
