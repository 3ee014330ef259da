"""Pixel values against transformers' own PIL image processors, to the bit."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from vtr_export.errors import ArtifactError, InputError
from vtr_export.runtime.images import ImageInputs, Seen, load, read_kind
from vtr_export.runtime.images.kinds import KINDS, parse_kind

RGB_CASES = [
    (28, 28), (29, 27), (1, 1), (1, 90), (90, 1), (3, 200), (200, 3), (57, 31), (31, 57),
    (28, 64), (64, 28), (27, 29), (13, 7), (7, 13), (100, 101), (112, 112), (20, 28), (28, 20),
    (5, 5), (333, 77),
]  # fmt: skip
MODES = [
    "L",
    "LA",
    "RGBA",
    "P",
    "P+transparency",
    "1",
    "CMYK",
    "I;16",
    "I",
    "F",
    "YCbCr",
    "RGB+key",
]
CROP = {"height": 28, "width": 28}
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=CROP),
    "clip-large-crop": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 31, "width": 28}),
    "clip-number": CLIPImageProcessorPil(size=28, crop_size=28, resample=0),
    "clip-unscaled": CLIPImageProcessorPil(do_resize=False, crop_size=CROP, do_rescale=False),
    "clip-raw": CLIPImageProcessorPil(size=30, crop_size=CROP, do_rescale=False, do_normalize=False),
    "clip-limit": CLIPImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 40}, crop_size=CROP),
    "siglip": SiglipImageProcessorPil(size=CROP),
    "siglip-lanczos": SiglipImageProcessorPil(size={"height": 21, "width": 35}, resample=1),
    "vit": ViTImageProcessorPil(size=CROP, do_convert_rgb=True),
    "llava-square": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 28}, crop_size=CROP),
    "llava": LlavaImageProcessorPil(do_pad=False, size=30, crop_size=CROP, image_mean=0.4, image_std=0.3),
    "box": SiglipImageProcessorPil(size={"max_height": 28, "max_width": 28}),
}  # fmt: skip


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgb = Image.fromarray(noise[:, :, :3])
    match mode:
        case "RGBA":
            return Image.fromarray(noise, "RGBA")
        case "P+transparency":
            image = rgb.quantize(16)
            image.info["transparency"] = bytes(range(0, 256, 16))
            return image
        case "RGB+key":
            rgb.info["transparency"] = rgb.getpixel((0, 0))
            return rgb
        case "LA":
            return Image.fromarray(noise[:, :, :2], "LA")
        case "I;16":
            return Image.fromarray(noise[:, :, :2].copy().view(np.uint16)[:, :, 0])
        case "I" | "F":
            return rgb.convert("L").convert(mode)
        case _:
            return rgb.convert(mode)


def both(name: str, image: Any) -> tuple[np.ndarray, np.ndarray]:
    processor = PROCESSORS[name]
    given = str(image) if isinstance(image, Path) else image
    theirs = processor(given, return_tensors="np")["pixel_values"]
    ours = parse_kind(processor.to_dict(), "preprocessor_config.json").pixel_values([image])
    return ours, theirs


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", RGB_CASES, ids=str)
def test_odd_sizes(name: str, size: tuple[int, int]) -> None:
    if max(size) / min(size) > {"box": 28, "clip-limit": 80}.get(name, math.inf):
        with pytest.raises(ValueError):  # noqa: PT011 -- Pillow's, resizing to no pixels
            PROCESSORS[name](picture(*size))
        with pytest.raises(InputError, match="would be resized to"):
            parse_kind(PROCESSORS[name].to_dict(), "").pixel_values([picture(*size)])
        return
    assert_same(*both(name, picture(*size)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["clip", "siglip", "llava-square"])
def test_modes_as_pillow_opened_them(name: str, mode: str) -> None:
    assert_same(*both(name, picture(37, 51, mode)))


@pytest.mark.parametrize(
    "mode", ["L", "LA", "RGBA", "P", "P+transparency", "1", "CMYK", "I;16", "RGB+key"]
)
@pytest.mark.parametrize("as_path", [True, False])
def test_modes_from_files(mode: str, as_path: bool, tmp_path: Path) -> None:
    file = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
    picture(37, 51, mode).save(file)
    assert_same(*both("clip", file if as_path else Image.open(file)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("as_path", [True, False])
def test_rotation_by_exif(orientation: int, as_path: bool, tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(60, 41).save(file, exif=exif)
    assert_same(*both("clip", file if as_path else Image.open(file)))


@pytest.mark.parametrize("ending", ["gif", "webp", "bmp", "tiff"])
def test_other_formats(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"image.{ending}"
    picture(33, 44, "P").convert("RGB").save(file)
    assert_same(*both("clip", file))


def test_the_content_of_a_file_is_as_good_as_the_file(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    picture(33, 44).save(file)
    facts = parse_kind(PROCESSORS["clip"].to_dict(), "")
    assert_same(facts.pixel_values([file.read_bytes()]), facts.pixel_values([file]))


def test_a_batch_is_its_images() -> None:
    images = [picture(40, 30, seed=1), picture(30, 99, seed=2)]
    theirs = PROCESSORS["clip"](images, return_tensors="np")["pixel_values"]
    assert_same(parse_kind(PROCESSORS["clip"].to_dict(), "").pixel_values(images), theirs)


def test_files_of_older_transformers_are_understood() -> None:
    old = {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28, "resample": 3,
        "do_resize": True, "do_center_crop": True, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    assert parse_kind(old, "") == parse_kind(PROCESSORS["clip"].to_dict() | {"size": 28}, "")


def test_the_nested_file_is_looked_at_first(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"preprocessor_config\.json"):
        read_kind(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SiglipImageProcessor"}'
    )
    assert read_kind(tmp_path).resample == 3
    (tmp_path / "processor_config.json").write_text(
        '{"image_processor": {"image_processor_type": "ViTImageProcessor"}}'
    )
    assert read_kind(tmp_path).resample == 2


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"image_processor_type": "FlavaImageProcessor"}, "FlavaImageProcessor"),
        (
            {"image_processor_type": "CLIPImageProcessor", "do_image_splitting": True},
            "do_image_splitting",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 28}},
            "longest_edge",
        ),
        ({"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5]}, "1 values for 3"),
        ({"image_processor_type": "CLIPImageProcessor", "size": "large"}, "large"),
    ],
)
def test_unknown_facts_are_refused_by_name(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        parse_kind(facts, "preprocessor_config.json")


@pytest.mark.parametrize("size", ["large", {}, [30, 30, 30]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_is_none_is_refused_by_every_kind(kind: str, size: Any) -> None:
    with pytest.raises(ArtifactError, match="make no sense"):
        parse_kind({"image_processor_type": kind, "size": size}, "there")


def test_images_that_are_none(tmp_path: Path) -> None:
    picture(60, 41).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    for name, data, said in [
        ("text.png", b"no image at all", "not an image"),
        ("empty.png", b"", "not an image"),
        ("cut.png", content[: len(content) // 2], "damaged"),
        ("flip.png", content[:60] + bytes([content[60] ^ 255]) + content[61:], "damaged"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=said) as caught:
            load(tmp_path / name)
        assert name in str(caught.value)
        assert caught.value.hint
    for nothing in (tmp_path, tmp_path / "absent.png", "https://example.org/x.png"):
        with pytest.raises(InputError, match="no such image file"):
            load(nothing)
    with pytest.raises(InputError, match="damaged"):
        load(Image.open(io.BytesIO(content[: len(content) // 2])))


def test_pillows_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(60, 50).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2999)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(InputError, match="limit of 2999"),
    ):
        load(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="too many pixels"):
        load(tmp_path / "large.png")


def test_a_shape_that_explodes_when_resized_is_refused() -> None:
    facts = parse_kind(PROCESSORS["clip"].to_dict() | {"size": 336}, "")
    with pytest.raises(InputError, match="extreme"):
        facts.pixel_values([Image.new("L", (2_000_000, 1))])


def test_the_view_shows_what_the_model_sees() -> None:
    image = picture(28, 28)
    for name in ("clip", "siglip", "clip-raw"):
        facts = parse_kind(PROCESSORS[name].to_dict() | {"size": dict(CROP)}, "")
        inputs = ImageInputs({"pixel_values": facts.pixel_values([image])}, {}, (Seen(1),))
        shown = np.array(facts.view(inputs, 0))
        assert (shown == np.array(image)).all()
