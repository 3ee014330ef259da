"""What ``--budget`` means, and what it says to a mistake."""

import pytest
from test_curves import facts

from vtr_export.errors import InputError
from vtr_export.search.budget import Workload, parse_budget
from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.latency import LatencyTable

TABLE = LatencyTable(
    backend="onnxruntime-cpu",
    runtime="",
    dtype="fp32",
    threads=1,
    score=str(Score()),
    layers=4,
    vision_tokens=100,
    text_tokens=10,
    rows=(10, 110),
    layer_ms=(1.0, 3.0),
    cut_ms=(0.1, 0.5),
    repeats=1,
)
CUT = Candidate((100, 50, 50, 0), Score(), 100)
# rows 110, 60, 60, 10: layers 3 + 2 + 2 + 1; cuts ranked 110 and 60 rows: 0.5 + 0.3
CUT_MS = 8.8


@pytest.mark.parametrize(
    ("text", "kind", "amount", "is_ms", "backend"),
    [
        ("flops=0.4", "flops", 0.4, False, None),
        ("flops=1", "flops", 1.0, False, None),
        ("tokens=.125", "tokens", 0.125, False, None),
        ("tokens=2e-1", "tokens", 0.2, False, None),
        ("latency=0.5@onnxruntime-cpu", "latency", 0.5, False, "onnxruntime-cpu"),
        ("latency=12.5ms@onnxruntime-cuda", "latency", 12.5, True, "onnxruntime-cuda"),
    ],
)
def test_a_budget_is_read(
    text: str, kind: str, amount: float, is_ms: bool, backend: str | None
) -> None:
    option = parse_budget(text)
    assert (option.kind, option.amount, option.is_ms, option.backend) == (
        kind,
        amount,
        is_ms,
        backend,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "does not say"),
        ("0.4", "does not say"),
        ("speed=2", "does not say"),
        ("flops=", "no number"),
        ("flops=half", "no number"),
        ("flops=nan", "no number"),
        ("flops=-0.1", "no number"),
        ("flops=40%", "no number"),
        ("flops=0", "no fraction"),
        ("flops=1.01", "no fraction"),
        ("tokens=0.0", "no fraction"),
        ("flops=" + "9" * 5000, "no fraction"),
        ("flops=12ms", "only a latency"),
        ("tokens=0.5@onnxruntime-cpu", "only a latency"),
        ("latency=0.5", "none is named"),
        ("latency=0.5@", "none is named"),
        ("latency=0.5@abacus", "not known"),
        ("latency=2@onnxruntime-cpu", "no fraction"),
        ("latency=0ms@onnxruntime-cpu", "no time"),
        ("latency=ms@onnxruntime-cpu", "no number"),
    ],
)
def test_a_mistake_shows_the_way_out(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        parse_budget(text)
    example = next(word for word in error.value.hint.split() if "=" in word).rstrip(",")
    parse_budget(example)  # what the hint offers is taken


def test_tokens_are_the_mean_over_the_layers() -> None:
    budget = parse_budget("tokens=0.5").bind(facts(4, 100), Workload(100, 10))
    assert budget.target == 0.5
    assert budget.cost(CUT) == pytest.approx((100 + 50 + 50 + 0) / 400)


def test_a_latency_is_what_the_table_says() -> None:
    model, work = facts(4, 100), Workload(100, 10)
    relative = parse_budget("latency=0.5@onnxruntime-cpu").bind(model, work, TABLE)
    assert relative.cost(CUT) == pytest.approx(CUT_MS / 12)
    assert relative.cost(CUT.with_tail(1, 100)) == 1
    absolute = parse_budget("latency=9ms@onnxruntime-cpu").bind(model, work, TABLE)
    assert absolute.target == pytest.approx(9 / 12)


def test_milliseconds_that_the_unpruned_model_meets_are_no_budget() -> None:
    with pytest.raises(InputError, match="12 ms"):
        parse_budget("latency=13ms@onnxruntime-cpu").bind(facts(4, 100), Workload(100, 10), TABLE)
