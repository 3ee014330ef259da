"""What can be built of an artifact: what is asked, beside what is installed and what it can."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vtr_export.backends.tensorrt import plugin as plugins
from vtr_export.backends.tensorrt.branches import is_sandwiched
from vtr_export.backends.tensorrt.library import Library, device_sm, load
from vtr_export.backends.tensorrt.profiles import choose_ranges
from vtr_export.engine_manifest import Request
from vtr_export.errors import EngineError, InputError, UnavailableError
from vtr_export.manifest import Manifest
from vtr_export.schedule import Keep, Schedule
from vtr_export.targets import SANDWICHED, TOP_K, TURING, check_target


@dataclass(frozen=True)
class Buildable:
    """An artifact with everything that building it takes."""

    folder: Path
    manifest: Manifest
    library: Library
    sms: tuple[int, ...]
    request: Request
    plugin: plugins.Plugin | None

    @classmethod
    def of(
        cls,
        folder: Path,
        target: str,
        sms: tuple[int, ...],
        plugin: str,
        ranges: Mapping[str, int | None],
        *,
        unverified: bool = False,
        **options: int | None,
    ) -> "Buildable":
        """Read the manifest and check all that can be known before a graph is read.

        Raises VtrError.
        """
        manifest = Manifest.load(folder)
        _check_verified(manifest, folder, unverified)
        _check_tokens(manifest, folder)
        _check_static(manifest, folder)
        _check_beside(manifest, folder)
        library, chosen = check_builds(target, sms, manifest.dtype)
        request = Request(
            sms=sms,
            plugin=_checked_choice(plugin),
            ranges=choose_ranges(manifest.model, ranges),
            **options,
        )
        found = _find_plugin(folder, manifest, request, target, chosen)
        return cls(folder, manifest, library, chosen, request, found)

    @property
    def keeps(self) -> tuple[Keep, ...]:
        """What each cut keeps."""
        return keeps_of(self.manifest)

    @property
    def opened(self) -> tuple[int, ...]:
        """Numbers of the cuts that could drop nothing in these ranges."""
        if self.manifest.tunable:
            return ()
        return opened_cuts(self.keeps, self.request.ranges.max_vision_tokens)

    @property
    def needed_bytes(self) -> int:
        """What the disk must hold at least: a plan holds its weights."""
        manifest = self.manifest
        if manifest.weights.mode == "link":
            return sum(shard.stat().st_size for shard in manifest.linked_shards().values())
        return sum(file.bytes for name, file in manifest.files.items() if name.endswith(".data"))


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


def _check_tokens(manifest: Manifest, folder: Path) -> None:
    if manifest.model.crosses:
        raise EngineError(
            "this model attends to images as keys of cross-attention, for whose number an engine "
            "has no ranges yet",
            where=str(folder),
            hint="run the artifact in ONNX Runtime: vtr run ARTIFACT --device cuda",
        )


def _check_static(manifest: Manifest, folder: Path) -> None:
    """``target_fit`` says it earlier, and where it is written."""
    reduced, said = manifest.model.reduced, Schedule.parse(manifest.schedule.text)
    if (reduced is None or reduced.is_static) and said.prefill.threshold is None:
        return
    raise EngineError(
        "what an image shows decides how many of its tokens are left, and an engine's lengths "
        "follow from its inputs'",
        where=str(folder),
        hint="export a static form (vtr plan --target names it), or run it in ONNX Runtime",
    )


def _check_beside(manifest: Manifest, folder: Path) -> None:
    if manifest.model.features != "tokens":
        raise EngineError(
            "this model's images stand beside its tokens (weights or keys), which an engine is not "
            "given yet",
            where=str(folder),
            hint="run the artifact in ONNX Runtime: vtr run ARTIFACT --device cuda",
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
    if not keeps_of(manifest):
        return None
    graph = ir.load(folder / manifest.graphs.decoder)
    limit = _limit(graph, manifest, request, target, sms)
    if limit and request.plugin == "off":
        raise EngineError(
            limit,
            where=str(folder),
            hint="build with --plugin auto, or for less: other SMs, a lower --max-vision-tokens",
        )
    found = plugins.find(request.plugin, target, needed=limit is not None)
    if found is None:
        return None
    why = plugins.serves(graph)
    missing = sorted(set(sms) - set(found.sms)) if found.sms else []
    if why is None and missing:
        why = f"{found.path} was not compiled for SM {missing[0]}"
    if why is None:
        return found
    if limit or request.plugin == "on":
        hint = "build with --plugin auto: the cuts become TensorRT's own layers"
        raise EngineError(f"the plugin does not serve this artifact: {why}", hint=hint)
    return None


def _limit(
    graph: ir.Model, manifest: Manifest, request: Request, target: str, sms: tuple[int, ...]
) -> str | None:
    """Why TensorRT's own layers cannot be the cuts (``target_fit`` says it earlier)."""
    largest = max(_selected(keep, manifest, request) for keep in keeps_of(manifest))
    if largest > TOP_K:
        return f"{largest} tokens may be kept, TensorRT's own TopK takes {TOP_K}"
    if target != "tensorrt-rtx":
        return None
    if TURING in sms:
        return "TensorRT-RTX multiplies no fp32 matrices for SM 7.5, and scores are such a product"
    return SANDWICHED if is_sandwiched(graph) else None


def _selected(keep: Keep, manifest: Manifest, request: Request) -> int:
    """The most that one TopK of a cut selects; 0 for a cut that drops nothing."""
    most = request.ranges.max_vision_tokens
    if not manifest.tunable and opened_cuts([keep], most):
        return 0
    count = keep.denominator if manifest.tunable else keep.numerator
    if manifest.schedule.rank == "per_image":
        return min(most, count)
    return most if manifest.tunable else keep.of(most)


def keeps_of(manifest: Manifest) -> tuple[Keep, ...]:
    """What each cut keeps."""
    shares = (stage.keep for stage in manifest.model.stages if stage.keep is not None)
    return tuple(Keep(each.numerator, each.denominator, each.rounding) for each in shares)
