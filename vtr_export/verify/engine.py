"""An engine beside the golden vectors of its artifact: what it keeps, what it says, and its files.

An engine has no inputs for keep-sets, so none can be forced on it. It runs free, and both modes are
read off that run: the keep-sets of every row and cut are gated (``keep_sets.*``, swaps of near ties
excused), and logits are gated where a row kept what the reference kept (``forced.*``): there a
forced run would have computed the same. Rows that kept others are counted and named, not gated.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import numpy as np

from vtr_export.engine_manifest import EngineManifest
from vtr_export.errors import ArtifactError, EngineError, InputError, UnavailableError
from vtr_export.manifest import Gate, Manifest
from vtr_export.published import MANIFEST, sha256_of
from vtr_export.runtime.decoder import Decoder
from vtr_export.runtime.engine import open_engine, read_engine
from vtr_export.runtime.session import Session
from vtr_export.verify.case import Array, Case, Ints, noted, sampled
from vtr_export.verify.compare import logit_gates
from vtr_export.verify.gates import (
    BARS,
    Bars,
    at_least,
    at_most,
    cosines,
    differing,
    failed_to_run,
)
from vtr_export.verify.golden import FOLDER, load_golden
from vtr_export.verify.keep_sets import Row, keep_set_gates, tie_gate
from vtr_export.verify.keep_sets import compare as compare_keep_sets
from vtr_export.verify.play import Inputs, Played, embed_case, encode_case, open_decoder, play
from vtr_export.verify.sessions import GraphError, Parts

NO_TIES = "the order of equal scores: TensorRT's own TopK promises none (build with --plugin on)"


@dataclass(frozen=True)
class EngineFindings:
    """What was measured, what was looked at, and what was not, each in words."""

    gates: tuple[Gate, ...]
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]
    executed: bool

    @property
    def failed(self) -> int:
        """How many gates."""
        return sum(not gate.passed for gate in self.gates)


@dataclass(frozen=True)
class Opened:
    """An engine's sessions, whatever runs them. ``orders_ties``: equal scores have a rule."""

    vision: Session
    embedding: Session
    decoder: Session
    compaction: Session | None = None  # of the cache, behind a prefill
    _: KW_ONLY
    keep: Ints | None  # what a tunable decoder is to be given
    cut_layers: tuple[int, ...]  # the layer each cut stands before
    orders_ties: bool = True

    @classmethod
    def of(cls, manifest: EngineManifest, sessions: Sequence[Session]) -> "Opened":
        """Those of an engine folder."""
        stages, (vision, embedding, *decoders) = manifest.artifact.model.stages, sessions
        keeps = [stage.keep.numerator for stage in stages if stage.keep is not None]
        return cls(
            vision,
            embedding,
            *decoders,
            keep=np.array(keeps, np.int64) if manifest.artifact.tunable else None,
            cut_layers=tuple(stage.first_layer for stage in stages[1:]),
            orders_ties=manifest.plugin is not None or len(manifest.opened_cuts) == len(keeps),
        )


@dataclass(frozen=True)
class Reply:
    """What the engine made of one case."""

    inputs: Inputs
    played: Played
    silent: tuple[Ints, ...]  # kept when every embedding is NaN


def verify_engine(
    path: str | Path, *, artifact: str | Path | None = None, run: bool = True
) -> EngineFindings:
    """Check an engine folder's files, then replay its golden vectors on the GPU.

    ``artifact``: also compare with that artifact in ONNX Runtime, step by step. Without ``run``,
    or without a GPU or TensorRT, the numbers are among ``not_checked``. Raises ArtifactError and
    EngineError for a damaged folder or one that does not belong here, InputError when no case fits
    the engine's profiles.
    """
    folder = Path(path)
    manifest, _, _ = read_engine(folder)
    cases = _golden(folder, manifest)
    gates, checked = _file_checks(folder, manifest, cases, artifact)
    try:
        if not run:
            raise UnavailableError("the files alone were asked for", hint="leave --files out")
        opened = Opened.of(*open_engine(folder))
    except UnavailableError as error:
        numbers = f"logits and keep-sets of {len(cases)} golden cases: {error.message}"
        return EngineFindings(tuple(gates), tuple(checked), (numbers,), executed=False)
    bars = BARS[manifest.artifact.dtype]
    answers, left_out = play_cases(opened, cases)
    found, more = replay(opened, answers, bars)
    gates += found
    if artifact is not None:
        try:
            gates += beside_onnxruntime(Path(artifact), opened, answers, bars)
        except GraphError as error:
            gates.append(failed_to_run("onnxruntime", str(error)))
    checked.append(f"numbers of {', '.join(a.played.case.question.name for a in answers)}")
    return EngineFindings(tuple(gates), tuple(checked), (*left_out, *more), executed=True)


def _golden(folder: Path, manifest: EngineManifest) -> list[Case]:
    files = sorted(name for name in manifest.files if name.startswith(f"{FOLDER}/"))
    if not files:
        raise ArtifactError(
            "the engine carries no golden vectors: its artifact had none",
            where=str(folder),
            hint="export the model verified and whole (--verify all), and build again",
        )
    return [load_golden(folder / name) for name in files]


def _file_checks(
    folder: Path, manifest: EngineManifest, cases: Sequence[Case], artifact: str | Path | None
) -> tuple[list[Gate], list[str]]:
    """What needs no GPU: hashes are right already, golden vectors could be read."""
    checked = [
        f"hashes of {len(manifest.files)} files and the manifest's own",
        f"{len(cases)} golden cases can be read",
    ]
    source = folder.parent if artifact is None else Path(artifact)
    if not _is_source(source, manifest):
        if artifact is None:
            return [], checked
        raise EngineError(
            "the engine was not built from this artifact",
            where=str(source),
            hint="give the artifact it was built from, or build again: vtr build ARTIFACT",
        )
    checked.append("inputs are those of the artifact's graphs")
    return _port_gates(source, manifest), checked


def _is_source(folder: Path, manifest: EngineManifest) -> bool:
    file = folder / MANIFEST
    return file.is_file() and sha256_of(file) == manifest.artifact_sha256


def _port_gates(source: Path, manifest: EngineManifest) -> list[Gate]:
    """The profiles name the inputs of the artifact's graphs: these, and no others."""
    import onnx_ir as ir

    graphs, gates = manifest.artifact.graphs, []
    for engine in manifest.engines:
        component = engine.component
        model = ir.load(source / getattr(graphs, component))
        expected = {value.name for value in model.graph.inputs}
        names = [set(p.inputs) for p in engine.profiles]
        others = set[str | None]().union(*(expected ^ each for each in names))
        detail = ", ".join(sorted(filter(None, others)))
        gates.append(at_most(f"{component}.inputs", len(others), 0, detail))
    return gates


def play_cases(opened: Opened, cases: Sequence[Case]) -> tuple[list[Reply], list[str]]:
    """Every case that fits the profiles, and why the others do not. InputError when none does."""
    decoder = Decoder(opened.decoder, opened.compaction, keep=opened.keep)
    answers, left_out = list[Reply](), list[str]()
    last: InputError | None = None
    for case in cases:
        try:
            answers.append(_reply(opened, decoder, case))
        except InputError as error:
            left_out.append(f"case {case.question.name}: {error.message}; {error.hint}")
            last = error
    if last is not None and not answers:
        raise last
    return answers, left_out


def _reply(opened: Opened, decoder: Decoder, case: Case) -> Reply:
    inputs = embed_case(opened.embedding, case, encode_case(opened.vision, case))
    played, question = play(decoder, inputs), case.question
    nothing = np.full_like(inputs.embeds, np.nan)
    mask, index = question.attention_mask, question.vision_index
    cache = decoder.empty(case.batch)
    places, groups = question.places, question.groups
    asked = cache, nothing, mask, index, places, groups
    silent = decoder(*asked, protected=question.protected, kept=True).kept
    return Reply(inputs, played, silent)


def replay(opened: Opened, answers: Sequence[Reply], bars: Bars) -> tuple[list[Gate], list[str]]:
    """Gates of the answers, and in words what they leave open."""
    gates = [_vision_gate(answers, bars)]
    played = [answer.played for answer in answers]
    rows = [
        row for each in played for row in compare_keep_sets(each.case, each.kept, bars.near_tie)
    ]
    gates += keep_set_gates(rows, bars, opened.cut_layers)
    open_questions = []
    if opened.cut_layers and opened.orders_ties:
        gates.append(tie_gate(answers[0].played.case, answers[0].silent, opened.cut_layers))
    elif opened.cut_layers:
        open_questions.append(NO_TIES)
    same = [_only_rows(each, _same_rows(rows, each)) for each in played]
    if comparable := [each for each in same if each.case.batch]:
        gates += logit_gates("forced", comparable, bars)
    total, equal = (sum(each.case.batch for each in of) for of in (played, same))
    if equal < total:
        open_questions.append(
            f"logits of {total - equal} of {total} rows: they keep other tokens than the reference"
        )
    return gates, open_questions


def beside_onnxruntime(
    folder: Path, opened: Opened, answers: Sequence[Reply], bars: Bars
) -> list[Gate]:
    """The same calls on the artifact's graphs in ONNX Runtime: embeddings, keep-sets, logits."""
    parts = Parts.of(folder, Manifest.load(folder))
    embedding = parts.open(parts.embedding)
    pairs = [(a, embed_case(embedding, a.played.case, a.inputs.features)) for a in answers]
    decoder = open_decoder(parts, parts.open(parts.decoder))
    counts = [differing(a.inputs.text_embeds, theirs.text_embeds) for a, theirs in pairs]
    gates = [at_most("embed_tokens.differences", sum(counts), 0)]
    rows, same = list[Row](), list[Played]()
    for answer, inputs in pairs:
        theirs = play(decoder, inputs)
        both = _side_by_side(answer.played, theirs, bars.near_tie)
        logits, ids = noted(theirs.logits)
        case = replace(answer.played.case, logits=logits, logit_ids=ids)
        mine = replace(answer.played, case=case)
        same.append(_only_rows(mine, _same_rows(both, mine)))
        rows += both
    gates += keep_set_gates(rows, bars, opened.cut_layers)
    if comparable := [each for each in same if each.case.batch]:
        gates += logit_gates("logits", comparable, bars)
    return [gate.model_copy(update={"name": f"onnxruntime.{gate.name}"}) for gate in gates]


def _side_by_side(mine: Played, theirs: Played, near_tie: float) -> list[Row]:
    """Rows whose other side is ``theirs``; near ties are those of the reference's scores."""
    pairs = zip(
        compare_keep_sets(mine.case, mine.kept, near_tie),
        compare_keep_sets(theirs.case, theirs.kept, near_tie),
        strict=True,
    )
    return [
        replace(a, vision=(a.vision[0], b.vision[0]), others=(a.others[0], b.others[0]))
        for a, b in pairs
    ]


def _same_rows(rows: Sequence[Row], played: Played) -> list[int]:
    """Numbers of the rows of a case that keep the same at every cut."""
    other = {
        row.row
        for row in rows
        if row.case == played.case.question.name
        and (row.vision[0] != row.vision[1] or row.others[0] != row.others[1])
    }
    return [number for number in range(played.case.batch) if number not in other]


def _only_rows(played: Played, rows: Sequence[int]) -> Played:
    """What logits are compared by, of some rows."""
    case = played.case
    kept = replace(
        case, tokens=case.tokens[rows], logits=case.logits[rows], logit_ids=case.logit_ids[rows]
    )
    return replace(played, case=kept, logits=played.logits[rows])


def _vision_gate(answers: Sequence[Reply], bars: Bars) -> Gate:
    worst = [_vision_cosine(a.inputs.features, a.played.case.features) for a in answers]
    return at_least("vision_encoder.cosine", min(worst), bars.cosine)


def _vision_cosine(features: Array, expected: Array) -> float:
    mine = sampled(features)
    return float(cosines(mine, expected)) if mine.shape == expected.shape else -1.0
