"""Measured latency: what is timed, what is made of it, and that a prediction never changes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_checkpoint, tiny_llava

from vtr_export.checkpoint import read_config
from vtr_export.errors import InputError, UnavailableError
from vtr_export.families import read_facts
from vtr_export.search import latency
from vtr_export.search.budget import BACKENDS, Workload
from vtr_export.search.candidate import Candidate, Score, Space
from vtr_export.search.latency import LatencyTable, Times, fit, measure, race, time_candidate

CPU = "onnxruntime-cpu"
WORK = Workload(vision_tokens=16, text_tokens=9)
PARTS = 16
TEXT = Score("previous", "text", "mean")


def rows_of(step: Any) -> list[int]:
    """Rows that entered each layer of a prefill: what its cache holds."""
    keys = {name: value for name, value in step.cache.values.items() if name.endswith(".key")}
    return [keys[f"past_key_values.{layer}.key"].shape[2] for layer in range(len(keys))]


@pytest.fixture(scope="module")
def measured(checkpoint: Path, traced_once: Any) -> tuple[LatencyTable, list[list[int]]]:
    """A table of a real model, and what entered its layers in each run."""
    from vtr_export.frontends import transformers

    seen: list[list[int]] = []

    def watched(runs: Sequence[Callable[[], Any]], repeats: int, say: Any) -> list[float]:
        seen.extend(rows_of(run()) for run in runs)
        return race(runs, repeats, say)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "load", traced_once)
        patch.setattr(latency, "race", watched)
        table = measure(checkpoint, CPU, TEXT, WORK, threads=1, repeats=2)
    return table, seen


def test_what_is_timed_is_the_unpruned_model_and_uniform_keeps(
    measured: tuple[LatencyTable, list[list[int]]],
) -> None:
    table, seen = measured
    keeps = [row - WORK.text_tokens for row in table.rows]
    assert keeps[0] == 0
    assert keeps[-1] == WORK.vision_tokens
    whole = WORK.vision_tokens + WORK.text_tokens
    uniform = [[whole, row, row] for row in table.rows]
    assert seen == [[whole] * 3, *uniform, *uniform]


def test_a_table_never_falls_and_survives_json(
    measured: tuple[LatencyTable, list[list[int]]],
) -> None:
    table, _ = measured
    assert list(table.rows) == sorted(set(table.rows))
    assert list(table.layer_ms) == sorted(table.layer_ms)
    assert list(table.cut_ms) == sorted(table.cut_ms)
    assert table.unpruned_ms > 0
    assert table.score == str(TEXT)
    again = LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    candidate = Candidate((PARTS, 11, 3), TEXT, PARTS)
    assert again.predict_ms(candidate) == table.predict_ms(candidate)


def test_an_unpruned_candidate_takes_what_was_measured(
    measured: tuple[LatencyTable, list[list[int]]],
) -> None:
    table, _ = measured
    unpruned = Candidate((PARTS,) * 3, TEXT, PARTS)
    assert table.predict_ms(unpruned) == pytest.approx(table.unpruned_ms)


def test_a_candidate_is_timed_beside_the_unpruned_model(
    checkpoint: Path, shared_traces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def watched(runs: Sequence[Callable[[], Any]], repeats: int, say: Any) -> list[float]:
        seen.extend(rows_of(run()) for run in runs)
        return [2.0, 1.0]

    monkeypatch.setattr(latency, "race", watched)
    candidate = Candidate((PARTS, 10, 2), Score(), PARTS)
    assert time_candidate(checkpoint, CPU, candidate, WORK, threads=1) == (1.0, 2.0)
    assert seen == [[25, 25, 25], [25, 19, 11]]


def made_of(
    layer: Callable[[Any], Any], cut: Callable[[Any], Any], layers: int, rows: Any
) -> Times:
    """Times of a machine whose layers and cuts take what they are said to; 3 ms are elsewhere."""
    outside, whole = 3.0, rows[-1]
    one = outside + layer(whole) + (layers - 1) * layer(rows) + cut(whole)
    return Times(outside + layers * layer(whole), tuple(one), tuple(one + (layers - 2) * cut(rows)))


@given(
    st.integers(3, 40),
    st.lists(st.floats(0.01, 5), min_size=3, max_size=3),
    st.lists(st.floats(0.001, 1), min_size=2, max_size=2),
)
def test_a_machine_is_found_again(layers: int, a: list[float], b: list[float]) -> None:
    rows = np.array([10, 30, 50, 90, 130])
    layer, cut = (
        np.polynomial.Polynomial([a[0], a[1] / 50, a[2] / 9000]),
        np.polynomial.Polynomial([b[0], b[1] / 100]),
    )
    layer_ms, cut_ms = fit(made_of(layer, cut, layers, rows), layers)
    assert layer_ms == pytest.approx(layer(rows) + 3.0 / layers)
    assert cut_ms == pytest.approx(cut(rows))
    table = LatencyTable(
        CPU, "", "fp32", 1, "", layers, 120, 10, tuple(rows.tolist()), layer_ms, cut_ms, 1
    )
    keeps = (120, 80) + (20,) * (layers - 2)
    expected = 3.0 + layer(130) + layer(90) + (layers - 2) * layer(30) + cut(130) + cut(90)
    assert table.predict_ms(Candidate(keeps, Score(), 120)) == pytest.approx(expected)


@given(
    st.integers(2, 20),
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=2, max_size=8),
    st.floats(0.1, 9),
)
def test_noise_makes_no_table_that_falls(
    layers: int, pairs: list[tuple[float, float]], unpruned: float
) -> None:
    one, every = zip(*pairs, strict=True)
    for values in fit(Times(unpruned, one, every), layers):
        assert list(values) == sorted(values)
        assert values[0] >= 0
    assert fit(Times(unpruned, one, every), layers)[0][-1] * layers == pytest.approx(unpruned)


def test_fewer_tokens_are_never_predicted_slower_at_the_same_cuts() -> None:
    table = LatencyTable(CPU, "", "fp32", 1, "", 4, 12, 4, (4, 8, 16), (1, 1, 3), (0, 1, 1), 1)
    for a, b, c in np.ndindex(12, 12, 12):
        if a >= b >= c > 0:
            more, less = (Candidate((12, a, b, c - i), Score(), 12) for i in (0, 1))
            if more.cut_layers() == less.cut_layers():
                assert table.predict_ms(less) <= table.predict_ms(more)


def test_turns_are_taken_and_the_first_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    order, clock = list[str](), [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    def run(name: str, *seconds: float) -> Callable[[], None]:
        left = iter(seconds)

        def call() -> None:
            clock[0] += next(left)
            order.append(name)

        return call

    times = race([run("a", 90, 1, 3, 2), run("b", 0, 5, 5, 80)], 3, lambda _: None)
    assert "".join(order) == "baabbaab"
    assert times == [2000, 5000]


def space_of(folder: Path) -> Space:
    return Space(read_facts(read_config(folder)[0], str(folder)))


def test_an_open_schedule_can_be_any_candidate(checkpoint: Path) -> None:
    space = space_of(checkpoint)
    resolved = latency.open_schedule(space, TEXT).resolve(space.facts)
    assert [cut.before_layer for cut in resolved.cuts] == [1, 2]
    assert {cut.keep.denominator for cut in resolved.cuts} == {space.parts}
    assert (resolved.source, resolved.query, resolved.heads) == ("previous", "text", "mean")


def test_what_a_budget_may_name_can_be_timed() -> None:
    assert set(latency.DEVICES) == set(BACKENDS)


@pytest.mark.parametrize("backend", ["", "abacus", "torch-cpu"])
def test_an_unknown_backend_is_refused(checkpoint: Path, backend: str) -> None:
    with pytest.raises(InputError, match="backend") as error:
        measure(checkpoint, backend, Score(), WORK)
    assert CPU in error.value.hint


def test_a_backend_that_is_not_here_is_refused_before_anything_is_exported(
    checkpoint: Path,
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is here: only a machine without it can refuse it")
    said: list[str] = []
    with pytest.raises(UnavailableError, match="CUDA"):
        measure(checkpoint, "onnxruntime-cuda", Score(), WORK, progress=said.append)
    assert not said


def test_nothing_to_drop_is_nothing_to_time(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to drop"):
        measure(checkpoint, CPU, Score(), Workload(0, 9))
    flat = save_checkpoint(tiny_llava(layers=1), tmp_path)
    with pytest.raises(InputError, match="nothing to drop"):
        measure(flat, CPU, Score(), WORK)
