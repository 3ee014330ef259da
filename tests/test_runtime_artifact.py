"""Real artifacts against the reference, from image files and prompts to answers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtr_export.errors import ArtifactError, InputError, UnavailableError
from vtr_export.exporter import export
from vtr_export.families import read_facts
from vtr_export.manifest import Manifest
from vtr_export.reference import Cache, Generation, Reference
from vtr_export.reference.inputs import embed, pad_batch
from vtr_export.runtime.artifact import Artifact, Request
from vtr_export.runtime.conversation import Conversation
from vtr_export.runtime.images import Seen
from vtr_export.runtime.sampling import Options
from vtr_export.runtime.show_kept import Grid, darken
from vtr_export.schedule import Schedule

ROOT = Path(__file__).parent.parent
SCHEDULE = Schedule.from_keeps([16, 16, 9, 9, 4, 4])
QUESTION = "what colour is the seven ?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.tiny_llava(layers=6, hidden=32, seed=5)
    return tiny_models.save_checkpoint(model, tmp_path_factory.mktemp("checkpoint"), shards=2)


@pytest.fixture(scope="module")
def folder(one_trace: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("copied") / "artifact"
    export(SCHEDULE, checkpoint, out, verify="none", tunable=True)
    return out


@pytest.fixture(scope="module")
def linked(one_trace: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linked") / "artifact"
    export(SCHEDULE, checkpoint, out, verify="none", weights="link")
    return out


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return Artifact.load(folder, threads=1)


class Oracle:
    """The checkpoint in transformers, its decoder cut by the reference."""

    def __init__(self, checkpoint: Path, schedule: Schedule = SCHEDULE) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        facts = read_facts(json.loads((checkpoint / "config.json").read_text()), "")
        self.decoder = Reference(
            self.model.model.language_model, self.model.lm_head, schedule.resolve(facts)
        )

    def answer(
        self,
        rows: Sequence[Sequence[int]],
        images: Sequence[Image.Image],
        count: int,
        past: tuple[Cache, torch.Tensor] | None = None,
    ) -> Generation:
        pixels = (
            self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            if images
            else None
        )
        ids, mask = pad_batch(rows, tiny_models.PAD, tiny_models.IMAGE)
        embeds, index = embed(self.model, ids, mask, pixels)
        cache, before = past or (None, mask[:, :0])
        return self.decoder.generate(
            self.model.get_input_embeddings(), embeds, torch.cat((before, mask), 1), index,
            max_new_tokens=count, eos=[tiny_models.EOS], cache=cache,
        )  # fmt: skip

    def ids(self, question: str, images: int) -> list[int]:
        content: list[Any] = [
            {"type": "image", "image": Image.new("RGB", (9, 9))} for _ in range(images)
        ]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        out = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(out["input_ids"][0])


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


def picture(seed: int, size: tuple[int, int] = (41, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def until_end(tokens: torch.Tensor) -> list[int]:
    row = tokens.tolist()
    return row[: row.index(tiny_models.EOS)] if tiny_models.EOS in row else row


@pytest.mark.parametrize("images", [0, 1, 2])
def test_an_answer_is_the_references(artifact: Artifact, oracle: Oracle, images: int) -> None:
    given = [picture(seed) for seed in range(images)]
    answer = artifact.generate(given, QUESTION, max_new_tokens=12)
    expected = oracle.answer([oracle.ids(QUESTION, images)], given, 12)
    assert list(answer.token_ids) == until_end(expected.tokens[0])
    assert answer.text == oracle.processor.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.prompt_tokens == len(oracle.ids(QUESTION, images))
    assert answer.vision_tokens == 16 * images
    assert [len(left) for left in answer.kept] == [9 * images, 4 * images]
    assert set(answer.kept[1]) <= set(answer.kept[0])
    if images == 1:
        columns = np.flatnonzero(np.array(oracle.ids(QUESTION, 1)) == tiny_models.IMAGE)
        first = expected.prefill.kept[0][0].numpy()
        assert answer.kept[0].tolist() == np.flatnonzero(np.isin(columns, first)).tolist()


def test_files_are_as_good_as_images(artifact: Artifact, tmp_path: Path) -> None:
    picture(3).save(tmp_path / "image.png")
    answers = [
        artifact.generate(image, QUESTION, max_new_tokens=6).token_ids
        for image in (picture(3), tmp_path / "image.png", str(tmp_path / "image.png"), (tmp_path / "image.png").read_bytes())
    ]  # fmt: skip
    assert len(set(answers)) == 1


def test_a_batch_of_unlike_rows(artifact: Artifact, oracle: Oracle) -> None:
    requests = [
        Request(QUESTION, [picture(0)]), Request("which digit ?"), Request("how many ?", [picture(1), picture(2)]),
        Request("user : <image> left . right <image> ?", [picture(4), picture(5)]),
    ]  # fmt: skip
    answers = artifact.generate_batch(requests, Options(max_new_tokens=8))
    for request, answer in zip(requests, answers, strict=True):
        alone = artifact.generate(request.images, request.prompt, max_new_tokens=8)
        assert answer.token_ids == alone.token_ids
        assert [left.tolist() for left in answer.kept] == [left.tolist() for left in alone.kept]
    rows = [list(row.ids) for row in artifact.prepare(requests).rows]
    images = [image for request in requests for image in request.images]
    expected = oracle.answer(rows, images, 8)
    for answer, tokens in zip(answers, expected.tokens, strict=True):
        assert list(answer.token_ids) == until_end(tokens)


def test_a_conversation_is_the_same_calls(artifact: Artifact, oracle: Oracle) -> None:
    talk = Conversation(artifact)
    first = talk.ask(QUESTION, picture(0), max_new_tokens=5)
    second = talk.ask("which digit ?", max_new_tokens=5)
    third = talk.ask("how many ?", [picture(1)], max_new_tokens=5)
    expected = oracle.answer([oracle.ids(QUESTION, 1)], [picture(0)], 5)
    assert list(first.token_ids) == until_end(expected.tokens[0])
    for answer, question, images, said in [
        (second, "which digit ?", 0, first),
        (third, "how many ?", 1, second),
    ]:
        text = " user :" + " <image>" * images + f" {question} assistant :"
        spread = text.replace("<image>", "<image>" * 16)
        unfed = list(said.token_ids[-1:]) if said.finish == "length" else []
        row = unfed + oracle.processor.tokenizer.encode(spread, add_special_tokens=False)
        expected = oracle.answer(
            [row], [picture(1)] * images, 5, (expected.cache, expected.attention_mask)
        )
        assert list(answer.token_ids) == until_end(expected.tokens[0])
        assert answer.prompt_tokens == len(row)
    assert talk.tokens == expected.attention_mask.shape[1]
    assert [question for question, _ in talk.turns] == [QUESTION, "which digit ?", "how many ?"]
    assert [len(left) for left in second.kept] == [0, 0]
    assert [len(left) for left in third.kept] == [9, 4]


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(artifact: Artifact) -> None:
    talk, other = Conversation(artifact), Conversation(artifact)
    for one in (talk, other):
        one.ask(QUESTION, picture(0), max_new_tokens=4)
    with pytest.raises(InputError, match="no such image"):
        talk.ask("and this ?", "absent.png")
    with pytest.raises(InputError, match="the model's context is 1024"):
        talk.ask("digit " * 1100)
    with pytest.raises(ZeroDivisionError):
        talk.ask("and this ?", stream=lambda piece: 1 / 0)  # type: ignore[arg-type,return-value]
    assert talk.tokens == other.tokens
    assert (
        talk.ask("which ?", max_new_tokens=4).token_ids
        == other.ask("which ?", max_new_tokens=4).token_ids
    )


def test_a_written_out_conversation_is_appended_as_it_is(artifact: Artifact) -> None:
    talk = Conversation(artifact)
    first = talk.ask("user : <image> what ? assistant :", picture(0), max_new_tokens=3)
    before = talk.tokens
    second = talk.ask(" user : which <image> assistant :", picture(1), max_new_tokens=3)
    assert first.finish == "length"
    assert second.prompt_tokens == 1 + 6 - 1 + 16
    assert talk.tokens == before + second.prompt_tokens + 2


def test_a_template_that_hides_answers_takes_no_second_turn(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text("{{ messages[-1]['content'][-1]['text'] }}")
    relisted(copy)
    talk = Conversation(Artifact.load(copy))
    talk.ask("what ?", max_new_tokens=2)
    with pytest.raises(InputError, match="earlier answers"):
        talk.ask("which ?")


def relisted(folder: Path) -> None:
    """Make a changed copy whole again."""
    from vtr_export.published import hash_files

    data = json.loads((folder / "manifest.json").read_text())
    data["files"] = {name: file.model_dump() for name, file in hash_files(folder).items()}
    (folder / "manifest.json").write_text(json.dumps(data))


def test_streaming_is_the_answer_in_pieces(artifact: Artifact) -> None:
    pieces: list[str] = []
    answer = artifact.generate(picture(0), QUESTION, max_new_tokens=7, stream=pieces.append)
    assert "".join(pieces) == answer.text
    spoken = [token for token in answer.token_ids if token >= len(tiny_models.SPECIAL)]
    assert len(pieces) == len(spoken) > 1


def test_sampling_is_reproducible(artifact: Artifact) -> None:
    hot: dict[str, Any] = {"max_new_tokens": 8, "temperature": 5.0}
    one, two, other = (
        artifact.generate(picture(0), QUESTION, seed=seed, **hot).token_ids for seed in (1, 1, 2)
    )
    assert one == two != other
    best = artifact.generate(picture(0), QUESTION, max_new_tokens=8).token_ids
    assert artifact.generate(picture(0), QUESTION, top_k=1, **hot).token_ids == best


def test_linked_weights_answer_alike(artifact: Artifact, linked: Path) -> None:
    ours = Artifact.load(linked, threads=1)
    expected = artifact.generate(picture(0), QUESTION, max_new_tokens=8)
    answer = ours.generate(picture(0), QUESTION, max_new_tokens=8)
    assert answer.token_ids == expected.token_ids


def test_a_tunable_artifact_keeps_what_it_is_told(
    artifact: Artifact, folder: Path, checkpoint: Path
) -> None:
    tuned = Artifact.load(folder, keep=[5, 2])
    answer = tuned.generate(picture(0), QUESTION, max_new_tokens=6)
    assert [len(left) for left in answer.kept] == [5, 2]
    expected = Oracle(checkpoint, Schedule.from_keeps([16, 16, 5, 5, 2, 2]))
    tokens = expected.answer([expected.ids(QUESTION, 1)], [picture(0)], 6).tokens[0]
    assert list(answer.token_ids) == until_end(tokens)
    for wrong in ([5], [2, 5], [17, 1], [1, -1]):
        with pytest.raises(InputError, match="does not fit"):
            Artifact.load(folder, keep=wrong)


def test_frozen_keeps_stay(linked: Path) -> None:
    with pytest.raises(InputError, match="frozen"):
        Artifact.load(linked, keep=[5, 2])


def test_what_a_prompt_must_hold(artifact: Artifact) -> None:
    for images, prompt, said in [
        ([], "user : <image> what ?", "places for 1 images, 0"),
        ([picture(0)] * 2, "user : <image> what ?", "places for 1 images, 2"),
        ([picture(0)], "user : what ? <image>", "ends with an image"),
        ([], "digit " * 1100, "context is 1024"),
    ]:
        with pytest.raises(InputError, match=said):
            artifact.generate(images, prompt)
    with pytest.raises(InputError, match="not an image"):
        artifact.generate(b"text", QUESTION)


def test_a_model_without_a_template_wants_the_place_of_the_image(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    relisted(copy)
    bare = Artifact.load(copy)
    with pytest.raises(InputError, match="no place") as caught:
        bare.generate(picture(0), QUESTION)
    assert "<image>" in caught.value.hint
    assert bare.generate(picture(0), f"<image> {QUESTION}", max_new_tokens=2).vision_tokens == 16


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_what_an_artifact_lacks_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    relisted(copy)
    lacking = Artifact.load(copy)  # loads: whoever brings ids and pixel values needs neither
    with pytest.raises(ArtifactError, match=r"tokenizer\.json|how images are prepared") as caught:
        lacking.generate(picture(0), QUESTION)
    assert (
        "tokenizer.json" if name == "tokenizer.json" else "preprocessor_config.json"
    ) in caught.value.hint


def test_answers_stop_at_the_context(artifact: Artifact) -> None:
    long = "digit " * (1023 - 30)
    answer = artifact.generate([], long, max_new_tokens=500)
    assert answer.prompt_tokens + len(answer.token_ids) <= 1024


def test_a_model_that_forgets_what_it_said_ends_there(artifact: Artifact) -> None:
    facts = artifact.manifest.model.model_copy(update={"answer": 3, "eos_token_ids": ()})
    forgets = replace(artifact, manifest=artifact.manifest.model_copy(update={"model": facts}))
    turns = Conversation(forgets)
    assert len(turns.ask(QUESTION, picture(1)).token_ids) == 3
    with pytest.raises(InputError, match="no second turn"):
        turns.ask("again?")


def test_bf16_artifacts_are_refused_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    for name in folder.rglob("*"):
        if name.is_file():
            (tmp_path / "artifact" / name.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copy(name, tmp_path / "artifact" / name.relative_to(folder))
    data = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "artifact" / "manifest.json").write_text(json.dumps(data | {"dtype": "bf16"}))
    with pytest.raises(UnavailableError, match="bf16") as caught:
        Artifact.load(tmp_path / "artifact")
    assert "--device cuda" in caught.value.hint


def test_kept_tokens_are_drawn(artifact: Artifact) -> None:
    images = [picture(0), picture(1)]
    answer = artifact.generate(images, QUESTION, max_new_tokens=2)
    sheet = artifact.show_kept(images, answer)
    assert sheet.size == (8 + 4 * (252 + 8), 8 + 2 * (252 + 22 + 8))
    assert artifact.stage_layers() == [(0, 1), (2, 3), (4, 5)]
    with pytest.raises(InputError, match="not those"):
        artifact.show_kept(images[:1], answer)


def test_darkening_follows_the_patches() -> None:
    view = Image.new("RGB", (30, 21), (200, 200, 200))
    grid = Grid.of(view, Seen(13, (1, 3, 4)))
    assert (grid.rows, grid.columns, grid.leading) == (3, 4, 1)
    pixels = np.array(darken(view, grid, [0, 1 + 5], scale=2))[:, :, 0]
    assert pixels.shape == (42, 60)
    light = pixels[:, :56].reshape(3, 14, 4, 14).mean((1, 3))
    assert light[1, 1] == 200
    assert (np.delete(light.ravel(), 5) == 44).all()
    assert (pixels[:, 56:] == 200).all()  # what no patch covers


def test_it_runs_where_torch_and_transformers_cannot_be_imported(
    artifact: Artifact, folder: Path, tmp_path: Path
) -> None:
    picture(0).save(tmp_path / "image.png")
    probe = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors', 'onnxscript'): sys.modules[name] = None\n"
        "from vtr_export.runtime.artifact import Artifact\n"
        f"print(Artifact.load({str(folder)!r}).generate({str(tmp_path / 'image.png')!r}, {QUESTION!r}, max_new_tokens=4).text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stderr == ""
    said = artifact.generate(tmp_path / "image.png", QUESTION, max_new_tokens=4)
    assert done.stdout == f"{said.text}\n"


@pytest.mark.parametrize("which", ["folder", "linked"])
def test_the_sample_gives_the_same_answer(
    artifact: Artifact, request: pytest.FixtureRequest, which: str, tmp_path: Path
) -> None:
    picture(0).save(tmp_path / "image.png")
    script = ROOT / "samples" / "infer_onnxruntime.py"
    command = [
        sys.executable,
        str(script),
        str(request.getfixturevalue(which)),
        "--image",
        str(tmp_path / "image.png"),
        "--prompt",
        QUESTION,
    ]
    done = subprocess.run(
        [*command, "--max-new-tokens", "9"], capture_output=True, text=True, check=False
    )
    assert done.stdout == artifact.generate(picture(0), QUESTION, max_new_tokens=9).text + "\n", (
        done.stderr
    )
    assert script.read_text().count("\n") < 100


def test_manifest_facts_reach_the_runtime(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.model.eos_token_ids == (tiny_models.EOS,)
    assert manifest.model.tokens_per_image == 16
