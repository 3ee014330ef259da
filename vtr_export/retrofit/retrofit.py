"""``vtr export --onnx``: a decoder of another tool and a schedule to a folder with the cut one."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from vtr_export.assemble import schedule_facts, versions
from vtr_export.errors import AnalysisError, InputError, ScheduleError
from vtr_export.manifest import Gate
from vtr_export.process import Announce, Clock
from vtr_export.publish import check_target, publish
from vtr_export.published import hash_files, sha256_of
from vtr_export.retrofit.canonical import Decoder, canonicalise, load
from vtr_export.retrofit.check import Verdict, check_file
from vtr_export.retrofit.cut import GRAPH, Request, save, with_cuts
from vtr_export.retrofit.embedding import GRAPH as EMBEDDING
from vtr_export.retrofit.embedding import Embedding, read_embedding
from vtr_export.retrofit.gates import gates_of
from vtr_export.retrofit.manifest import DecoderManifest, Facts, Original, stages
from vtr_export.schedule import Resolved, Schedule

SCHEDULE: Final = "schedule.yaml"


@dataclass(frozen=True)
class Report:
    """What was done."""

    artifact: str
    layers: int
    attention: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    vision_tokens_per_layer: tuple[int, ...] | None
    verified: bool
    gates: tuple[Gate, ...]
    files: dict[str, int]
    steps: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "gates": [gate.model_dump() for gate in self.gates]}


@dataclass(frozen=True)
class _Model:
    """What a schedule asks of a model."""

    layers: int
    tokens_per_image: int | None
    mrope: bool


def retrofit(request: Request, progress: Announce | None = None) -> Report:
    """Put the schedule's cuts into the decoder, compare, and publish the folder or nothing.

    Raises InputError for a file that is no decoder or is not safe to read, AnalysisError where a
    stream of tokens cannot be followed, ScheduleError, ArtifactError, and GateError where a
    rewritten graph does not say what the given one says.
    """
    clock = Clock(progress)
    schedule = Schedule.load(request.schedule)
    check_target(request.out, request.force)
    with clock.step("check"):
        verdict = check_file(request.onnx)
    with clock.step("analyse"):
        decoder = _understood(request.onnx)
        request, embedding = _with_embedding(request, decoder)
        if schedule.document.decode:
            raise ScheduleError(
                "decode needs a runtime that narrows the cache behind a prefill",
                where=schedule.source.at(("decode",)),
                hint="leave it out, or export from the checkpoint: vtr export --model",
            )
        resolved = schedule.resolve(
            _Model(len(decoder.kinds), request.image_tokens, decoder.has_mrope)
        )
    with clock.step("cut"):
        cut = with_cuts(decoder, resolved, request)
    with publish(request.out, force=request.force) as staging:
        with clock.step("write"):
            save(cut, staging)
            if embedding is not None:
                embedding.save(staging)
        gates: list[Gate] = []
        if request.verify:
            with clock.step("compare"):
                gates = gates_of(request, decoder, resolved, staging)
        (staging / SCHEDULE).write_text(schedule.dump(), encoding="utf-8")
        with clock.step("hash"):
            manifest = _manifest(request, schedule, resolved, decoder, cut, gates, staging, verdict)
        manifest.save(staging)
    return Report(
        artifact=str(request.out),
        layers=len(decoder.kinds),
        attention=decoder.kinds,
        inputs=manifest.model.inputs,
        outputs=manifest.model.outputs,
        vision_tokens_per_layer=manifest.schedule.keep_per_layer,
        verified=request.verify,
        gates=tuple(gates),
        files={name: file.bytes for name, file in manifest.files.items()},
        steps=clock.steps,
        seconds=clock.seconds,
    )


def _understood(file: Path) -> Decoder:
    """The canonical decoder; AnalysisError also for a graph that contradicts itself."""
    try:
        return canonicalise(load(file))
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise AnalysisError(
            f"the analysis cannot follow the graph ({type(error).__name__}: {error})",
            where=str(file),
            hint="onnx.checker.check_model(path, full_check=True) may say what contradicts itself",
        ) from error


def _with_embedding(request: Request, decoder: Decoder) -> tuple[Request, Embedding | None]:
    """The request for a decoder that is told by a mask, where an embedding graph makes one."""
    takes_ids = "input_ids" in decoder.original_inputs.values()
    if request.embedding is not None and takes_ids:
        raise InputError(
            "the decoder makes its embeddings itself: it takes input_ids",
            where="--embedding",
            hint="leave it out, and say --image-token-id ID",
        )
    if request.embedding is None:
        if request.vision_mask and request.image_token_id is not None:
            raise InputError(
                "--vision-mask and --image-token-id both tell which tokens are an image's",
                hint="give one of them",
            )
        return request, None
    embedding = read_embedding(request.embedding, request.image_token_id)
    token = embedding.image_token_id
    return replace(request, vision_mask=True, image_token_id=token), embedding


def _manifest(
    request: Request,
    schedule: Schedule,
    resolved: Resolved,
    decoder: Decoder,
    cut: ir.Model,
    gates: list[Gate],
    staging: Path,
    verdict: Verdict,
) -> DecoderManifest:
    facts = Facts(
        layers=len(decoder.kinds),
        attention=decoder.kinds,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        tokens_per_image=request.image_tokens,
        image_token_id=request.image_token_id,
        inputs=tuple(value.name or "" for value in cut.graph.inputs),
        outputs=tuple(value.name or "" for value in cut.graph.outputs),
        stages=stages(resolved),
    )
    return DecoderManifest(
        versions=versions(),
        original=Original(
            file=request.onnx.name, sha256=sha256_of(request.onnx), producer=verdict.producer
        ),
        decoder=GRAPH,
        embedding=None if request.embedding is None else EMBEDDING,
        schedule=schedule_facts(schedule, resolved),
        model=facts,
        verified=request.verify,
        gates=tuple(gates),
        files=hash_files(staging),
    )
