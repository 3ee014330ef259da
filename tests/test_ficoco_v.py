"""FiCoCo-V's numbers: what fits a tower, who receives, what it costs; and FiCoCo-VL, verified."""

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_cases
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from vtr_export.checkpoint import Checkpoint
from vtr_export.errors import ScheduleError
from vtr_export.exporter import export
from vtr_export.families import ModelFacts, read_facts, tower_of
from vtr_export.reductions import Grid, Tower
from vtr_export.reductions.ficoco_v import FiCoCoV
from vtr_export.reference.reductions.ficoco_v import inside
from vtr_export.schedule import Schedule

PART = re.compile(r"layers\.(\d+)\.(self_attn|mlp)$")
LLAVA = Tower(
    grid=Grid(24, 24),
    patches=Grid(24, 24),
    merge=1,
    width=1024,
    hidden=1024,
    heads=16,
    intermediate=4096,
    layers=24,
    layers_run=23,
    has_cls=True,
    projected=4096,
    projector_macs=1024 * 4096 + 4096 * 4096,
)


def facts(name: str) -> ModelFacts:
    folder = vision_cases.checkpoint(name)
    return read_facts(Checkpoint.open(folder).config, str(folder))


def test_llava_is_left_what_its_code_leaves() -> None:
    """README of its code: layers behind 11, 42 tokens each; LLaVA takes the last but one."""
    published = FiCoCoV()
    assert list(published.layers(LLAVA)) == list(range(12, 23))
    assert published.misfit(LLAVA) is None
    assert published.count(LLAVA) == 576 - 11 * 42
    assert FiCoCoV(each=Fraction(1, 24), from_layer=20).count(LLAVA) == 576 - 3 * 24


@pytest.mark.parametrize(
    ("given", "tower", "said"),
    [
        ({"each": 53}, LLAVA, "each: 1 to 52"),
        ({"each": 0}, LLAVA, "each: 1 to 52"),
        ({"from_layer": 23}, LLAVA, "from_layer at most 22"),
        ({}, replace(LLAVA, merge=2, grid=Grid(12, 12)), "behind the tower"),
        ({}, replace(LLAVA, grid=Grid(1, 100)), "list it first"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(
    given: dict[str, Any], tower: Tower, said: str
) -> None:
    found = FiCoCoV(**given).misfit(tower)
    assert found is not None
    assert said in found[1]


def test_a_schedule_says_where_it_does_not_fit() -> None:
    text = "version: 1\nvision: [{method: fastervlm, keep: 90}, {method: ficoco_v, each: 2}]\n"
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text, "s.yaml").resolve(facts("clip"))
    assert caught.value.where.startswith("s.yaml:2")
    assert "first" in caught.value.hint


@given(st.integers(1, 2100))
def test_receivers_are_those_from_the_quantile_on(kept: int) -> None:
    """Of a row without ties, the values not below its 0.998 quantile, interpolated exactly."""
    place = Fraction(998, 1000) * (kept - 1)
    low, part = divmod(place, 1)
    quantile = low + part if low + 1 < kept else low  # of the row 0, 1, 2 ...
    assert FiCoCoV().receivers(kept) == sum(value >= quantile for value in range(kept))
    assert FiCoCoV(nearest=3).receivers(kept) == min(3, kept)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_what_it_saves_is_what_pytorch_counts(name: str) -> None:
    folder = vision_cases.checkpoint(name)
    tower = tower_of(facts(name))
    assert tower is not None
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    reduction = FiCoCoV(each=3, from_layer=2)
    image = torch.zeros(1, 3, vision_cases.SIDE, vision_cases.SIDE)

    def counted() -> int:
        """Of attention and MLP in the layers that run."""
        with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
            model.get_image_features(pixel_values=image)
        found = [(PART.search(name), ops) for name, ops in counter.get_flop_counts().items()]
        ran = [ops for part, ops in found if part and int(part[1]) < tower.layers_run]
        assert len(ran) == 2 * tower.layers_run
        return sum(sum(ops.values()) for ops in ran)

    whole = counted()
    with inside(reduction, model, tower):
        less = counted()
    own = rows = 0
    for step in range(tower.layers_run - 2):
        rows = tower.sequence - 3 * step
        own += 2 * 2 * rows * tower.hidden  # who asks, and the class token's or the mean key's row
        own += 2 * 2 * 3 * (rows - 3) * tower.hidden  # 3 rows of logits, and what they give
    assert less < whole
    assert reduction.flops(tower) == less - whole + own


@pytest.mark.usefixtures("one_trace", "checked_here")
def test_ficoco_vl_is_exported_and_verified(tmp_path: Path) -> None:
    """V leaves 120 of 144, L 20 of these at the end."""
    schedule = Schedule.ficoco(12, 50, layers=8, tokens=120)
    export(schedule, vision_cases.DIGITS, tmp_path / "artifact")
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["model"]["reduced"] == {"before": 144, "most": 120, "is_static": True}
    assert manifest["verified"]
    assert all(gate["passed"] for gate in manifest["gates"])
    kept = schedule.resolve(facts("digits")).keep_per_layer(120)
    assert kept == (120,) * 6 + (70, 20)
