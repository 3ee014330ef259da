"""Images as keys of cross-attention: what is laid out, what a cut drops, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_mllama
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.mllama import processing_mllama

from vtr_export import Artifact, Schedule, export
from vtr_export.cost import layer_rows
from vtr_export.errors import InputError, ScheduleError
from vtr_export.families import ModelFacts
from vtr_export.families.mllama import mllama as read_mllama
from vtr_export.inspection import inspect_file
from vtr_export.memory import WEIGHT_TYPES, Workload, kv_bytes
from vtr_export.runtime.artifact import Request
from vtr_export.runtime.batch import pad_batch
from vtr_export.runtime.conversation import Conversation
from vtr_export.runtime.crossing import lay_out, sees
from vtr_export.runtime.images import Seen
from vtr_export.runtime.sampling import Options
from vtr_export.verify.processors import load_processor

IMAGE, QUESTION, STEPS = tiny_mllama.VOCAB, "what colour is the digit ?", 8
KEYS = 4 * ((tiny_mllama.TILE // tiny_mllama.PATCH) ** 2 + 1)  # of an image, four tiles
LAYERS, CROSSES = 6, tuple(tiny_mllama.CROSSES)


def facts() -> ModelFacts:
    return read_mllama(tiny_mllama.tiny_config().to_dict(), "config.json")


def staged(*stages: tuple[int, str], **prefill: Any) -> Schedule:
    cuts = [{"before_layer": layer, "keep": keep} for layer, keep in stages]
    return Schedule.from_data({"version": 1, "prefill": {"stages": cuts, **prefill}})


def picture(seed: int, size: tuple[int, int] = (41, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mllama")
    tiny_mllama.mllama(folder)
    return folder


@pytest.fixture(scope="module")
def blinded(
    checkpoint: Path, one_trace: None, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """Half the keys before layer 2, none from layer 3 on."""
    out = tmp_path_factory.mktemp("blinded") / "a"
    export(staged((2, "50%"), (3, "0%")), checkpoint, out, verify="none")
    return Artifact.load(out, threads=1)


@pytest.mark.parametrize(
    "row",
    [[1, 9], [IMAGE, 9, 9], [1, IMAGE, 9, IMAGE, 9], [1, IMAGE, IMAGE, 9, IMAGE, IMAGE, IMAGE, 9]],
)
def test_a_token_sees_what_transformers_lets_it_see(row: list[int]) -> None:
    ids, images = np.array(row), row.count(IMAGE)
    if not images:
        assert sees(ids == IMAGE, "onward").shape == (len(row), 0)
        return
    places = processing_mllama.get_cross_attention_token_mask(row, IMAGE)
    dense = processing_mllama.convert_sparse_cross_attention_mask_to_dense(
        [places], [[1] * images], 1, len(row)
    )
    assert (sees(ids == IMAGE, "onward") == dense[0, :, :, 0]).all()


def test_keys_that_the_last_token_does_not_see_come_first_and_pads_before_them() -> None:
    rows = [[1, IMAGE, 9, IMAGE, 9], [1, IMAGE, 9]]
    keys = lay_out(pad_batch(rows, 0, None), IMAGE, [Seen(2), Seen(3), Seen(1)], 3, "onward")
    assert keys.features.tolist() == [[0, 1, 2, 3, 4, 5], [-1, -1, -1, 7, 8, 6]]
    assert keys.numbers.tolist() == [[0, 1, -1, 2, 3, 4], [-1, -1, -1, -1, -1, 0]]
    assert keys.real.tolist() == [[False] * 3 + [True] * 3, [False] * 5 + [True]]
    assert keys.rows.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert keys.seen[0, 0].all()  # who sees no image attends to all there is, but does not count
    assert keys.seen[1, :2].sum() == 0  # pads see nothing


def test_each_cut_narrows_what_later_cross_layers_project_and_hold(blinded: Artifact) -> None:
    prepared = blinded.prepare([Request(QUESTION, [picture(0)])])
    assert prepared.images is not None
    batch = blinded.model.pad([row.ids for row in prepared.rows])
    features = blinded.model.encode(prepared.images.feeds).features
    step = blinded.model.prefill(blinded.model.decoder.empty(1), batch, features, prepared.seen)
    lengths = [
        np.shape(step.cache.values[f"past_key_values.{layer}.key"])[2] for layer in range(LAYERS)
    ]
    text = batch.input_ids.shape[1]
    assert prepared.rows[0].ids[0] != IMAGE  # a token before the image attends to all its tiles
    assert lengths == [text, 1 + KEYS, 1 + KEYS // 2, 1, text, 1]
    held = step.cache.values.items()
    masks = {n: each.value.numpy() for n, each in held if n.startswith("past_mask")}
    assert len(masks) > 1
    for name, mask in masks.items():  # the key of zeros stands first, seen by none that see others
        assert mask[0, 0] == 0, name
        assert name.endswith("cross") or mask[0, 1:].all(), name


def test_layers_that_have_no_key_left_are_as_if_they_were_not_there(
    blinded: Artifact, checkpoint: Path
) -> None:
    """Their gates closed in transformers' own model; all keys that are seen survive one cut."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        for layer in CROSSES[2:]:
            model.get_decoder().layers[layer].cross_attn_attn_gate.zero_()
            model.get_decoder().layers[layer].cross_attn_mlp_gate.zero_()
        processor = load_processor(checkpoint, backend="pil")
        text = f"{tiny_mllama.IMAGE} {QUESTION}"
        inputs = processor(text=[text], images=[[picture(0)]], return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    out = blinded.folder.parent / "whole"
    export(staged((2, "100%"), (3, "0%")), checkpoint, out, verify="none")
    answer = Artifact.load(out, threads=1).generate([picture(0)], text, max_new_tokens=STEPS)
    expected = said[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(answer.token_ids) == expected[: len(answer.token_ids)]
    assert [len(kept) for kept in answer.kept] == [answer.vision_tokens, 0]


def test_rows_of_unlike_images_are_answered_as_alone(blinded: Artifact) -> None:
    small = picture(1, (9, 11))
    requests = [Request(QUESTION, [picture(0), small]), Request("how many", [small]), Request("no")]
    together = blinded.generate_batch(requests, Options(STEPS))
    for request, one in zip(requests, together, strict=True):
        alone = blinded.generate(request.images, request.prompt, max_new_tokens=STEPS)
        assert one.token_ids == alone.token_ids
        assert [kept.tolist() for kept in one.kept] == [kept.tolist() for kept in alone.kept]


def test_a_later_turn_may_ask_again_and_may_bring_no_image(blinded: Artifact) -> None:
    talk = Conversation(blinded)
    talk.ask(QUESTION, [picture(0)], max_new_tokens=2)
    assert talk.ask("how many", max_new_tokens=2).token_ids
    with pytest.raises(InputError, match="a later turn brings an image"):
        talk.ask("and here", [picture(1)], max_new_tokens=2)


def test_inspect_names_cross_layers_and_follows_their_keys(blinded: Artifact) -> None:
    found = inspect_file(blinded.folder / blinded.manifest.graphs.decoder)
    assert tuple(each.index for each in found.layers if each.attention == "cross") == CROSSES
    assert not found.lost
    assert [cut.before_layer for cut in found.cuts] == [2, 3]
    states = next(each for each in found.inputs if each.name == "cross_states")
    assert states.axes == "vision keys on axis 1"


def test_a_plan_counts_keys_where_layers_cross_and_text_elsewhere() -> None:
    resolved = staged((2, "50%")).resolve(facts())
    rows = layer_rows(resolved, vision_tokens=40, text_tokens=7)
    assert [row.new_keys for row in rows] == [7, 40, 20, 20, 7, 20]
    assert {row.entering for row in rows} == {7}
    work = Workload(vision_tokens=40, text_tokens=7, new_tokens=3)
    kept = kv_bytes(facts(), resolved, work, WEIGHT_TYPES["fp32"], 3)
    assert kept == 2 * 2 * 8 * 4 * (2 * (7 + 3) + 40 + 3 * 20)  # k and v, two heads of 8 floats


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (staged((1, "50%")), "before layer 1: no cross layer stands before it"),
        (staged((4, "50%"), (5, "25%")), "no cross layer stands between 4 and before it"),
        (staged((2, "50%"), score={"query": "text"}), "query is text"),
        (staged((2, "50%"), score={"from": "next"}), "from is next"),
        (staged((2, "50%"), positions="repacked"), "positions is repacked"),
        (staged((2, "50%"), drop_point="inside"), "drop_point is inside"),
    ],
)  # fmt: skip
def test_what_means_nothing_here_is_refused(schedule: Schedule, reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        schedule.resolve(facts())


def test_a_cut_behind_all_cross_layers_is_refused() -> None:
    config = tiny_mllama.tiny_config().to_dict()
    config["text_config"]["cross_attention_layers"] = [1, 2]
    with pytest.raises(ScheduleError, match="no cross layer follows"):
        staged((3, "50%")).resolve(read_mllama(config, "config.json"))
