"""VisionZip, VisPruner, DivPrune, pooling, pixel shuffle: words and numbers, before any graph."""

from dataclasses import replace
from fractions import Fraction

import pytest

from vtr_export.errors import ScheduleError
from vtr_export.families import read_facts, tower_of
from vtr_export.reductions import Grid, Tower, VisionReduction
from vtr_export.reductions.divprune import DivPrune
from vtr_export.reductions.pixel_shuffle import PixelShuffle
from vtr_export.reductions.pool import Pool
from vtr_export.reductions.visionzip import VisionZip
from vtr_export.reductions.vispruner import VisPruner
from vtr_export.schedule import Schedule

FACTS = read_facts({"model_type": "llava"}, "config.json")
N, ROWS, WIDTH, WIDE = 576, 577, 1024, 4096  # of LLaVA-1.5


def llava() -> Tower:
    tower = tower_of(FACTS)
    assert tower is not None
    return tower


def vision(text: str) -> Schedule:
    return Schedule.parse(f"version: 1\nvision: {text}\n")


@pytest.mark.parametrize(
    ("reduction", "count"),
    [
        (VisionZip(), 64),
        (VisionZip(dominant=162, contextual=30), 192),
        (VisionZip(dominant=0, contextual=10), 10),
        (VisionZip(dominant=N, contextual=N), N + 1),  # and the class token
        (VisPruner(keep=128), 128),
        (DivPrune(keep=Fraction(98, 1000)), 56),
        (DivPrune(keep=1000), N),
        (Pool(), 144),
        (Pool(factor=5), 25),
        (Pool(kind="max", factor=5), 16),
        (Pool(grid=(8, 12), kind="average"), 96),
        (PixelShuffle(), 144),
    ],
)
def test_as_many_tokens_as_published(reduction: VisionReduction, count: int) -> None:
    assert reduction.count(llava()) == count
    assert reduction.form == "static"
    assert reduction.misfit(llava()) is None
    assert reduction.leaves(llava()).grid.tokens == count


def test_a_video_frame_of_llava_onevision_becomes_14_by_14() -> None:
    frame = _of(llava(), 27)
    assert Pool().target(frame) == Grid(14, 14)
    assert Pool(kind="average").target(frame) == Grid(13, 13)


def _of(tower: Tower, side: int) -> Tower:
    return replace(tower, grid=Grid(side, side), patches=Grid(side, side))


def test_rounds_follow_from_the_counts() -> None:
    """56 rounds of 8, as the published code runs for 128 of 576 tokens."""
    assert VisPruner(keep=128).removals(llava()) == [8] * 56
    assert VisPruner(keep=128).ranked(llava()) == 64
    assert VisPruner(keep=N).removals(llava()) == []
    assert VisPruner(keep=128, important=Fraction(1)).removals(llava()) == []
    few = VisPruner(keep=1, important=0).removals(_of(llava(), 3))
    assert few == [5, 2, 1]  # no more leave than stand at even places
    assert sum(few) == 9 - 1


def test_targets_lie_evenly_among_the_others() -> None:
    """523 tokens are not dominant, since the class token is one of 54."""
    assert VisionZip().targets(llava()) == range(0, 520, 52)
    assert VisionZip().patches(llava()) == 53


def test_costs_are_those_of_their_products() -> None:
    tower, row = llava(), ROWS * WIDTH
    assert tower.projector_macs == WIDTH * WIDE + WIDE**2
    merged = (N - 53 - 10) * 10 * (64 + WIDTH)
    assert VisionZip().flops(tower) == 2 * (row + merged)
    assert VisPruner(keep=128).flops(tower) == 2 * (row + 512**2 * WIDTH)
    projected = (N - 128) * tower.projector_macs
    assert DivPrune(keep=128).flops(tower) == 2 * (N**2 * WIDE + projected)
    assert Pool(kind="max", of="features").flops(tower) == N * WIDTH
    wide = 144 * (4 * WIDTH * WIDE + WIDE**2 - tower.projector_macs)
    assert PixelShuffle().flops(tower) == 2 * wide


@pytest.mark.parametrize(
    ("entries", "place", "why"),
    [
        ("{method: fastervlm, keep: 9}, {method: visionzip}", 1, "some are gone"),
        ("{method: fastervlm, keep: 9}, {method: pool}", 1, "lie in no grid"),
        ("{method: fastervlm, keep: 9}, {method: pixel_shuffle}", 1, "lie in no grid"),
        ("{method: visionzip}, {method: fastervlm, keep: 9}", 1, "stand for several"),
        ("{method: pool, of: features}, {method: vispruner, keep: 9}", 1, "stand for several"),
        ("{method: pool}, {method: divprune, keep: 9}", 0, "behind the projector"),
        ("{method: pool, factor: 25, kind: max}", 0, "cannot make 0 by 0"),
        ("{method: pool, grid: [25, 24]}", 0, "cannot make 25 by 24"),
        ("{method: pool, grid: [7, 8], kind: average}", 0, "do not fill 7 by 8"),
        ("{method: pixel_shuffle, factor: 5}", 0, "no windows of 5 by 5"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(entries: str, place: int, why: str) -> None:
    with pytest.raises(ScheduleError, match=rf"{why}[\s\S]*vision\[{place}\][\s\S]*help"):
        vision(f"[{entries}]").resolve(FACTS)


@pytest.mark.parametrize(
    "entry",
    [
        "{method: pool, factor: 1}",
        "{method: pool, kind: median}",
        "{method: pool, grid: [0, 4]}",
        "{method: pool, grid: 4}",
        "{method: divprune}",
        "{method: divprune, keep: 0.5}",
        "{method: visionzip, keep: 64}",
        "{method: vispruner, keep: 9, important: 0.5}",
        "{method: pixel_shuffle, factor: 2.0}",
    ],
)
def test_what_is_no_word_is_refused(entry: str) -> None:
    with pytest.raises(ScheduleError, match=r"vision\[0\]"):
        vision(f"[{entry}]")


def test_reductions_behind_each_other_leave_what_the_last_one_keeps() -> None:
    two = "[{method: vispruner, keep: 50%}, {method: divprune, keep: 50%}]"
    assert vision(two).resolve(FACTS).tokens_left == 144
    pooled = "[{method: pool, of: features}, {method: pool}]"
    assert vision(pooled).resolve(FACTS).tokens_left == 36
