"""Videos as lists of frames, against transformers' own models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llavas
import torch
from command import vtr
from PIL import Image
from test_family_contract import STAGES
from tiny_families import TINY
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil

from vtr_export import Artifact, Schedule, export
from vtr_export.errors import InputError
from vtr_export.runtime.artifact import Request
from vtr_export.runtime.images import Video
from vtr_export.runtime.images.kinds import parse_kind
from vtr_export.runtime.sampling import Options
from vtr_export.verify.processors import load_processor

QUESTION, STEPS = "what colour is the digit ?", 16
FRAMES = {  # what torchvision does to frames in transformers, by Pillow
    "llava_onevision": {"size": {"height": 28, "width": 28}, "do_center_crop": False},
    "video_llava": tiny_llavas.CLIP_SIZES,
}


@dataclass(frozen=True)
class Family:
    name: str
    checkpoint: Path
    unpruned: Artifact
    pruned: Artifact


@pytest.fixture(scope="module", params=FRAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = folder / "checkpoint"
    TINY[request.param](checkpoint, 0)
    export(Schedule.from_data(STAGES), checkpoint, folder / "a", verify="none", tunable=True)
    pruned = Artifact.load(folder / "a", threads=1)
    stages = pruned.manifest.model.stages
    everything = [stage.keep.denominator for stage in stages if stage.keep is not None]
    unpruned = Artifact.load(folder / "a", threads=1, keep=everything)
    return Family(request.param, checkpoint, unpruned, pruned)


def picture(seed: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def video(frames: int, seed: int = 0) -> Video:
    return Video(tuple(picture(seed + number) for number in range(frames)))


def generated(family: Family, image: Image.Image | None, frames: Sequence[Any]) -> list[int]:
    """Transformers' own answer to an image, if there is one, and a video."""
    model: Any = AutoModelForImageTextToText.from_pretrained(family.checkpoint).eval()
    processor = load_processor(family.checkpoint, backend="pil")
    own = CLIPImageProcessorPil(**FRAMES[family.name])
    pixels = own(list(frames), return_tensors="np")["pixel_values"][None]
    places = processor.replace_video_token({"pixel_values_videos": pixels}, 0)
    content = [{"type": "image"}] * (image is not None) + [{"type": "video"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    given: dict[str, Any] = {}
    if image is not None:
        given, (written,) = processor._process_images([image], return_tensors="pt")
        text = text.replace("<image>", written)
        given = {name.replace("values_images", "values"): given[name] for name in given}
    ids = processor.tokenizer(text.replace("<video>", places), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **given,
            pixel_values_videos=torch.tensor(pixels), max_new_tokens=STEPS, do_sample=False,
        )  # fmt: skip
    return list(said[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("with_image", [False, True])
def test_unpruned_it_answers_as_transformers_does(family: Family, with_image: bool) -> None:
    image, frames = picture(9, (90, 33)), video(3)
    expected = generated(family, image if with_image else None, frames.frames)
    given = [image, frames] if with_image else [frames]
    answer = family.unpruned.generate(given, QUESTION, max_new_tokens=STEPS)
    assert list(answer.token_ids) == expected[: len(answer.token_ids)]
    assert len(answer.token_ids) == STEPS or expected[len(answer.token_ids)] == 2


def test_rows_with_images_and_videos_are_answered_as_alone(family: Family) -> None:
    requests = [
        Request(QUESTION, [video(2)]),
        Request(QUESTION, [picture(1), video(4, 20)]),
        Request("how many are there", [picture(2)]),
        Request("how many are there"),
    ]
    together = family.pruned.generate_batch(requests, Options(STEPS))
    for one, request in zip(together, requests, strict=True):
        alone = family.pruned.generate(request.images, request.prompt, max_new_tokens=STEPS)
        assert one.token_ids == alone.token_ids
        assert [kept.tolist() for kept in one.kept] == [kept.tolist() for kept in alone.kept]
        shares = [len(kept) / max(1, one.vision_tokens) for kept in one.kept]
        if one.vision_tokens:
            assert shares == pytest.approx([0.75, 0.5, 0.25], abs=1.5 / one.vision_tokens)


def test_a_folder_of_frames_is_a_video(family: Family, tmp_path: Path) -> None:
    given = video(3)
    for name, frame in zip(("b.png", "c.png", "d.png"), given.frames, strict=True):
        frame.save(tmp_path / name)
    (tmp_path / "a.txt").write_text("no frame")
    done = vtr("run", family.pruned.folder, "--video", tmp_path, "--prompt", QUESTION)
    assert done.code == 0, done.err
    assert done.out.strip() == family.pruned.generate(given, QUESTION).text


def test_places_and_what_is_given_must_agree(family: Family) -> None:
    for given, prompt, said in (
        ([video(1), picture(0)], QUESTION, "the prompt has <image> where a video is given"),
        ([picture(0)], "<video> what", "the prompt has <video> where an image is given"),
        ([video(1)], "<video> <video> what", "places for 2 images, 1 are given"),
    ):
        with pytest.raises(InputError, match=said):
            family.unpruned.generate(given, prompt)
    answer = family.unpruned.generate([video(2)], "<video> what", max_new_tokens=1)
    with pytest.raises(InputError, match="of a video cannot be drawn"):
        family.unpruned.show_kept([video(2)], answer)


def test_a_model_without_videos_refuses_them() -> None:
    kind: Any = parse_kind(CLIPImageProcessorPil(**tiny_llavas.CLIP_SIZES).to_dict(), "")
    with pytest.raises(InputError, match="takes no videos"):
        kind.pixel_values([video(1)])


def test_a_folder_without_frames_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="no folder with frames"):
            Video.of_folder(folder)
