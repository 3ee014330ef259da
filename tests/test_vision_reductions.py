"""Every vision-phase method: the graph in ONNX Runtime beside the definition in PyTorch."""

import numpy as np
import pytest
import vision_cases

from vtr_export.reductions.registry import VISION
from vtr_export.reference.reducing import KNOWN

ALL = ("digits", "clip", "siglip", "internvl")
CASES: tuple[tuple[str, tuple[str, ...]], ...] = (  # vision part, and the encoders it runs on
    ("[{method: fastervlm, keep: 50%}]", ALL),
    ("[{method: fastervlm, keep: 3, layer: -1}]", ALL),
    ("[{method: fastervlm, keep: 3}, {method: fastervlm, keep: 1, layer: -1}]", ALL),
    ("[{method: focusllava}]", ALL),
    ("[{method: prumerge}]", ALL),
    ("[{method: prumerge, ratio: 25%}]", ALL),
    ("[{method: prumerge+}]", ALL),
    ("[{method: prumerge+, ratio: 25%}]", ALL),
    ("[{method: ficoco_v, each: 3}]", ("clip", "siglip")),
    ("[{method: ficoco_v, each: 1/9, nearest: 2, from_layer: 1}]", ("clip", "siglip", "digits")),
    ("[{method: ficoco_v, each: 2, nearest: 0, beta: 1.0}]", ("clip",)),
    ("[{method: ficoco_v, each: 2}, {method: fastervlm, keep: 9, layer: 1}]", ("clip", "siglip")),
    (
        "[{method: ficoco_v, each: 2}, {method: fastervlm, keep: 9, layer: -1},"
        " {method: fastervlm, keep: 5, layer: -1}]",
        ("clip",),
    ),
    ("[{method: mustdrop, windows: 2}]", ("clip", "siglip", "digits")),
    ("[{method: mustdrop, layer: 1, similarity: 0.1, keys: 3}]", ("clip", "siglip")),
    ("[{method: mustdrop, windows: 2}, {method: divprune, keep: 9}]", ("clip",)),
    ("[{method: mustdrop, similarity: 0.2, keys: 20%}]", ("clip",)),
    ("[{method: mustdrop, similarity: 0.6}]", ("digits",)),
    ("[{method: divprune, keep: 25%}]", ALL),
    ("[{method: fastervlm, keep: 50%}, {method: divprune, keep: 25%}]", ("clip", "internvl")),
    ("[{method: pixel_shuffle}]", ("clip", "internvl")),
    ("[{method: pool}]", ("digits", "siglip", "internvl")),
    ("[{method: pool, kind: average, of: features}]", ("digits", "internvl")),
    ("[{method: pool, kind: max, factor: 4}]", ("digits",)),
    ("[{method: pool, kind: average, grid: [3, 2]}]", ("clip",)),
    ("[{method: pool, grid: [4, 5], of: features}]", ("clip",)),
    ("[{method: pool, of: features}, {method: pool}]", ("clip",)),
    ("[{method: visionzip, dominant: 5, contextual: 3}]", ALL),
    ("[{method: visionzip, dominant: 0, contextual: 50%}]", ("clip",)),
    ("[{method: vispruner, keep: 25%}]", ALL),
    ("[{method: fastervlm, keep: 50%}, {method: vispruner, keep: 3, important: 0}]", ("clip",)),
)
RUNS = [(text, name) for text, names in CASES for name in names]


def test_every_method_has_a_case_and_an_oracle() -> None:
    assert VISION.keys() <= KNOWN
    tested = " ".join(text for text, _ in CASES)
    assert not [name for name in VISION if f"method: {name}" not in tested]


@pytest.mark.parametrize(("text", "name"), RUNS, ids=lambda value: str(value))
def test_a_reduced_encoder_gives_what_the_definition_says(text: str, name: str) -> None:
    traced, pixels = vision_cases.traced(name), vision_cases.pictures(name, 3)
    said, defined = traced.reduced(text, pixels), traced.defined(text, pixels)
    rows = vision_cases.rows_of(said, len(pixels))
    assert [len(own) for own in rows] == [len(own.features) for own in defined]
    assert vision_cases.worst(rows, [own.features for own in defined]) < 1e-5
    for number, own in enumerate(defined):
        for part in ("source", "protected"):
            value = getattr(own, part)
            assert (f"image_{part}" in said) == (value is not None)
            if value is not None:
                shown = said[f"image_{part}"].reshape(-1)
                start = sum(len(before) for before in rows[:number])
                assert np.array_equal(shown[start : start + len(value)], value.numpy())


@pytest.mark.parametrize(("text", "name"), RUNS, ids=lambda value: str(value))
def test_an_image_is_reduced_alone(text: str, name: str) -> None:
    """Whatever else is in the batch."""
    traced, pixels = vision_cases.traced(name), vision_cases.pictures(name, 3)
    together = vision_cases.rows_of(traced.reduced(text, pixels), 3)
    alone = traced.reduced(text, pixels[1:2])["image_features"]
    assert np.allclose(together[1], alone.reshape(together[1].shape), atol=1e-5)


@pytest.mark.parametrize("text", [text for text, names in CASES if "clip" in names])
def test_a_typed_encoder_is_reduced_in_its_own_dtype(text: str) -> None:
    """Rounding may swap near ties: most tokens are those of fp32."""
    pixels = vision_cases.pictures("clip", 1)
    wanted = vision_cases.traced("clip").reduced(text, pixels)["image_features"]
    said = vision_cases.traced("clip", "fp16").reduced(text, pixels)["image_features"]
    assert said.dtype == np.float16
    both = (found.reshape(-1, found.shape[-1]).astype(np.float32) for found in (said, wanted))
    rows, tokens = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in both)
    assert ((tokens @ rows.T).max(1) > 0.9999).mean() > 0.7
