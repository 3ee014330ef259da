"""Keep curves: each meets its budget to the token, and looks as its family says."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtr_export.cost import prefill_cost
from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.search.budget import Budget, Workload, parse_budget
from vtr_export.search.candidate import SCORES, Candidate, Score, Space
from vtr_export.search.curves import (
    CURVES,
    Curve,
    Exponential,
    FastV,
    Linear,
    Pyramid,
    Random,
    Sigmoid,
    candidate_at,
    describe,
    reach,
    solve,
)

SIGMOIDS = st.builds(Sigmoid, floor=st.floats(0, 0.6), gamma=st.floats(0.05, 10))
OTHERS = st.one_of(
    st.builds(FastV, k=st.integers(1, 4)),
    st.builds(Pyramid, parts=st.integers(1, 5)),
    st.builds(Random, seed=st.integers(0, 99)),
    st.sampled_from([Linear(), Exponential()]),
)
WORKLOAD = Workload(vision_tokens=100, text_tokens=20)


def facts(layers: int, tokens: int | None = 60, **sizes: int) -> ModelFacts:
    values = dict.fromkeys((field.name for field in dataclasses.fields(ModelFacts)), 0)
    given_sizes = {
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate": 96,
        "vocab": 50,
    } | sizes
    return ModelFacts(**(values | given_sizes | {"layers": layers, "tokens_per_image": tokens}))  # type: ignore[arg-type]


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    return facts(
        draw(st.integers(2, 14)),
        draw(st.one_of(st.none(), st.integers(1, 200))),
        hidden=draw(st.integers(8, 512)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 16])),
        intermediate=draw(st.integers(8, 900)),
    )


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Space, Budget]:
    model = draw(models())
    kind, amount = draw(st.sampled_from(["flops", "tokens"])), draw(st.floats(0.02, 1))
    vision = (model.tokens_per_image or 100) * draw(st.integers(1, 2))
    work = Workload(vision, draw(st.integers(1, 80)))
    return Space(model), parse_budget(f"{kind}={amount:.4f}").bind(model, work)


def one_more(candidate: Candidate) -> list[Candidate]:
    """Every schedule that keeps one token more in one layer."""
    more = []
    for layer in range(1, len(candidate.keeps)):
        keeps = list(candidate.keeps)
        keeps[layer] += 1
        if keeps[layer] <= keeps[layer - 1]:
            more.append(Candidate(tuple(keeps), candidate.score, candidate.parts))
    return more


def one_cut_less(candidate: Candidate) -> list[Candidate]:
    """Every schedule that keeps at one cut what the layers before it have."""
    fewer, keeps = [], candidate.keeps
    for level in sorted(set(keeps))[:-1]:
        above = min(keep for keep in keeps if keep > level)
        raised = tuple(above if keep == level else keep for keep in keeps)
        fewer.append(Candidate(raised, candidate.score, candidate.parts))
    return fewer


def one_stage_more(candidate: Candidate) -> list[Candidate]:
    """Every schedule that keeps one token more in all layers of a stage."""
    levels = set(candidate.keeps) - {candidate.parts}
    return [
        Candidate(
            tuple(k + (k == level) for k in candidate.keeps), candidate.score, candidate.parts
        )
        for level in levels
    ]


@settings(max_examples=150)
@given(st.one_of(SIGMOIDS, OTHERS), budgets(), st.sampled_from(SCORES))
def test_a_solved_curve_leaves_no_room_for_one_more_token(
    curve: Curve, given_budget: tuple[Space, Budget], score: Score
) -> None:
    space, budget = given_budget
    least, _ = reach(curve, space, score, budget)
    if budget.target < least:
        with pytest.raises(InputError, match=f"{least:.4g}"):
            solve(curve, space, score, budget)
        return
    solved = solve(curve, space, score, budget)
    keeps = solved.candidate.keeps
    assert keeps[0] == space.parts
    assert list(keeps) == sorted(keeps, reverse=True)
    assert keeps[-1] >= 0
    assert budget.cost(solved.candidate) == solved.cost <= budget.target
    assert all(budget.cost(more) > budget.target for more in one_more(solved.candidate))
    assert all(budget.cost(more) > budget.target for more in one_cut_less(solved.candidate))
    assert all(budget.cost(more) > budget.target for more in one_stage_more(solved.candidate))


def dear(candidate: Candidate) -> float:
    """Tokens cost 1 a layer, a cut 30."""
    return (sum(candidate.keeps) + 30 * len(candidate.cut_layers())) / 1000


@pytest.mark.parametrize("curve", [Sigmoid(0.0, 2.0), Sigmoid(0.1, 0.2), Linear(), Random(1)])
def test_a_cut_that_costs_more_than_it_drops_is_left_out(curve: Curve) -> None:
    solved = solve(curve, Space(facts(10, 100)), Score(), Budget("made up", 0.5, dear))
    keeps = solved.candidate.keeps
    for layer in solved.candidate.cut_layers():
        stage = [i for i, keep in enumerate(keeps) if keep == keeps[layer]]
        assert len(stage) * (keeps[layer - 1] - keeps[layer]) > 30
    assert len(solved.candidate.cut_layers()) > 1  # the shape is still there
    assert 0.5 - solved.cost < 0.01


def test_a_token_that_makes_room_for_one_before_it_is_followed_up() -> None:
    """Layers are topped up where most is lacking first: a shallower one may be open only then."""
    model = facts(8, 10, hidden=8, intermediate=90)
    budget = parse_budget("flops=0.948").bind(model, Workload(10, 40))
    solved = solve(Exponential(), Space(model), Score("previous", "text", "max"), budget)
    assert all(budget.cost(more) > budget.target for more in one_more(solved.candidate))


@settings(max_examples=60)
@given(OTHERS, budgets())
def test_no_layer_is_more_than_a_token_above_its_family(
    curve: Curve, given_budget: tuple[Space, Budget]
) -> None:
    """Where cuts cost nothing; a cut that merges with its neighbour frees FLOPs for others."""
    space, _ = given_budget
    budget = Budget("tokens", 0.7, lambda candidate: candidate.mean_keep)
    if reach(curve, space, Score(), budget)[0] > budget.target:
        return
    solved = solve(curve, space, Score(), budget)
    exact = np.asarray(curve.shares(space.layers, solved.value)) * space.parts
    given_keeps = np.asarray(solved.candidate.keeps)[1:]
    assert (given_keeps <= np.floor(exact[1:] + 1e-6) + 1).all()
    assert (given_keeps >= np.floor(exact[1:] - 1e-6)).all()


def test_each_family_has_the_shape_of_its_name() -> None:
    layers, parts = 12, 1000
    space = Space(facts(layers, parts))
    budget = Budget("tokens=0.5", 0.5, lambda candidate: candidate.mean_keep)
    keeps = {
        curve.family: solve(curve, space, Score(), budget).candidate.keeps
        for curve in (FastV(3), Pyramid(4), Linear(), Exponential(), Random(0))
    }
    fastv = keeps["fastv"]
    assert fastv[:3] == (parts,) * 3
    # 12 · 500 = 3 · 1000 + 9 k  =>  k = 333.3, so three layers have one token more
    assert fastv[3:] == (334,) * 3 + (333,) * 6
    pyramid = keeps["pyramid"]
    assert pyramid[:3] == (parts,) * 3
    ratio = next(x for x in np.linspace(0, 1, 100_001) if 1 + x + x**2 + x**3 >= 2)
    for run in range(4):
        assert pyramid[3 * run] == pytest.approx(parts * ratio**run, abs=1.5)
        assert pyramid[3 * run] - pyramid[3 * run + 2] <= 1
    falls = -np.diff(keeps["linear"])[:-1]
    falls = falls[np.asarray(keeps["linear"][1:-1]) > 1]
    assert falls.max() - falls.min() <= 2
    ratios = np.asarray(keeps["exponential"][1:6]) / np.asarray(keeps["exponential"][:5])
    assert ratios == pytest.approx(ratios[0], abs=0.01)
    assert len(set(keeps.values())) == 5


def test_a_sigmoid_is_the_formula() -> None:
    floor, gamma, centre, layers = 0.2, 0.9, 4.5, 10
    by_hand = [
        floor + (1 - floor) / (1 + math.exp(-gamma * (centre - layer))) for layer in range(layers)
    ]
    assert Sigmoid(floor, gamma).shares(layers, centre) == pytest.approx(by_hand)


def test_a_steep_sigmoid_on_fastvs_floor_is_fastv() -> None:
    space = Space(facts(16, 576))
    budget = parse_budget("flops=0.45").bind(space.facts, Workload(576, 40))
    for k in (1, 2, 5):
        step = solve(FastV(k), space, Score(), budget)
        smooth = solve(Sigmoid(step.value, 50.0), space, Score(), budget)
        apart = np.abs(np.subtract(step.candidate.keeps, smooth.candidate.keeps))
        *others, most = sorted(apart)  # what rounding leaves over goes to the layer of the step
        assert max(others) <= 1
        assert most < 16


def test_random_curves_differ_by_seed_and_repeat() -> None:
    space = Space(facts(10))
    budget = Budget("tokens=0.4", 0.4, lambda candidate: candidate.mean_keep)
    first, again, other = (solve(Random(seed), space, Score(), budget) for seed in (1, 1, 2))
    assert first == again
    assert first.candidate != other.candidate


def test_a_budget_below_layer_0_names_what_is_reachable() -> None:
    space = Space(facts(8, 144))
    budget = parse_budget("tokens=0.2").bind(space.facts, WORKLOAD)
    with pytest.raises(InputError, match=r"0\.25 to 1") as error:
        solve(FastV(2), space, Score(), budget)
    assert "0.25" in error.value.hint
    assert solve(FastV(1), space, Score(), budget).candidate.keeps[1:] == (13,) * 2 + (12,) * 5


def test_a_whole_budget_keeps_everything() -> None:
    space = Space(facts(6))
    for kind in ("tokens", "flops"):
        budget = parse_budget(f"{kind}=1").bind(space.facts, WORKLOAD)
        for curve in (Sigmoid(0.1, 1), FastV(2), Pyramid(3), Linear(), Exponential(), Random(3)):
            assert solve(curve, space, Score(), budget).candidate.is_unpruned


@dataclasses.dataclass(frozen=True)
class Half:
    """A family that cannot keep more than half."""

    family = "half"
    solved = "share"

    def limits(self, layers: int) -> tuple[float, float]:
        return 0.0, 0.5

    def shares(self, layers: int, value: float) -> np.ndarray:
        return np.full(layers, value)


def test_a_budget_above_the_family_names_what_is_reachable() -> None:
    space = Space(facts(4, 100))
    budget = Budget("tokens=0.9", 0.9, lambda candidate: candidate.mean_keep)
    with pytest.raises(InputError, match=r"0\.25 to 0\.625"):
        solve(Half(), space, Score(), budget)


def test_flops_are_the_cost_models() -> None:
    model = facts(7, 60)
    budget = parse_budget("flops=0.5").bind(model, Workload(120, 33))
    candidate = Candidate((60, 60, 41, 41, 20, 20, 3), SCORES[2], 60)
    whole = prefill_cost(model, candidate.with_tail(1, 60).resolve(model), 120, 33, "exact")
    pruned = prefill_cost(model, candidate.resolve(model), 120, 33, "exact")
    assert budget.cost(candidate) == pruned / whole


def test_every_family_is_in_the_table_and_says_what_it_is() -> None:
    for name, kind in CURVES.items():
        assert kind.family == name
    assert describe(Sigmoid(0.1, 2.0)) == {"family": "sigmoid", "floor": 0.1, "gamma": 2.0}
    solved = solve(
        Pyramid(2), Space(facts(4, 10)), Score(), Budget("", 0.6, lambda one: one.mean_keep)
    )
    assert solved.to_json()["lambda"] == solved.value
    lowest = candidate_at(Pyramid(2), 0.0, Space(facts(4, 10)), Score())
    assert lowest.keeps == (10, 10, 0, 0)
