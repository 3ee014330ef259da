"""An engine folder, loaded: nothing of a plan is looked into before everything fits."""

from collections.abc import Sequence
from pathlib import Path

from vtr_export.backends.tensorrt.library import Library, load
from vtr_export.engine_manifest import EngineManifest
from vtr_export.errors import EngineError, UnavailableError
from vtr_export.published import SMALL_BYTES, sha256_of
from vtr_export.runtime.cuda import Cuda
from vtr_export.runtime.session import Session, open_session
from vtr_export.runtime.tensorrt import Gpu, Plan


def read_engine(folder: Path) -> tuple[EngineManifest, list[Plan], Session]:
    """What can be checked on any machine: the manifest, every file's hash, the table.

    ArtifactError or EngineError for what is damaged. Deserialises nothing.
    """
    manifest = EngineManifest.load(folder)
    plans = [Plan.open(folder / e.file, manifest.files[e.file].sha256) for e in manifest.engines]
    for name, file in manifest.files.items():  # loading has hashed the small ones
        is_plan = name in (engine.file for engine in manifest.engines)
        if file.bytes > SMALL_BYTES and not is_plan and sha256_of(folder / name) != file.sha256:
            raise EngineError(
                "damaged: its contents are not those that were written",
                where=str(folder / name),
                hint=manifest.REPLACE,
            )
    return manifest, plans, open_session(folder / manifest.embeddings)


def open_engine(folder: Path) -> tuple[EngineManifest, Sequence[Session]]:
    """Vision encoder, embedding table, decoder and, where there is one, compaction of a folder.

    Checked in this order, and the first misfit is raised: manifest and hashes, TensorRT's flavour
    and version, the GPU, the plugin. UnavailableError for what this machine lacks.
    """
    manifest, plans, table = read_engine(folder)
    library = load(manifest.versions.target)
    manifest.check_library(library.target, library.version)
    cuda = Cuda()
    manifest.check_device(cuda.sm)
    _register_plugin(manifest, library, cuda.sm)
    gpu = Gpu.of(library, cuda)
    vision, *decoders = (open_session(plan.file, data=plan.data, gpu=gpu) for plan in plans)
    return manifest, (vision, table, *decoders)


def _register_plugin(manifest: EngineManifest, library: Library, sm: int) -> None:
    if manifest.plugin is None:
        return
    from vtr_export.backends.tensorrt import plugin

    found = plugin.find("on", library.target)
    if found is None:
        manifest.check_plugin(None, None)
        return
    manifest.check_plugin(found.version, found.sha256)
    if found.sms and sm not in found.sms:
        raise EngineError(
            f"the plugin was not compiled for SM {sm}",
            where=str(found.path),
            hint=f"compile it again: vtr build-plugin --sm {sm}",
        )
    if why := found.why_it_cannot_run():
        raise UnavailableError(
            f"the plugin cannot run here: {why}",
            hint=f"pip install 'vtr-export[cuda]', or compile it: vtr build-plugin --sm {sm}",
        )
    found.register(library)
