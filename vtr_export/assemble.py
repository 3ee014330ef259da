"""Lay out an artifact's folder: graphs, the checkpoint's own small files, the manifest's facts."""

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from vtr_export import __version__
from vtr_export.checkpoint import CONFIG, Checkpoint, made_files, read_json
from vtr_export.errors import CheckpointError
from vtr_export.families import ModelFacts
from vtr_export.manifest import (
    DecoderFacts,
    Graphs,
    KeepShare,
    Manifest,
    Reduced,
    ScheduleFacts,
    Source,
    Stage,
    Versions,
    Weights,
)
from vtr_export.passes.compact_cache import GRAPH as COMPACTION
from vtr_export.published import File, hash_files
from vtr_export.reductions.registry import check_references
from vtr_export.runtime.reader import FOLDER as READER
from vtr_export.runtime.text import SPECIAL_TOKENS_MAP, TOKENIZER, TOKENIZER_CONFIG
from vtr_export.schedule import Resolved, Schedule
from vtr_export.trained import check_trained

if TYPE_CHECKING:
    from vtr_export.weights import WeightsReport

GENERATION: Final = "generation_config.json"
GOLDEN: Final = ("golden/batch.npz", "golden/single.npz")  # of a whole verification
ONNX = "onnx"
OPSET = 24
ASSETS = (
    "config.json",
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    *(f"{READER}/{name}" for name in (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)),
)
NEEDED_TO_RUN = {
    "tokenizer.json": "token ids",
    "preprocessor_config.json|processor_config.json": "pixel values",
}
ONNXRUNTIME: Final = ">=1.24"  # the first with opset 24 Attention
CAPS_BEFORE_MASKS: Final = ">=1.27"  # before, a softcap made masked keys visible (onnx#7865)
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors")


def check_assets(checkpoint: Checkpoint, schedule: Resolved, *, verified: bool = False) -> None:
    """CheckpointError for a small file that no run could read, before any weight is read.

    And for weights that ``schedule`` asks for and that are not there. To be ``verified``, its
    reductions need definitions: InputError.
    """
    check_trained(checkpoint, schedule)
    if verified:
        check_references(schedule.vision)
    for name in ASSETS:
        if name.endswith(".json") and (checkpoint.folder / name).is_file():
            read_json(checkpoint.folder / name)
    for name in ("eos_token_id", "pad_token_id"):
        _token_ids(checkpoint, name)


def copy_assets(
    checkpoint: Checkpoint,
    folder: Path,
    write_tokenizer: Callable[[Path, Path], list[str]] | None = None,
) -> list[str]:
    """Copy the checkpoint's small files; return a warning for each thing a run will miss.

    ``write_tokenizer(checkpoint, folder)`` is called where there is no ``tokenizer.json``.
    """
    for name in ASSETS:
        source = checkpoint.folder / name
        if source.is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)
    for name, text in checkpoint.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    warnings = list[str]()
    for part in ("", READER):
        own = folder / part
        if write_tokenizer is not None and own.is_dir() and not (own / TOKENIZER).is_file():
            warnings += write_tokenizer(checkpoint.folder / part, own)
    return warnings + missing_assets(folder)


def missing_assets(folder: Path) -> list[str]:
    """A warning for each thing that ``vtr run`` will miss in an artifact of this folder."""
    made = made_files(folder) if (folder / CONFIG).is_file() else {}
    return [
        f"the checkpoint has no {names.replace('|', ' or ')}: "
        f"`vtr run` cannot make {what} without it"
        for names, what in NEEDED_TO_RUN.items()
        if not any(name in made or (folder / name).is_file() for name in names.split("|"))
    ]


def limits(facts: ModelFacts) -> list[str]:
    """A warning for each thing that the model does and its artifact does not."""
    found = []
    if facts.window is not None:
        found.append(
            f"some layers see only {facts.window} tokens back, the graph's see all: "
            f"prompt and answer are refused beyond {facts.context} tokens, where that would differ"
        )
    if facts.answer is not None:
        found.append(
            f"layers forget what was said more than {facts.answer} tokens ago, the graph's do not: "
            "answers end there, and there is no second turn"
        )
    return found


def save_graphs(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write ``<name>.onnx`` files whose weights are already placed."""
    for name, model in models.items():
        model.producer_name, model.producer_version = "vtr-export", __version__
        ir.save(model, folder / f"{name}.onnx")


def draft(
    checkpoint: Checkpoint,
    schedule: ScheduleFacts,
    model: DecoderFacts,
    folder: Path,
    written: "WeightsReport",
    *,
    dtype: str,
    weights: str,
    tunable: bool,
    needs: str = ONNXRUNTIME,
) -> Manifest:
    """The manifest of an artifact in ``folder`` that nobody verified yet; ``needs`` a runtime."""
    known = {
        f"{ONNX}/{name}": File(bytes=file.size_bytes, sha256=file.sha256)
        for name, file in written.files.items()
    }
    return Manifest(
        versions=versions(needs),
        source=source(checkpoint, written.shards),
        dtype=dtype,  # type: ignore[arg-type]  # checked by pydantic
        weights=weights_place(checkpoint, weights),
        weights_scanned=written.weights_scanned,
        schedule=schedule,
        model=model,
        graphs=graph_files((folder / ONNX / f"{COMPACTION}.onnx").is_file()),
        tunable=tunable,
        files=hash_files(folder, known),
    )


def graph_files(compacts: bool = False) -> Graphs:
    """Where the graphs lie (the onnx-community layout); ``compacts``: the cache, too."""
    return Graphs(
        vision_encoder=f"{ONNX}/vision_encoder.onnx",
        embed_tokens=f"{ONNX}/embed_tokens.onnx",
        decoder=f"{ONNX}/decoder_model_merged.onnx",
        compact_cache=f"{ONNX}/{COMPACTION}.onnx" if compacts else None,
    )


def needed(facts: ModelFacts) -> str:
    """The versions of ONNX Runtime that compute the model right."""
    return ONNXRUNTIME if facts.softcap is None else CAPS_BEFORE_MASKS


def versions(needs: str = ONNXRUNTIME) -> Versions:
    """Our version, those of the packages that shaped the graphs, and the runtime they need."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    runtimes = {"onnxruntime": needs}
    return Versions(vtr_export=__version__, opset=OPSET, packages=found, runtimes=runtimes)


def source(checkpoint: Checkpoint, shards: Mapping[str, str]) -> Source:
    """The checkpoint's name and hashes."""
    return Source(
        model=checkpoint.folder.resolve().name,
        config_sha256=checkpoint.config_sha256,
        shards=dict(shards),
        remote_code=dict(checkpoint.code),
    )


def weights_place(checkpoint: Checkpoint, mode: str) -> Weights:
    """Whether weights travel, and if not where they stay."""
    folder = str(checkpoint.folder.absolute()) if mode == "link" else None
    return Weights(mode="link" if mode == "link" else "copy", folder=folder)


def schedule_facts(schedule: Schedule, resolved: Resolved) -> ScheduleFacts:
    """The schedule as written and as resolved."""
    tokens = resolved.tokens_per_image
    return ScheduleFacts(
        text=schedule.dump(),
        keep_per_layer=None if tokens is None else tuple(resolved.keep_per_layer(tokens)),
        score_from=resolved.source,
        query=resolved.query,
        heads=resolved.heads,
        rank=resolved.rank,
        positions=resolved.positions,
        drop_point=resolved.drop_point,
    )


def decoder_facts(checkpoint: Checkpoint, facts: ModelFacts, resolved: Resolved) -> DecoderFacts:
    """What a runtime must know to feed the graphs."""
    return DecoderFacts(
        model_type=facts.model_type,
        layers=facts.layers,
        hidden=facts.hidden,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        vocab=facts.vocab,
        context=facts.context,
        image_token_id=facts.image_token_id,
        tokens_per_image=(resolved.tokens_per_image if resolved.vision else facts.tokens_per_image)
        or None,
        reduced=_reduced(resolved),
        features=facts.features,
        mrope=facts.mrope,
        attends=facts.attends,
        first_position=facts.first_position,
        answer=facts.answer,
        marked=facts.marked,
        crosses=facts.crosses,
        sight=facts.sight,
        eos_token_ids=_token_ids(checkpoint, "eos_token_id"),
        pad_token_id=next(iter(_token_ids(checkpoint, "pad_token_id")), None),
        stages=_stages(resolved),
    )


def _reduced(resolved: Resolved) -> Reduced | None:
    if resolved.tower is None:
        return None
    before, most = resolved.tower.grid.tokens, resolved.tokens_left
    return Reduced(before=before, most=most, is_static=resolved.is_static)


def _stages(resolved: Resolved) -> tuple[Stage, ...]:
    cuts = [
        Stage(
            first_layer=cut.before_layer,
            keep=KeepShare(
                numerator=cut.keep.numerator,
                denominator=cut.keep.denominator,
                rounding=cut.keep.rounding,
            ),
        )
        for cut in resolved.cuts
    ]
    return (Stage(first_layer=0), *cuts)


def _token_ids(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The ids under ``name`` in generation_config.json, else in the config or its text part."""
    file = checkpoint.folder / GENERATION
    generation = read_json(file) if file.is_file() else {}
    config = checkpoint.config
    for place in (generation, config, config.get("text_config") or {}):
        if (value := place.get(name)) is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(type(one) is not int or one < 0 for one in ids):
            raise CheckpointError(
                f"{name} is {value!r}, neither a token id nor a list of them",
                where=str(file if place is generation else checkpoint.folder / CONFIG),
                hint="take the file from the model's own folder again",
            )
        return tuple(ids)
    return ()
