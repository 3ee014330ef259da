"""``vtr export --onnx``: a decoder of another tool and a schedule to a folder with the cut one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import onnx_ir.passes.common as common

from vtr_export import __version__
from vtr_export.assemble import schedule_facts, versions
from vtr_export.compile import run
from vtr_export.errors import AnalysisError, GateError, InputError
from vtr_export.manifest import Gate
from vtr_export.passes.derive_vision_index import DeriveVisionIndex
from vtr_export.passes.hide_keys import HideKeys
from vtr_export.passes.insert_cuts import InsertCuts
from vtr_export.passes.lower_embeddings import LowerEmbeddings
from vtr_export.process import Announce, Clock
from vtr_export.publish import check_target, publish
from vtr_export.published import hash_files, sha256_of
from vtr_export.retrofit.canonical import Decoder, canonicalise, load
from vtr_export.retrofit.check import Verdict, check_file
from vtr_export.retrofit.embedding import GRAPH as EMBEDDING
from vtr_export.retrofit.embedding import MASK, Embedding, read_embedding
from vtr_export.retrofit.gates import BARS, Player, compare, conversations, hidden, last_rows
from vtr_export.retrofit.manifest import DecoderManifest, Facts, Original, stages
from vtr_export.retrofit.probe import Array
from vtr_export.schedule import Cut, Keep, Resolved, Schedule

GRAPH: Final = "decoder.onnx"
WEIGHTS: Final = "decoder.onnx.data"
SCHEDULE: Final = "schedule.yaml"
VOCABULARY: Final = 32  # ids of random prompts; every vocabulary has as many


@dataclass(frozen=True)
class Request:
    """What to cut, and how. ``image_tokens`` None: they depend on the image.

    Which tokens are an image's is told by ids (``image_token_id``), by the caller's ``vision_mask``
    [B,S], by the mask that ``embedding`` is made to say, or by ``vision_index`` [B,V].
    """

    onnx: Path
    schedule: Path
    out: Path
    image_tokens: int | None = None
    image_token_id: int | None = None
    tunable: bool = False
    verify: bool = True
    force: bool = False
    vision_mask: bool = False
    embedding: Path | None = None


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
        resolved = schedule.resolve(
            _Model(len(decoder.kinds), request.image_tokens, decoder.has_mrope)
        )
    with clock.step("cut"):
        cut = _cut(decoder, resolved, request)
    with publish(request.out, force=request.force) as staging:
        with clock.step("write"):
            _save(cut, staging)
            if embedding is not None:
                embedding.save(staging)
        gates: list[Gate] = []
        if request.verify:
            with clock.step("compare"):
                gates = _compare(request, decoder, resolved, staging)
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


def _ask_for_mask(model: ir.Model) -> None:
    """One more input, where there are cuts."""
    if any(value.name == "vision_index" for value in model.graph.inputs):
        mask = ir.val(MASK, ir.DataType.BOOL, ["batch", "sequence"])
        model.graph.inputs.append(mask)


def _cut(
    decoder: Decoder, schedule: Resolved | None, request: Request, *others: ir.passes.PassBase
) -> ir.Model:
    """A copy of the canonical decoder with the schedule's cuts, its inputs as they will be."""
    cuts = () if schedule is None else (InsertCuts(schedule, tunable=request.tunable),)
    model = run((*cuts, *others, LowerEmbeddings()), decoder.model.clone())
    if request.vision_mask:
        _ask_for_mask(model)
    model = run(
        (
            DeriveVisionIndex(None if request.vision_mask else request.image_token_id),
            common.RemoveUnusedNodesPass(),
            common.TopologicalSortPass(),
        ),
        model,
    )
    for value in list(model.graph.inputs):
        if value.name == "position_ids" and not value.uses():
            model.graph.inputs.remove(value)
    model.producer_name, model.producer_version = "vtr-export", __version__
    return model


def _save(model: ir.Model, folder: Path) -> None:
    """Graph and weights, tensor by tensor."""
    ir.save(model, folder / GRAPH, external_data=WEIGHTS)


def _compare(request: Request, decoder: Decoder, schedule: Resolved, staging: Path) -> list[Gate]:
    """The given decoder, ours without cuts, ours with cuts that keep all, the cut one."""
    plainly = replace(request, image_token_id=None, vision_mask=False, tunable=False)
    every = replace(
        schedule, cuts=tuple(Cut(cut.before_layer, Keep(1, 1)) for cut in schedule.cuts)
    )
    given = Player(request.onnx, decoder.original_inputs, decoder.carried)
    token = None if request.vision_mask else request.image_token_id
    image = request.image_tokens, token
    asked = [
        calls
        for calls in conversations(_width(decoder), VOCABULARY, *image)
        if given.takes(len(calls[0]["attention_mask"]))
    ]
    bar = BARS.get(given.dtype, max(BARS.values()))
    expected = given.play(asked)
    del given
    with _beside(_cut(decoder, None, plainly), staging) as file:
        plain = _player(file).play(asked)
    gates = [compare("canonical", expected, plain, bar)]
    if schedule.cuts:
        with _beside(_cut(decoder, every, plainly), staging) as file:
            gates.append(compare("keep_all", plain, _player(file).play(asked), bar))
        gates += _compare_cut(request, decoder, schedule, staging, asked, bar)
    for gate in gates:
        if not gate.passed:
            raise GateError(
                f"{gate.name}: the rewritten decoder differs by {gate.measured:.3g} of its largest "
                f"logit, more than {gate.bar:g} ({gate.detail}); nothing was published",
                where=str(request.onnx),
                hint="report the graph; vtr inspect shows what was found in it",
            )
    return gates


def _compare_cut(
    request: Request,
    decoder: Decoder,
    schedule: Resolved,
    staging: Path,
    asked: list[list[dict[str, Array]]],
    bar: float,
) -> list[Gate]:
    """The published decoder beside one that hides what it drops, and drops nothing.

    Not for positions that are numbered anew, nor for budgets that are an input.
    """
    if request.tunable or schedule.positions == "repacked":
        return []
    player = _player(staging / GRAPH)
    found = last_rows(player.play(asked))
    told, firsts = hidden(asked, player.kept), [cut.before_layer for cut in schedule.cuts]
    plainly = replace(request, image_token_id=None, vision_mask=False)
    with _beside(_cut(decoder, None, plainly, HideKeys(firsts)), staging) as file:
        expected = last_rows(_player(file).play(told))
    return [compare("dropped_as_hidden", expected, found, bar)]


@contextmanager
def _beside(model: ir.Model, staging: Path) -> Iterator[Path]:
    """A graph on the weights that are there, for as long as it is compared."""
    with tempfile.NamedTemporaryFile(dir=staging, suffix=".onnx", delete=False) as file:
        path = Path(file.name)
    saved = ir.load(staging / GRAPH).graph.initializers
    for name, value in model.graph.initializers.items():
        if name in saved:
            value.const_value = saved[name].const_value
    try:
        ir.save(model, path)
        yield path
    finally:
        path.unlink()


def _player(file: Path) -> Player:
    """On a graph of ours."""
    graph = ir.load(file).graph
    carried = {}
    for value in graph.inputs:
        name = value.name or ""
        if name.startswith("past_key_values."):
            carried[name] = name.replace("past_key_values", "present")
        elif name.startswith("past_mask."):
            carried[name] = name.replace("past_mask", "present_mask")
    return Player(file, {}, carried)


def _width(decoder: Decoder) -> int | None:
    """How wide an embedding is, where the decoder takes embeddings."""
    if any(role == "input_ids" for role in decoder.original_inputs.values()):
        return None
    source = next(v for v in decoder.model.graph.inputs if v.name == "inputs_embeds")
    width = source.shape[-1] if source.shape is not None else None
    if not isinstance(width, int):
        raise InputError(
            "the width of inputs_embeds is not in its shape",
            hint="declare it in the graph's input, or publish without comparing (--no-verify)",
        )
    return width


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
