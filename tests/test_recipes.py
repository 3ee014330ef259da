"""Published recipes: what is read, what is written, what is refused, and both ways at once."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vtr_export import generators, recipes
from vtr_export.cli.schedule_files import Form, Notation
from vtr_export.errors import InputError, ScheduleError, VtrError
from vtr_export.schedule import Schedule
from vtr_export.steps import Shape, Steps, steps_of

SAMPLES = Path(__file__).parents[1] / "samples" / "schedules"
LLAVA = Shape(32, 576)


def read(text: str, **options: Any) -> Schedule:
    return recipes.read(text, "recipe.txt", **options)


def said(schedule: Schedule) -> Any:
    """All but where it comes from."""
    return schedule.document.model_copy(update={"origin": {}})


def keeps(schedule: Schedule, shape: Shape = LLAVA) -> tuple[int, ...]:
    return schedule.resolve(shape).keep_per_layer(shape.tokens_per_image or 0)


# what is read: as a publication's code would run, by hand

FASTV_HALF = (576,) * 2 + (288,) * 30
PYRAMID = (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"fastv_k": 2, "fastv_r": 0.5}', FASTV_HALF),
        (
            "{'use_fastv': True, 'fastv_k': 2, 'fastv_r': 0.5, 'image_token_length': 576}",
            FASTV_HALF,
        ),
        ("fastv_k: 3\nfastv_r: 0.75\nimage_token_start_index: 5\n", (576,) * 3 + (144,) * 29),
        ("K: 2\nR: 50%\n", FASTV_HALF),
        ("fast_v_agg_layer: 2\nfast_v_attention_rank: 72\n", (576,) * 2 + (72,) * 30),
        ("run.py --fast-v-agg-layer 2 --fast-v-attention-rank 72", (576,) * 2 + (72,) * 30),
        ("--layer_list '[8,16,24]' --image_token_ratio_list '[0.5,0.25,0.125]'", PYRAMID),
        (
            "#!/bin/bash\npython -m x \\\n  --temperature 0 \\\n --layer_list  '[8,16,24]' \\\n"
            '  --image_token_ratio_list "[0.5,0.25,0.125]" \\\n --conv-mode v1\ncd ./data\n',
            PYRAMID,
        ),
        ("layer_list = [8, 16, 24]  # of 32\nimage_token_ratio_list = [.5, .25, .125]\n", PYRAMID),
        # 83, 33 and 29 of the dropped tokens make 9, 4 and 3 clusters
        (
            "RETAIN_TOKN=192 bash eval.sh",
            (576,) * 3 + (300 + 9,) * 4 + (200 + 4,) * 9 + (110 + 3,) * 16,
        ),
        (
            "USE_VERSION=2_0 RETAIN_TOKN=64 bash eval.sh",
            (576,) * 3 + (66,) * 4 + (34,) * 9 + (20,) * 16,
        ),
        (
            "sparse_token_list_96 = [238,48,26]",
            (576,) * 3 + (238 + 11,) * 4 + (48 + 7,) * 9 + (26 + 1,) * 16,
        ),
        (
            "{pruning_loc: [4, 9], sparse_token_list: [100, 10]}",
            (576,) * 5 + (100 + 15,) * 5 + (10 + 4,) * 22,
        ),
        ("--use_vtw --k=15", (576,) * 15 + (0,) * 17),
        ("vtw_k: 5", (576,) * 5 + (0,) * 27),
        ("[500, 0, 70" + ", 0" * 29 + "]", (576, 76, 76) + (6,) * 29),
        ("deletions: [500, 0, 70" + ", 0" * 29 + "]", (576, 76, 76) + (6,) * 29),
    ],
)
def test_a_recipe_says_what_its_code_does(text: str, expected: tuple[int, ...]) -> None:
    assert keeps(read(text)) == expected


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("{fastv_k: 1, fastv_r: 0.9}", 15, 1),  # 1 - 0.9 is less than a tenth
        ("{fastv_k: 1, fastv_r: 0.5}", 577, 288),  # halves go to the even number
        ("{fastv_k: 1, fastv_r: 0.5}", 579, 290),
        ("{layer_list: [1], image_token_ratio_list: [0.29]}", 100, 28),  # 100 * 0.29 < 29
        ("{layer_list: [1], image_token_ratio_list: [0.55]}", 100, 55),
    ],
)
def test_shares_are_rounded_as_the_code_rounds(text: str, tokens: int, expected: int) -> None:
    assert keeps(read(text, tokens=tokens), Shape(2, tokens)) == (tokens, expected)


def test_a_recipe_ranks_as_its_code_does() -> None:
    ranks = {
        "{fastv_k: 2, fastv_r: 0.5}": ("previous", "last", "mean", "original", "between"),
        "{layer_list: [8], image_token_ratio_list: [0.5]}": (
            *("next", "last", "mean", "repacked", "between"),
        ),
        "{RETAIN_TOKN: 192}": ("previous", "raters", "mean", "repacked", "between"),
        "{RETAIN_TOKN: 192, USE_VERSION: 2_0}": (
            *("previous", "raters", "mean", "original", "between"),
        ),
        "[1, 0]": ("previous", "text", "max", "original", "inside"),
    }
    assert read("[1, 0]").prefill.score.rule == "self_cross"
    for text, expected in ranks.items():
        prefill = read(text).prefill
        score = prefill.score
        found = score.source, score.query, score.heads, prefill.positions, prefill.drop_point
        assert found == expected, text


def test_a_schedule_is_no_recipe() -> None:
    for path in SAMPLES.glob("*.yaml"):
        assert recipes.read(path.read_text(), str(path)) == Schedule.load(path)
    broken = "version: 1\nprefill:\n  stages: [it's\n"
    for text in ("", "nonsense", "version: 1\nprefil: {}\n", broken, "a --b c"):
        with pytest.raises(ScheduleError) as ours:
            Schedule.parse(text, "recipe.txt")
        with pytest.raises(ScheduleError, match=re.escape(str(ours.value))):
            read(text)


# what is published

AVERAGES = {192: 202.8, 128: 140.8, 96: 110.2, 64: 79.2}  # not the numbers they are named after
WITH_CLUSTERS = {192: 206.5, 128: 145.4, 96: 114.1, 64: 82.2}  # and means of what is recycled


@pytest.mark.parametrize("tokens", AVERAGES)
def test_sparsevlm_keeps_more_than_its_name_says(tokens: int) -> None:
    steps = steps_of(Schedule.sparsevlm(tokens), LLAVA)
    mean = steps.mean_share()
    assert mean is not None
    assert float(mean * 576) == pytest.approx(AVERAGES[tokens], abs=0.0501)
    entering = keeps(Schedule.sparsevlm(tokens))
    assert sum(entering) / 32 == pytest.approx(WITH_CLUSTERS[tokens], abs=0.0501)


PUBLISHED: dict[str, Callable[[], Schedule]] = {
    "fastv": Schedule.fastv,
    "pyramid": lambda: Schedule.pyramid(positions="repacked"),
    "vtw": Schedule.vtw,
    "ficoco_l": lambda: Schedule.ficoco(prefill=14),
    **{f"fitprune_{r}": lambda r=r: Schedule.fitprune(f"{r}%") for r in (50, 60, 90)},  # type: ignore[misc]  # a default binds it
    **{f"sparsevlm_{n}": lambda n=n: Schedule.sparsevlm(n) for n in AVERAGES},  # type: ignore[misc]  # likewise
    **{f"sparsevlm_plus_{n}": lambda n=n: Schedule.sparsevlm(n, plus=True) for n in AVERAGES},  # type: ignore[misc]  # likewise
}


BY_HAND = {path.stem for path in SAMPLES.glob("*.yaml") if Schedule.load(path).document.vision}
"""What reduces before the decoder is one line of YAML: nothing writes it."""
BY_HAND |= {"focusllava_text"}  # its layers and ratios are not public


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_sample_is_the_recipe_it_is_named_after(path: Path) -> None:
    if path.stem == "every_field":
        return
    if path.stem not in BY_HAND:
        schedule = Schedule.load(path)
        assert schedule == PUBLISHED[path.stem]()
        schedule.resolve(LLAVA)
    comment = "".join(line for line in path.open() if line.startswith("#"))
    source = re.search(r"arXiv (\d{4}\.\d{5})", comment)
    assert source or path.stem.startswith("vtw")


def test_every_published_recipe_is_a_sample() -> None:
    assert PUBLISHED.keys() | BY_HAND == {path.stem for path in SAMPLES.glob("*.yaml")}


@pytest.mark.parametrize(("reduction", "final"), [("50%", 173), (0.6, 127), ("9/10", 37)])
def test_fitprune_leaves_what_it_says(reduction: Any, final: int) -> None:
    assert keeps(Schedule.fitprune(reduction))[-1] == final
    assert (
        keeps(read(f"--reduction_ratio {round(float(generators.exact(reduction, '', '')) * 100)}"))[
            -1
        ]
        == final
    )


# what is written

NUMBERS = {"layers": 32, "tokens": 576}


@pytest.mark.parametrize(
    ("name", "notation", "expected"),
    [
        ("vtw", "vtw", "--use_vtw --k=16"),
        ("sparsevlm_96", "sparsevlm", "USE_VERSION=1_0 RETAIN_TOKN=96"),
        ("sparsevlm_plus_96", "sparsevlm", "USE_VERSION=2_0 RETAIN_TOKN=96"),
        (
            "pyramid",
            "pyramiddrop",
            "--layer_list '[8,16,24]' --image_token_ratio_list '[0.5,0.25,0.125]'",
        ),
    ],
)
def test_a_recipe_is_written_as_its_code_takes_it(name: str, notation: str, expected: str) -> None:
    schedule = PUBLISHED[name]()
    for steps in (steps_of(schedule), steps_of(schedule, LLAVA)):
        assert recipes.write(schedule, steps, notation) == f"{expected}\n"


def test_fastv_is_written_as_json() -> None:
    half = Schedule.fastv()
    assert json.loads(recipes.write(half, steps_of(half), "fastv")) == {
        "use_fastv": True,
        "fastv_k": 2,
        "fastv_r": 0.5,
    }
    third = Schedule.fastv(3, "1/3")
    told = json.loads(recipes.write(third, steps_of(third, tokens=577), "fastv"))
    assert round(577 * (1 - told["fastv_r"])) == 577 * 2 // 3
    assert told["image_token_length"] == 577


def test_fitprune_is_written_as_its_deletions() -> None:
    schedule = Schedule.load(SAMPLES / "fitprune_60.yaml")
    deletions = json.loads(recipes.write(schedule, steps_of(schedule), "fitprune"))
    assert deletions[:4] == [14, 33, 89, 36]
    assert (len(deletions), sum(deletions)) == (32, 576 - 127)


# both ways

layers_and_keeps = st.integers(2, 700).flatmap(
    lambda tokens: st.tuples(
        st.just(tokens),
        st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True).map(sorted),
        st.lists(st.integers(0, tokens), min_size=6, max_size=6).map(lambda k: sorted(k)[::-1]),
    )
)


def both_ways(schedule: Schedule, notation: str, tokens: int | None, **known: int) -> None:
    """Writing and reading gives the same; writing again gives the same text."""
    written = recipes.write(schedule, steps_of(schedule, tokens=tokens, **known), notation)
    again = read(written, tokens=tokens)
    assert said(again) == said(schedule)
    steps = steps_of(again, tokens=tokens, **known)
    assert recipes.write(again, steps, notation) == written


def stages(layers: list[int], amounts: list[int]) -> tuple[dict[str, int], ...]:
    pairs = zip(layers, amounts, strict=False)
    return tuple({"before_layer": layer, "keep": keep} for layer, keep in pairs)


def schedule_of(**prefill: Any) -> Schedule:
    return Schedule.from_data({"version": 1, "prefill": prefill})


@settings(deadline=None)
@given(layers_and_keeps)
def test_any_single_cut_is_a_fastv(drawn: tuple[int, list[int], list[int]]) -> None:
    tokens, layers, amounts = drawn
    both_ways(schedule_of(stages=stages(layers[:1], amounts)), "fastv", tokens)


@settings(deadline=None)
@given(layers_and_keeps)
@example((100, [1], [29]))  # int(100 * 0.29) is 28
def test_any_cuts_are_a_pyramid(drawn: tuple[int, list[int], list[int]]) -> None:
    tokens, layers, amounts = drawn
    prefill = {"score": {"from": "next"}, "positions": "repacked"}
    both_ways(schedule_of(**prefill, stages=stages(layers, amounts)), "pyramiddrop", tokens)


@settings(deadline=None)
@given(layers_and_keeps, st.sampled_from(["original", "repacked"]))
def test_any_cuts_are_a_sparsevlm(drawn: tuple[int, list[int], list[int]], positions: str) -> None:
    tokens, layers, amounts = drawn
    merge = {"by": "recycle" if positions == "repacked" else "drop"}
    prefill = {"score": {"query": "raters"}, "positions": positions, "merge": merge}
    both_ways(schedule_of(**prefill, stages=stages(layers, amounts)), "sparsevlm", tokens)


@settings(deadline=None)
@given(st.integers(1, 60))
def test_any_withdrawal_is_a_vtw(k: int) -> None:
    both_ways(Schedule.vtw(k), "vtw", None)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 99))
def test_any_deletions_are_a_fitprune(deletions: list[int], left: int) -> None:
    tokens = max(sum(deletions) + left, 1)
    schedule = Schedule.from_deletions([*deletions, 0], tokens=tokens)
    steps = steps_of(schedule)
    written = recipes.write(schedule, steps, "fitprune")
    assert json.loads(written) == [*deletions, 0]
    assert said(read(written, tokens=tokens)) == said(schedule)


@settings(deadline=None)
@given(st.decimals(0, 1, places=6), st.integers(1, 40))
def test_any_decimal_share_goes_both_ways_without_a_number_of_tokens(share: Any, k: int) -> None:
    keep = generators.write_keep(Fraction(share))
    one = ({"before_layer": k, "keep": keep},)
    both_ways(schedule_of(stages=one), "fastv", None)
    prefill = {"score": {"from": "next"}, "positions": "repacked"}
    both_ways(schedule_of(**prefill, stages=one), "pyramiddrop", None)


# what is refused


def raters(**prefill: Any) -> Schedule:
    return schedule_of(
        score={"query": "raters"}, stages=({"before_layer": 3, "keep": 9},), **prefill
    )


@pytest.mark.parametrize(
    ("schedule", "notation", "reason"),
    [
        (PUBLISHED["pyramid"](), "fastv", "FastV drops once"),
        (Schedule.unpruned(), "fastv", "drops nothing"),
        (Schedule.vtw(), "fitprune", "does not say their number"),
        (Schedule.fastv(), "vtw", "VTW drops everything"),
        (Schedule.fastv(), "pyramiddrop", "score.from: next, and this schedule previous"),
        (Schedule.fastv(2, "1/3"), "fastv", "no decimal"),
        (Schedule.fastv(2, "1/3", tokens=9), "fastv", "no share"),
        (Schedule.fastv(), "sparsevlm", "counts tokens"),
        (Schedule.pyramid(), "pyramiddrop", "positions: repacked"),
        (Schedule.fitprune("60%"), "sparsevlm", "score.rule: attention"),
        (raters(positions="repacked"), "sparsevlm", "SparseVLM has merge: {by: recycle}"),
        (raters(merge={"by": "recycle"}), "sparsevlm", "SparseVLM+ has merge: {by: drop}"),
        (Schedule.from_keeps([9, 9, 5], score={"query": "text"}), "fitprune", "rule: self_cross"),
        (
            Schedule.from_keeps([9, 9, 5], score={"rule": "self_cross", "query": "text"}),
            *("fitprune", "heads: max"),
        ),
        (
            Schedule.from_keeps(
                [9, 9, 5], score=Schedule.fitprune().prefill.score.model_dump(by_alias=True)
            ),
            *("fitprune", "drop_point: inside"),
        ),
        (Schedule.from_keeps([9, 5, 5], rank="per_image"), "fastv", "rank: joint"),
        (Schedule.from_keeps([9, 5, 5], merge={"by": "correlate"}), "fastv", "merge.by: drop"),
    ],
)
def test_what_a_notation_has_no_word_for_is_refused(
    schedule: Schedule, notation: str, reason: str
) -> None:
    with pytest.raises(ScheduleError, match=re.escape(reason)) as caught:
        recipes.write(schedule, steps_of(schedule), notation)
    assert caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "options", "reason", "where"),
    [
        ("fastv_k: 2\n", {}, "fastv_r is missing", "recipe.txt:1"),
        ("fastv_r: 0.5\nfastv_k: two\n", {}, "fastv_k is 'two'", "recipe.txt:2"),
        ("fastv_k: true\nfastv_r: 0.5\n", {}, "fastv_k is true", "recipe.txt:1"),
        ("fastv_k: 0\nfastv_r: 0.5\n", {}, "k is 0", "recipe.txt"),
        ("fastv_k: 2\nfastv_r: 1.5\n", {}, "r is 1.5", "recipe.txt"),
        ("fastv_k: 2\nfastv_r: [1]\n", {}, "fastv_r is a list", "recipe.txt:2"),
        ("fastv_k: 2\nfastv_r: 0.5\nuse_fastv: false\n", {}, "off", "recipe.txt:3"),
        ("fastv_k: 2\nfastv_rr: 0.5\n", {}, "unknown name 'fastv_rr'", "recipe.txt:2"),
        ("--layer_list 8 --image_token_ratio_list [0.5]", {}, "layer_list is 8", "recipe.txt"),
        ("{layer_list: [8], image_token_ratio_list: []}", {}, "1 layers and 0", "recipe.txt"),
        ("{layer_list: [a], image_token_ratio_list: [1]}", {}, "before_layer", "recipe.txt"),
        ("{layer_list: [8,4], image_token_ratio_list: [1,1]}", {}, "after 8", "recipe.txt"),
        ("{layer_list: [4,8], image_token_ratio_list: [.1,1]}", {}, "grows", "recipe.txt"),
        ("RETAIN_TOKN=100", {}, "tokens is 100", "recipe.txt"),
        ("USE_VERSION=3_0 RETAIN_TOKN=64", {}, "USE_VERSION is 3.0", "recipe.txt"),
        ("{pruning_loc: [x], sparse_token_list: [1]}", {}, "layers[0] is 'x'", "recipe.txt"),
        ("{pruning_loc: [1, 2], sparse_token_list: [1]}", {}, "2 layers and 1", "recipe.txt"),
        ("use_vtw: false\nk: 3\n", {}, "off", "recipe.txt:1"),
        ("--use_vtw", {}, "k is missing", "recipe.txt"),
        ("[500, 500, 0]", {}, "1000 deletions of 576", "recipe.txt"),
        ("[5, 5]", {}, "last layer", "recipe.txt"),
        ("[a, 0]", {}, "deletions[0]", "recipe.txt"),
        ("--reduction_ratio 70", {}, "reduction", "recipe.txt"),
        ("[1, 0]", {"notation": "fastv"}, "unknown name 'list'", "recipe.txt"),
        ("K: 2", {"notation": "fastv"}, "fastv_r is missing", "recipe.txt"),
        ("", {"notation": "fastv"}, "empty", "recipe.txt"),
    ],
)
def test_a_broken_recipe_names_place_value_and_remedy(
    text: str, options: dict[str, Any], reason: str, where: str
) -> None:
    with pytest.raises(ScheduleError, match=re.escape(reason)) as caught:
        read(text, **options)
    assert caught.value.where.startswith(where)
    assert caught.value.hint


def test_the_notations_of_the_command_line_are_all_there_are() -> None:
    assert {each.value for each in Notation} == recipes.NOTATIONS.keys()
    assert {each.value for each in Form} == recipes.NOTATIONS.keys() | {"keep", "stages"}
    with pytest.raises(InputError, match="g-search"):
        read("{}", notation="g-search")


pieces = """fastv_k R layer_list RETAIN_TOKN --k = : [8,16] 2_0 ' 0.5 --use_vtw - { } [ ] ,
deletions 1e9 -3 true # \\ --layer_list=[1] K list"""
words = st.sampled_from([*pieces.split(), "\n", " "])


@settings(max_examples=400, deadline=None)
@given(st.lists(words | st.text(max_size=3), max_size=20).map(" ".join) | st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    hints = ["nothing was refused"]
    try:
        schedule = read(text, tokens=576)
        for notation in recipes.NOTATIONS:
            recipes.write(schedule, steps_of(schedule, tokens=576), notation)
    except VtrError as error:
        hints.append(error.hint)
    assert all(hints)


# steps


def test_steps_know_what_a_schedule_says_of_itself() -> None:
    steps = steps_of(Schedule.fitprune("60%"))
    assert (steps.layers, steps.tokens) == (32, 576)
    assert steps.per_layer() == keeps(Schedule.fitprune("60%"))
    shares = steps_of(Schedule.fastv())
    assert (shares.layers, shares.tokens, shares.per_layer()) == (None, None, None)
    assert list(shares.runs()) == [(0, 1), (2, Fraction(1, 2))]
    first = Schedule.from_keeps([90, 50], score={"from": "next"})
    assert steps_of(first).tokens is None  # the first keep may be a cut's
    assert list(steps_of(first, tokens=100).runs()) == [(0, 90), (1, 50)]


@settings(deadline=None)
@given(layers_and_keeps)
def test_steps_are_what_the_model_gets(drawn: tuple[int, list[int], list[int]]) -> None:
    tokens, layers, amounts = drawn
    schedule = schedule_of(stages=stages(layers, amounts))
    shape = Shape(41, tokens)
    steps = steps_of(schedule, shape)
    assert steps.per_layer() == keeps(schedule, shape)
    assert steps == steps_of(schedule, layers=41, tokens=tokens)
    assert [steps.at(first) for first, _ in steps.runs()] == [keep for _, keep in steps.runs()]
    mean = steps.mean_share()
    assert mean == Fraction(sum(keeps(schedule, shape)), 41 * tokens)


def test_what_is_known_of_a_model_is_checked() -> None:
    with pytest.raises(InputError, match="32"):
        steps_of(Schedule.fastv(), LLAVA, layers=8)
    with pytest.raises(ScheduleError, match="has 8"):
        steps_of(Schedule.pyramid(), layers=8, tokens=576)
    varies = replace(LLAVA, tokens_per_image=None)
    assert steps_of(Schedule.fastv(), varies, tokens=9).per_layer() == (9,) * 2 + (4,) * 30


def test_a_command_line_survives_a_shell() -> None:
    line = recipes.write(
        PUBLISHED["pyramid"](), Steps(((8, Fraction(1, 2)),), None, None), "pyramiddrop"
    )
    assert shlex.split(line)[1] == "[8]"
