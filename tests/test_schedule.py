"""The schedule language: what it reads, what it refuses, and what it means for a model."""

import contextlib
import itertools
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost import FITPRUNE

import vtr_export
from vtr_export.errors import ScheduleError
from vtr_export.families import read_facts
from vtr_export.keeps import MAX_PART, read_keep, write_keep
from vtr_export.schedule import Cut, Keep, Schedule
from vtr_export.schedule_document import json_schema, plain
from vtr_export.schedule_yaml import MAX_BYTES

LLAVA = read_facts({"model_type": "llava"}, "config.json")  # of 32 layers, 576 tokens
SAMPLES = sorted((Path(__file__).parents[1] / "samples" / "schedules").glob("*.yaml"))


@dataclass(frozen=True)
class Model:
    layers: int = 8
    tokens_per_image: int | None = 144
    mrope: bool = False


MODEL, DYNAMIC, MROPE = (
    Model(),
    Model(tokens_per_image=None),
    Model(tokens_per_image=None, mrope=True),
)


def prefill(text: str) -> str:
    return f"version: 1\nprefill: {text}\n"


# Keep


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**6))
def test_keep_is_the_exact_rounded_share(v: int, numerator: int, denominator: int) -> None:
    share = Fraction(v * numerator, denominator)
    assert Keep(numerator, denominator).of(v) == min(v, math.floor(share))
    assert Keep(numerator, denominator, "ceil").of(v) == min(v, math.ceil(share))


@settings(deadline=None)
@given(st.integers(1, 4000), st.integers(1, 9), st.data())
def test_images_contribute_the_same_number_each(
    tokens: int, images: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, tokens))
    assert Keep(k, tokens).of(images * tokens) == images * k


@settings(deadline=None)
@given(st.integers(0, MAX_PART) | st.fractions(0, 1, max_denominator=MAX_PART))
def test_a_keep_reads_back_as_written(keep: int | Fraction) -> None:
    assert read_keep(write_keep(keep)) == keep


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("50%", Fraction(1, 2)),
        ("12.5%", Fraction(1, 8)),
        ("1/3", Fraction(1, 3)),
        ("2/4", Fraction(1, 2)),
        ("0%", 0),
        ("100%", 1),
    ],
)
def test_shares_are_exact(text: str, share: Fraction) -> None:
    assert read_keep(text) == share


# what it means for a model


def test_both_forms_make_the_same_cuts() -> None:
    stages = Schedule.parse(
        prefill("{stages: [{before_layer: 2, keep: 72}, {before_layer: 5, keep: 1/8}]}")
    )
    keep = Schedule.parse(prefill("{keep: [144, 100%, 72, 50%, 72, 18, 18, 18]}"))
    assert stages.resolve(MODEL) == keep.resolve(MODEL)
    assert stages.resolve(MODEL).cuts == (Cut(2, Keep(72, 144)), Cut(5, Keep(18, 144)))
    assert stages.resolve(MODEL).keep_per_layer(288) == (288, 288, 144, 144, 144, 36, 36, 36)


def test_an_explicit_stage_cuts_even_when_it_keeps_everything() -> None:
    schedule = Schedule.parse(
        prefill("{stages: [{before_layer: 2, keep: 144}, {before_layer: 3, keep: 144}]}")
    )
    assert [cut.before_layer for cut in schedule.resolve(MODEL).cuts] == [2, 3]
    assert Schedule.from_keeps([144] * 8).resolve(MODEL).cuts == ()


def test_a_dynamic_model_keeps_shares_of_the_call() -> None:
    cuts = (
        Schedule.parse(
            prefill(
                "{rounding: ceil, stages: [{before_layer: 1, keep: 1/3}, {before_layer: 2, keep: 0}]}"
            )
        )
        .resolve(DYNAMIC)
        .cuts
    )
    assert cuts == (Cut(1, Keep(1, 3, "ceil")), Cut(2, Keep(0, 1, "ceil")))
    assert cuts[0].keep.of(100) == 34


def test_rounding_is_as_stated() -> None:
    model = Model(tokens_per_image=577)
    for rounding, expected in (("floor", 288), ("ceil", 289)):
        cut = Schedule.from_keeps(["100%"] + ["50%"] * 7, rounding=rounding).resolve(model).cuts[0]
        assert cut == Cut(1, Keep(expected, 577))


def test_a_cut_before_the_first_layer_is_fine_from_next() -> None:
    schedule = Schedule.from_keeps([100] * 8, score={"from": "next"})
    assert schedule.resolve(MODEL).cuts == (Cut(0, Keep(100, 144)),)


keeps = st.integers(0, 144) | st.fractions(0, 1, max_denominator=999)


@settings(deadline=None)
@given(
    st.lists(keeps, min_size=8, max_size=8), st.sampled_from(["floor", "ceil"]), st.integers(0, 5)
)
def test_what_resolves_never_grows_and_is_what_was_written(
    values: list[int | Fraction], rounding: str, images: int
) -> None:
    texts = [write_keep(value) for value in values]
    schedule_options = {"rounding": rounding, "score": {"from": "next"}}
    round_ = math.ceil if rounding == "ceil" else math.floor
    amounts = [v if isinstance(v, int) else round_(v * 144) for v in values]
    shares = [Fraction(v) for v in values]
    kinds = [isinstance(v, int) for v in values]
    pairs = itertools.pairwise(zip(amounts, shares, kinds, strict=True))
    if any(b[0] > a[0] or (a[2] == b[2] and b[1] > a[1]) for a, b in pairs):
        with pytest.raises(ScheduleError, match="grows"):
            Schedule.from_keeps(texts, **schedule_options).resolve(MODEL)
        return
    resolved = Schedule.from_keeps(texts, **schedule_options).resolve(MODEL)
    layers = resolved.keep_per_layer(144 * images)
    assert list(layers) == sorted(layers, reverse=True)
    assert [cut.before_layer for cut in resolved.cuts] == sorted(
        {cut.before_layer for cut in resolved.cuts}
    )
    for value, tokens in zip(values, layers, strict=True):
        assert abs(tokens - images * (value if isinstance(value, int) else value * 144)) < max(
            images, 1
        )


# writing


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    amounts = draw(
        st.lists(st.integers(0, 144), min_size=1, max_size=8).map(lambda x: sorted(x, reverse=True))
    )
    layers = sorted(draw(st.sets(st.integers(1, 60), min_size=len(amounts), max_size=len(amounts))))
    options = {
        "score": {
            "from": draw(st.sampled_from(["previous", "next"])),
            "query": draw(st.sampled_from(["last", "text"])),
        },
        "rounding": draw(st.sampled_from(["floor", "ceil"])),
    }
    stages = [
        {"before_layer": layer, "keep": keep} for layer, keep in zip(layers, amounts, strict=True)
    ]
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(10**15), 10**15)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8"))
    )
    origin = draw(
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), scalars, max_size=3)
    )
    return Schedule.from_data(
        {
            "version": 1,
            "model": draw(st.none() | st.text(st.characters(codec="utf-8"), max_size=9)),
            "prefill": {**options, "stages": tuple(stages)},
            "origin": origin,
        }
    )


@settings(deadline=None)
@given(schedules())
def test_a_dump_parses_to_the_same_schedule(schedule: Schedule) -> None:
    again = Schedule.parse(schedule.dump())
    assert again == schedule
    assert again.dump() == schedule.dump()


@pytest.mark.parametrize(
    "word",
    [
        "no",
        "1e-3",
        "12",
        "0.5",
        "null",
        "~",
        "",
        "50%",
        "a: b",
        "#",
        " x",
        "1_000",
        "\u0085",
        "é\n",
        "*a",
        "2001-01-01",
    ],
)
def test_words_that_yaml_would_twist_survive_a_dump(word: str) -> None:
    schedule = Schedule.from_keeps([1], origin={"method": word, word: 1})
    assert Schedule.parse(schedule.dump()) == schedule


# generators


def test_fastv_drops_before_layer_k() -> None:
    schedule = Schedule.fastv(k=2, r=0.5)
    assert schedule.resolve(MODEL).cuts == (Cut(2, Keep(72, 144)),)
    assert "keep: 50%" in schedule.dump()
    assert (
        schedule == Schedule.fastv() == Schedule.fastv(r="1/2") == Schedule.fastv(r=Fraction(1, 2))
    )


@pytest.mark.parametrize(
    ("tokens", "r", "keep"),
    [(576, 0.75, 144), (577, 0.5, 288), (579, 0.5, 290), (10, "1/3", 7), (2880, 0.1, 2592)],
)
def test_fastv_rounds_as_published_where_the_tokens_are_known(
    tokens: int, r: Any, keep: int
) -> None:
    cut = Schedule.fastv(2, r, tokens=tokens).resolve(Model(tokens_per_image=tokens)).cuts[0]
    assert cut.keep == Keep(keep, tokens)


@pytest.mark.parametrize("tokens", [None, 576])
def test_pyramid_is_the_published_one(tokens: int | None) -> None:
    resolved = Schedule.pyramid(0.5, tokens=tokens).resolve(Model(32, 576))
    assert resolved.keep_per_layer(576) == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    assert (resolved.source, resolved.query) == ("next", "last")


def test_pyramid_truncates_shares_of_the_original_count() -> None:
    resolved = Schedule.pyramid("1/3", layers=8).resolve(Model(8, 100))
    assert resolved.keep_per_layer(100) == (100, 100, 33, 33, 11, 11, 3, 3)


def test_vtw_drops_everything() -> None:
    assert Schedule.vtw(3).resolve(MODEL).keep_per_layer(144) == (144,) * 3 + (0,) * 5
    assert Schedule.vtw(3).resolve(DYNAMIC).cuts == (Cut(3, Keep(0, 1)),)


def test_ficoco_drops_as_long_as_some_are_left() -> None:
    samples = SAMPLES[0].parent
    assert Schedule.load(samples / "ficoco_v.yaml") == Schedule.ficoco(42)
    assert Schedule.load(samples / "ficoco_l.yaml") == Schedule.ficoco(prefill=14)
    assert Schedule.load(samples / "ficoco_vl.yaml") == Schedule.ficoco(35, 6, tokens=191)
    few = Schedule.ficoco(prefill=4, layers=9, tokens=9).prefill
    assert few.keep == (9, 9, 9, 9, 9, 9, 5, 1, 1)


def test_fitprune_deletes_inside_the_layer() -> None:
    resolved = Schedule.from_deletions(FITPRUNE[60]).resolve(Model(32, 576))
    assert resolved.keep_per_layer(576)[:4] == (576, 562, 529, 440)
    assert resolved.keep_per_layer(576)[-1] == 127
    assert (resolved.drop_point, resolved.query, resolved.heads) == ("inside", "text", "max")
    assert resolved.rule == "self_cross"


def test_unpruned_has_no_cut() -> None:
    assert Schedule.unpruned().resolve(DYNAMIC).cuts == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule.fastv(0),
        lambda: Schedule.fastv(True),
        lambda: Schedule.fastv(2, 1.5),
        lambda: Schedule.fastv(2, "half"),
        lambda: Schedule.fastv(2, "1/0"),
        lambda: Schedule.fastv(2, float("nan")),
        lambda: Schedule.fastv(2, 1 / 3),
        lambda: Schedule.fastv(2, 0.5, tokens=0),
        lambda: Schedule.pyramid(2),
        lambda: Schedule.pyramid("123/1001"),
        lambda: Schedule.pyramid(layers=3),
        lambda: Schedule.vtw(0),
        lambda: Schedule.from_keeps([1, 2]),
        lambda: Schedule.from_keeps([0.5]),  # type: ignore[list-item]
        lambda: Schedule.from_keeps([1], scores={}),
        lambda: Schedule.from_deletions([1, 0], tokens=0),
        lambda: Schedule.from_deletions([5, 6, 0], tokens=10),
        lambda: Schedule.from_deletions([1, 1], tokens=10),
        lambda: Schedule.from_deletions([-1, 0], tokens=10),
        lambda: Schedule.from_deletions([], tokens=10),
    ],
)
def test_generators_refuse_nonsense(make: Any) -> None:
    with pytest.raises(ScheduleError) as caught:
        make()
    assert caught.value.where.startswith("Schedule.")
    assert caught.value.hint


# refusals of the text

REFUSED = [
    ("", "empty", "s.yaml"),
    ("# nothing\n", "empty", "s.yaml"),
    ("- 1\n", "a list, not a mapping", "s.yaml:1"),
    ("12", "12, not a mapping", "s.yaml:1"),
    ("version: 1\n", "'prefill' is missing", "s.yaml:1"),
    ("prefill: {stages: []}", "'version' is missing", "s.yaml:1"),
    ("version: 2\nprefill: {stages: []}", "version is 2", "s.yaml:1"),
    ("version: true\nprefill: {stages: []}", "version is true", "s.yaml:1"),
    ("version: '1'\nprefill: {stages: []}", "version is '1'", "s.yaml:1"),
    ("version: 1.0\nprefill: {stages: []}", "version is 1.0", "s.yaml:1"),
    ("version: 1\nprefil:\n  stages: []", "did you mean prefill?", "s.yaml:2: prefil"),
    (prefill("\n  scor: {}\n  stages: []"), "did you mean score?", "s.yaml:3"),
    (prefill("\n  score:\n    form: next\n  stages: []"), "did you mean from?", "s.yaml:4"),
    (prefill("\n  score: {from: last}\n  stages: []"), "from is 'last'", "s.yaml:3"),
    (prefill("\n  score: {source: next}\n  stages: []"), "unknown key 'source'", "s.yaml:3"),
    (prefill("\n  score: {heads: sum}\n  stages: []"), "one of: mean, max", "s.yaml:3"),
    (prefill("\n  stages:\n  - before_layer: 1\n    kep: 3"), "did you mean keep?", "s.yaml:5"),
    (prefill("\n  stages:\n  - before_layer: 1\n"), "'keep' is missing", "s.yaml:4"),
    (prefill("\n  stages: 3"), "stages is 3, not a list", "s.yaml:3"),
    (prefill("\n  stages: [3]"), "not a mapping", "s.yaml:3"),
    (prefill("[]"), "prefill is a list", "s.yaml:2"),
    (prefill("{}"), "either stages or keep", "s.yaml:2"),
    (prefill("{keep: , stages: }"), "either stages or keep", "s.yaml:2"),
    (prefill("{keep: [1], stages: []}"), "not both", "s.yaml:2"),
    (prefill("\n  keep:\n  - 9\n  - 10\n"), "grows from 9 to 10", "s.yaml:5: prefill.keep[1]"),
    (prefill("\n  keep:\n  - 9%\n  - 1/3\n"), "grows from 9% to 1/3", "s.yaml:5"),
    (
        prefill("\n  stages:\n  - {before_layer: 2, keep: 9}\n  - {before_layer: 3, keep: 10}"),
        "grows from 9 to 10",
        "s.yaml:5",
    ),
    (
        prefill("\n  stages:\n  - {before_layer: 2, keep: 9}\n  - {before_layer: 2, keep: 8}"),
        "before_layer 2 comes after 2",
        "s.yaml:5",
    ),
    (
        prefill("\n  stages:\n  - {before_layer: 3, keep: 9}\n  - {before_layer: 2, keep: 8}"),
        "before_layer 2 comes after 3",
        "s.yaml:5",
    ),
    (prefill("\n  stages:\n  - {before_layer: 0, keep: 9}"), "no previous layer", "s.yaml:4"),
    (prefill("\n  stages:\n  - {before_layer: -1, keep: 9}"), "before_layer is -1", "s.yaml:4"),
    (
        prefill("\n  stages:\n  - {before_layer: true, keep: 9}"),
        "before_layer is true, not an integer",
        "s.yaml:4",
    ),
    (
        prefill("\n  stages:\n  - {before_layer: 2.0, keep: 9}"),
        "before_layer is 2.0, not an integer",
        "s.yaml:4",
    ),
    (
        prefill("\n  stages:\n  - {before_layer: 1e3, keep: 9}"),
        "before_layer is 1000.0, not an integer",
        "s.yaml:4",
    ),
    (prefill("\n  keep: [-1]"), "keep is -1", "s.yaml:3"),
    (prefill("\n  keep: [true]"), "keep is true", "s.yaml:3"),
    (prefill("\n  keep: [no]"), "keep is 'no'", "s.yaml:3"),
    (prefill("\n  keep: [null]"), "keep is null", "s.yaml:3"),
    (prefill("\n  keep: [0.5]"), "write 50%", "s.yaml:3"),
    (prefill("\n  keep: [1e-3]"), "write 0.1%", "s.yaml:3"),
    (prefill("\n  keep: [.nan]"), "a float", "s.yaml:3"),
    (prefill("\n  keep: ['144']"), "write an integer (144)", "s.yaml:3"),
    (prefill("\n  keep: [0x10]"), "keep is '0x10'", "s.yaml:3"),
    (prefill("\n  keep: [010]"), "keep is '010'", "s.yaml:3"),
    (prefill("\n  keep: [1_000]"), "keep is '1_000'", "s.yaml:3"),
    (prefill("\n  keep: ['1:30']"), "keep is '1:30'", "s.yaml:3"),
    (prefill("\n  keep: [150%]"), "outside 0 to 100%", "s.yaml:3"),
    (prefill("\n  keep: [-5%]"), "keep is '-5%'", "s.yaml:3"),
    (prefill("\n  keep: [3/2]"), "outside 0 to 100%", "s.yaml:3"),
    (prefill("\n  keep: [1/0]"), "keep is '1/0'", "s.yaml:3"),
    (prefill("\n  keep: [1/9999999]"), "too fine", "s.yaml:3"),
    (prefill("\n  keep: [[1]]"), "keep is a list", "s.yaml:3"),
    (prefill(f"\n  keep: [{'9' * 5000}]"), "too long", "s.yaml:3"),
    (
        prefill("{stages: []}") + "vision: [prumerge]",
        "vision has an entry without method",
        "s.yaml:3",
    ),
    (
        prefill("{stages: []}") + "decode:\n- mustdrop",
        "decode has an entry without method",
        "s.yaml:4",
    ),
    (
        prefill("{stages: []}") + "origin: {a: {b: 1}}",
        "a is a mapping, not a plain value",
        "s.yaml:3",
    ),
    (prefill("{stages: []}") + "origin: {a: .inf}", "not a plain value", "s.yaml:3"),
    (prefill("{stages: []}") + "model: 3", "model is 3, not text", "s.yaml:3"),
    (
        prefill("\n  drop_point: inside\n  score: {from: next}\n  stages: []"),
        "score from previous",
        "s.yaml:3",
    ),
    ("version: 1\nversion: 1\n", "twice, first in line 1", "s.yaml:2"),
    (prefill("\n  score: {from: next,\n   from: next}"), "twice, first in line 3", "s.yaml:4"),
    ("a: &x 1\n", "anchor &x", "s.yaml:1"),
    ("a: 1\nb: *x\n", "alias *x", "s.yaml:2"),
    ("a: !!python/object:os.system 1\n", "tag", "s.yaml:1"),
    ("a: ! 1\n", "tag", "s.yaml:1"),
    ("<<: {a: 1}\n", "unknown key '<<'", "s.yaml:1"),
    ("%YAML 1.1\n---\nversion: 1\n", "directives", "s.yaml:1"),
    ("version: 1\n---\nversion: 1\n", "more than one document", "s.yaml:2"),
    ("1: 2\n", "not a word", "s.yaml:1"),
    ("null: 2\n", "not a word", "s.yaml:1"),
    ("? [a]\n: 2\n", "not a word", "s.yaml:1"),
    ("version: 1\n\tprefill: 3\n", "not valid YAML", "s.yaml:2"),
    ("version: {\n", "not valid YAML", "s.yaml:2"),
    ('a: "\\UFFFFFFFF"', "not valid YAML", "s.yaml"),
    ("a: \x00", "not valid YAML", "s.yaml"),
    ("[" * 100_000, "too deeply nested", "s.yaml:1"),
    ("x" * (MAX_BYTES + 1), "larger than", "s.yaml"),
]


@pytest.mark.parametrize(("text", "said", "where"), REFUSED, ids=lambda x: str(x)[:40])
def test_a_refusal_names_place_value_and_remedy(text: str, said: str, where: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text, "s.yaml")
    assert said in str(caught.value)
    assert caught.value.where.startswith(where)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "model", "said", "where"),
    [
        ("\n  keep: [144, 72]", MODEL, "lists 2 layers, but the model has 8", "s.yaml:3"),
        (
            "\n  stages:\n  - {before_layer: 8, keep: 1}",
            MODEL,
            "the last cut possible is before layer 7",
            "s.yaml:4",
        ),
        (
            "\n  stages:\n  - {before_layer: 2, keep: 145}",
            MODEL,
            "an image has only 144 tokens",
            "s.yaml:4",
        ),
        (
            "\n  stages:\n  - {before_layer: 2, keep: 10}\n  - {before_layer: 3, keep: 50%}",
            MODEL,
            "grows from 10 to 50%",
            "s.yaml:5",
        ),
        (
            "\n  keep: [90%, 90%, 90%, 90%, 9, 9, 9, 9]",
            MODEL,
            "no previous layer",
            "s.yaml:3: prefill.keep[0]",
        ),
        (
            "\n  stages:\n  - {before_layer: 2, keep: 10}",
            DYNAMIC,
            "tokens per image vary",
            "s.yaml:4",
        ),
        ("\n  rank: per_image\n  stages: []", DYNAMIC, "fixed number of tokens", "s.yaml:3"),
        ("\n  positions: repacked\n  stages: []", MROPE, "cannot be repacked", "s.yaml:3"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    text: str, model: Model, said: str, where: str
) -> None:
    schedule = Schedule.parse(prefill(text), "s.yaml")
    with pytest.raises(ScheduleError) as caught:
        schedule.resolve(model)
    assert said in str(caught.value)
    assert caught.value.where.startswith(where)
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "big").write_bytes(b" " * (MAX_BYTES + 1))
    for name in ("absent", ".", "binary", "big"):
        with pytest.raises(ScheduleError) as caught:
            Schedule.load(tmp_path / name)
        assert str(tmp_path) in caught.value.where


fragments = st.sampled_from(
    [
        "version: 1",
        "prefill:",
        "stages:",
        "keep:",
        "[",
        "]",
        "{",
        "}",
        "- ",
        "\n",
        "  ",
        ": ",
        "50%",
        "1/3",
        "144",
        "&a",
        "*a",
        "!!int",
        "---",
        "'",
        '"',
        "before_layer",
        "score",
        "from",
        "next",
        "|",
        ">",
        "#",
        "?",
        "no",
        "1e-3",
        "\t",
        "%",
        "\\U",
        "vision",
        "origin",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(fragments | st.text(max_size=3), max_size=30).map("".join))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(ScheduleError):
        Schedule.parse(text).resolve(MODEL)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | fragments,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(fragments, x, max_size=3),
    max_leaves=8,
)
words = st.sampled_from(
    ["score", "rank", "positions", "drop_point", "rounding", "stages", "keep", "kep"]
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(words, json_like, max_size=4), st.dictionaries(fragments, json_like, max_size=2)
)
def test_any_data_parses_or_is_refused(body: dict[str, Any], more: dict[str, Any]) -> None:
    text = yaml.safe_dump({"version": 1, "prefill": body} | more)
    with contextlib.suppress(ScheduleError):
        Schedule.parse(text).resolve(MODEL)


# files


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_sample_loads_fits_its_model_and_obeys_the_json_schema(path: Path) -> None:
    schedule = Schedule.load(path)
    schedule.resolve(LLAVA)
    jsonschema.validate(plain(schedule.document), json.loads(json_schema()))
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(json_schema()))


def test_the_json_schema_file_is_the_generated_one() -> None:
    shipped = Path(vtr_export.__path__[0]) / "schedule.schema.json"
    assert shipped.read_text(encoding="utf-8") == json_schema(), (
        "python -m vtr_export.schedule_document writes it"
    )


@pytest.mark.parametrize(
    "text",
    [
        "{keep: [1.5]}",
        "{stages: [{before_layer: -1, keep: 3}]}",
        "{keep: [1], scor: {}}",
        "{keep: ['x']}",
    ],
)
def test_the_json_schema_refuses_what_we_refuse(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(prefill(text)), json.loads(json_schema()))


def test_a_relative_model_is_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    path = tmp_path / "s.yaml"
    for model, expected in (
        ("checkpoint", str(tmp_path / "checkpoint")),
        ("./x", str(tmp_path / "x")),
        ("org/name", "org/name"),
        ("/abs", "/abs"),
    ):
        path.write_text(prefill("{stages: []}") + f"model: {model}\n")
        assert Schedule.load(path).model_location() == expected
    assert Schedule.unpruned().model_location() is None
