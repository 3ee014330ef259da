"""Decoding behind a compacted cache is decoding behind one whose dropped tokens are hidden."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_this_process
from cut_graphs import Traced, Tracer, serialized
from onnx_ir.passes.common import ShapeInferencePass
from PIL import Image
from simulated_tensorrt import Simulation
from test_families import LLAVA_7B
from test_parity import GATE, Turn, assert_close, turn, words
from tiny_models import save_checkpoint, tiny_llava
from torch import Tensor

from vtr_export import compile as compiler
from vtr_export.backends.tensorrt.operators import refused
from vtr_export.cost import decode_cost
from vtr_export.errors import ScheduleError
from vtr_export.exporter import Report, export
from vtr_export.families import read_facts
from vtr_export.manifest import Manifest
from vtr_export.memory import Workload, get_weight_type, kv_bytes, kv_row_bytes, peak_bytes
from vtr_export.passes.compact_cache import compact_cache
from vtr_export.reductions.mustdrop_cache import OutputAwareCache
from vtr_export.reference import Reference, Step, positions_of
from vtr_export.reference.state import Cache
from vtr_export.runtime.artifact import Artifact, Request
from vtr_export.runtime.decoder import Decoder
from vtr_export.runtime.sampling import Options
from vtr_export.runtime.session import OnnxRuntime, Resident
from vtr_export.runtime.tensorrt import Gpu, Plan, TensorRT
from vtr_export.schedule import Resolved, Schedule
from vtr_export.verify.compare import compare
from vtr_export.verify.gates import BARS
from vtr_export.verify.golden import load_golden
from vtr_export.verify.sessions import Parts

DECODE = (OutputAwareCache(),)
TEXT = """\
version: 1
prefill:
  stages: [{before_layer: 1, keep: 12}, {before_layer: 2, keep: 6}, {before_layer: 3, keep: 3}]
decode: [{method: mustdrop}]
"""
CASES: dict[str, dict[str, Any]] = {
    "original": {},
    "repacked": {"positions": "repacked"},
    "next": {"source": "next", "query": "text"},
    "inside": {"drop_point": "inside", "rank": "per_image"},
}


class Hiding:
    """The reference without a compaction; what was dropped later is hidden from earlier layers."""

    def __init__(self, tiny: Traced, schedule: Resolved) -> None:
        parts = tiny.model.model.language_model, tiny.model.lm_head
        self.reference = Reference(*parts, replace(schedule, decode=()))
        self.seen, self.cache = torch.zeros(0, 0, dtype=torch.int64), None

    def __call__(self, embeds: Tensor, mask: Tensor, vision: Tensor) -> Step:
        self.seen = torch.cat((self.seen.reshape(len(mask), -1), mask), 1)
        positions = positions_of(self.seen)[:, -mask.shape[1] :]
        step = self.reference(embeds, self.seen, positions, vision, self.cache)
        self.cache = hidden(step)  # type: ignore[assignment]  # None before the first call
        return step


def hidden(step: Step) -> Cache:
    """The cache with a zero for every token that a later cut dropped: by their names."""
    names = [torch.arange(step.cache.padding[0].shape[1]).expand_as(step.cache.padding[0])]
    for kept in step.kept:
        own = names[-1][:, -kept.max() - 1 :] if len(names) == 1 else names[-1]
        names.append(own.gather(1, kept))
    padding = list(step.cache.padding)
    for stage in range(1, len(names) - 1):
        new = names[stage].shape[1]
        padding[stage] = padding[stage].clone()
        for row, own in enumerate(names[stage]):
            stays = torch.isin(own, names[-1][row])
            padding[stage][row, -new:] *= stays
    return replace(step.cache, padding=tuple(padding))


class Graphs:
    """A decoder and its compaction in ONNX Runtime, as an artifact's run."""

    def __init__(self, tiny: Traced, schedule: Resolved, folder: Path) -> None:
        decoder = tiny.cut(schedule)
        compaction = compact_cache(decoder)
        assert compaction is not None
        self.files = [folder / "decoder.onnx", folder / "compaction.onnx"]
        for file, model in zip(self.files, (decoder, compaction), strict=True):
            file.write_bytes(serialized(model))
        self.decoder = Decoder(*(OnnxRuntime(file, threads=1) for file in self.files))
        self.cache: Any = None

    def __call__(self, embeds: Tensor, mask: Tensor, vision: Tensor) -> Any:
        self.cache = self.cache or self.decoder.empty(len(mask))
        asked = embeds.numpy(), mask.numpy(), vision.numpy()
        step = self.decoder(self.cache, *asked, kept=mask.shape[1] > 1)
        self.cache = step.cache
        return step

    def lengths(self, part: str = "past_key_values.") -> list[int]:
        """Tokens of every cache."""
        values = self.cache.values.items()
        return [value.shape[-2] for name, value in values if name.startswith(part)]


def on_engines(files: Sequence[Path]) -> Decoder:
    """The same graphs as two plans of one simulated GPU, for calls of any length."""
    simulation, sessions = Simulation(), []
    gpu = Gpu.of(simulation.library(), simulation.cuda)  # type: ignore[arg-type]  # of no device
    for file in files:
        ports = OnnxRuntime(file, threads=1).inputs.values()
        dims = {
            p.name: [(d, d) if isinstance(d, int) else (0, 500) for d in p.shape] for p in ports
        }
        bounds = {
            name: ([least for least, _ in each], [most for _, most in each])
            for name, each in dims.items()
        }
        plan = file.with_suffix(".plan")
        plan.write_bytes(file.name.encode())
        simulation.serve(file.name.encode(), str(file), [bounds])
        data = Plan.open(plan, list(simulation.known)[-1]).data
        sessions.append(TensorRT(plan, data=data, gpu=gpu))
    return Decoder(*sessions)


def conversation(tiny: Traced, generator: torch.Generator) -> list[Turn]:
    """Rows of unlike numbers of images, an answer, new images, an answer, a question."""
    some = [turn(tiny, [1, 2, 0], generator), *(words(tiny, 3, 1, generator) for _ in range(2))]
    more = [turn(tiny, [1, 0, 1], generator), *(words(tiny, 3, n, generator) for n in (1, 4, 1))]
    return some + more


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_equals_one_with_dropped_tokens_hidden(
    case: str, traced: Tracer, tmp_path: Path
) -> None:
    tiny = traced("llama")
    schedule = tiny.schedule({1: 12, 2: 6, 3: 3}, decode=DECODE, **CASES[case])
    graphs, oracle = Graphs(tiny, schedule, tmp_path), Hiding(tiny, schedule)
    for call in conversation(tiny, torch.Generator().manual_seed(5)):
        mine, theirs = graphs(*call), oracle(*call)
        assert_close(mine.logits, theirs.logits[:, 0])
        for ours, kept in zip(mine.kept, theirs.kept, strict=False):
            assert np.array_equal(ours, kept.numpy())
        whole, *others = graphs.lengths()[::2]
        assert len(set(others)) == 1, "caches behind the first cut have one length"
        assert others[0] < whole


def test_an_engine_hands_its_cache_from_one_plan_to_the_other(
    traced: Tracer, tmp_path: Path
) -> None:
    tiny = traced("llama")
    graphs = Graphs(tiny, tiny.schedule({1: 12, 2: 6, 3: 3}, decode=DECODE), tmp_path)
    calls = conversation(tiny, torch.Generator().manual_seed(7))
    expected = [graphs(*call).logits for call in calls]
    graphs.decoder, graphs.cache = on_engines(graphs.files), None
    for call, logits in zip(calls, expected, strict=True):
        assert np.array_equal(graphs(*call).logits, logits)
        caches = graphs.cache.values.items()
        assert all(isinstance(v, Resident) for name, v in caches if name.startswith("past"))


def test_the_compaction_parses_in_tensorrt_10(traced: Tracer) -> None:
    tiny = traced("llama")
    model = compact_cache(tiny.cut(tiny.schedule({1: 12, 2: 6, 3: 3})))
    assert model is not None
    lowered = compiler.run(compiler.tensorrt_10(), model)
    ShapeInferencePass(data_prop=False)(lowered)
    assert refused(lowered) == ()


@pytest.mark.parametrize("case", ["original", "repacked"])
def test_the_reference_says_the_same(case: str, traced: Tracer) -> None:
    tiny = traced("llama")
    schedule = tiny.schedule({1: 12, 2: 6, 3: 3}, decode=DECODE, **CASES[case])
    embeds, mask, vision = turn(tiny, [1, 2], torch.Generator().manual_seed(6))
    parts = tiny.model.model.language_model, tiny.model.lm_head
    table = tiny.model.get_input_embeddings()
    said = Reference(*parts, schedule).generate(table, embeds, mask, vision, max_new_tokens=5)
    oracle = Hiding(tiny, schedule)
    logits = [oracle(embeds, mask, vision).logits]
    nothing, one = vision[:, :0], torch.ones_like(mask[:, :1])
    for column in range(4):
        with torch.no_grad():
            token = table(said.tokens[:, column : column + 1])
        logits.append(oracle(token, one, nothing).logits)
    np.testing.assert_allclose(said.logits, torch.cat(logits, 1), rtol=0, atol=GATE)


# --- an artifact ---


@dataclass(frozen=True)
class Exported:
    folder: Path
    report: Report


@pytest.fixture(scope="module")
def exported(one_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A verified export; nobody changes it."""
    checkpoint = save_checkpoint(tiny_llava(layers=4), tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("out") / "artifact"
    with in_this_process():
        done = export(Schedule.parse(TEXT), checkpoint, folder, verify="all")
    return Exported(folder, done)


def test_an_artifact_is_verified_with_its_compaction(exported: Exported) -> None:
    gates = {gate.name: gate for gate in exported.report.gates}
    assert all(gate.passed for gate in gates.values())
    assert {"forced.decode.cosine", "free.decode.cosine"} <= gates.keys()
    graph = Manifest.load(exported.folder).graphs.compact_cache
    assert graph in exported.report.files


def test_without_its_compaction_it_fails_in_decoding_alone(exported: Exported) -> None:
    manifest = Manifest.load(exported.folder)
    parts = replace(Parts.of(exported.folder, manifest), compaction=None)
    cases = [load_golden(file) for file in sorted((exported.folder / "golden").iterdir())]
    gates = {gate.name: gate.passed for gate in compare(parts, cases, BARS["fp32"])}
    failed = {name for name, passed in gates.items() if not passed}
    assert {"forced.decode.cosine", "free.decode.cosine"} <= failed
    assert all(".decode." in name or name.endswith(".top1") for name in failed)


def test_a_run_holds_as_many_tokens_as_the_last_stage(exported: Exported) -> None:
    """16 vision tokens; the last stage keeps 3 of them, and text. No cache leaves its device."""
    artifact = Artifact.load(exported.folder, threads=1)
    image = Image.new("RGB", (28, 28), "red")
    prepared = artifact.prepare([Request("what colour ?", [image])])
    empty, options = artifact.model.decoder.empty(1), Options(max_new_tokens=4)
    (answer,), done = artifact.answer(empty, prepared, options)
    assert (answer.vision_tokens, [len(kept) for kept in answer.kept]) == (16, [12, 6, 3])
    caches = [v for name, v in done.cache.values.items() if name.startswith("past_key_values.")]
    assert all(isinstance(value, Resident) for value in caches)
    whole = answer.prompt_tokens + done.steps
    assert [value.shape[2] for value in caches] == [whole] * 2 + [whole - 13] * 6


# --- what it saves, and where it cannot be ---


def test_the_cache_and_decoding_shrink_by_what_later_cuts_drop() -> None:
    """LLaVA-1.5-7B, counted by hand: layers 0-1 whole, 2-5 as short as 6-31."""
    facts = read_facts(LLAVA_7B, "config.json")
    text = "prefill: {stages: [{before_layer: 2, keep: 300}, {before_layer: 6, keep: 100}]}\nversion: 1"
    plain = Schedule.parse(text).resolve(facts)
    compacted = replace(plain, decode=DECODE)
    kind, work = get_weight_type("fp16"), Workload(576, 64, new_tokens=10)
    row = kv_row_bytes(facts, kind)
    tokens = 2 * (576 + 64) + 30 * (100 + 64)
    assert kv_bytes(facts, compacted, work, kind, 10) == (tokens + 32 * 10) * row
    assert kv_bytes(facts, plain, work, kind, 10) == (tokens + 4 * 200 + 32 * 10) * row
    costs = [decode_cost(facts, each, 576, 64, 10, "F-A") for each in (plain, compacted)]
    assert costs[0] - costs[1] == 10 * 4 * 200 * 2 * facts.hidden  # 2nd of 200 keys less, 4 layers
    peaks = [peak_bytes(facts, each, work, kind, fused=True) for each in (plain, compacted)]
    assert peaks[0].prefill == peaks[1].prefill
    held = tokens + 4 * 200 + tokens  # while it is compacted: before and after
    assert peaks[1].decode == held * row


def test_one_cut_leaves_nothing_to_compact() -> None:
    facts = read_facts(LLAVA_7B, "config.json")
    text = "version: 1\nprefill: {stages: [{before_layer: 2, keep: 300}]}\ndecode: [{method: mustdrop}]"
    assert not Schedule.parse(text).resolve(facts).compacts


def test_a_recycled_token_is_in_no_earlier_cache() -> None:
    text = TEXT.replace("prefill:", "prefill:\n  merge: {by: recycle}")
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text)
    assert caught.value.where.endswith("decode")
