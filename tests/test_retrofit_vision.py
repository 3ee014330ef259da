"""What tells a decoder of another tool which tokens are an image's: an index, ids, a mask."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command import vtr
from foreign_parity import BATCH, IMAGE, STAGES, TEXT, called, cut, opened
from test_retrofit import STYLES
from written_llama import HIDDEN, VOCAB, Style, tiny_llama, write

from vtr_export.errors import InputError

PLACE = 7  # the id of an image's places
TABLE = np.random.default_rng(2).normal(size=(VOCAB, HIDDEN)).astype(np.float32)


def asked(count: int = IMAGE) -> dict[str, Any]:
    """A row with an image and a row with pads, or two of text alone; ``vision_index`` by hand."""
    ids = np.random.default_rng(0).integers(8, VOCAB, (BATCH, IMAGE + TEXT))
    if count:
        ids[0, 3 : 3 + IMAGE] = PLACE
    mask = np.ones_like(ids)
    mask[1, :IMAGE] = 0
    vision = np.stack([np.arange(3, 3 + IMAGE), np.arange(IMAGE)])[:, :count]
    return {
        "input_ids": ids,
        "inputs_embeds": TABLE[ids],
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
        "vision_index": vision,
        "vision_mask": ids == PLACE,
    }


def sessions(style: Style, folder: Path, **options: Any) -> list[Any]:
    """The decoder that takes ``vision_index``, and the one that takes what ``options`` say."""
    file = folder / "decoder.onnx"
    ir.save(write(tiny_llama(), style), file)
    plain = opened(Path(cut(file, folder).artifact) / "decoder.onnx")
    return [plain, opened(Path(cut(file, folder, force=True, **options).artifact) / "decoder.onnx")]


@pytest.mark.parametrize("told", ["ids", "mask"])
def test_ids_or_a_mask_are_as_good_as_an_index(told: str, tmp_path: Path) -> None:
    """Rows with one image and with none: as a caller would fill vision_index."""
    by_ids = told == "ids"
    options: dict[str, Any] = {"image_token_id": PLACE} if by_ids else {"vision_mask": True}
    style = STYLES["token ids"] if by_ids else Style()
    with_index, without = sessions(style, tmp_path, **options)
    names = {value.name: value.type for value in without.get_inputs()}
    assert "vision_index" not in names
    assert names.get("vision_mask") == (None if by_ids else "tensor(bool)")
    for count in (IMAGE, 0):
        expected = called(with_index, asked(count), None, np.float32)
        found = called(without, asked(count), None, np.float32)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    feeds = {**asked(), "attention_mask": np.ones((BATCH, IMAGE + TEXT), np.int64)}
    with pytest.raises(Exception, match=r"(?i)ind(ex|ices)"):  # ONNX Runtime has no class for it
        called(without, feeds, None, np.float32)  # a row without pads, and without an image


def by_mobius(file: Path) -> Path:
    """Its embedding graph of a LLaVA, with a table of ours."""
    pytest.importorskip("mobius", reason="mobius-onnx is not installed")
    from mobius.models.llava import _LLaVAEmbeddingModel as Model
    from mobius.tasks import build_embedding_from_features as build

    config = SimpleNamespace(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        pad_token_id=None,
        image_token_id=PLACE,
        dtype=ir.DataType.FLOAT,
    )
    features = {"feature_name": "image_features", "feature_dim": HIDDEN}
    model = build(Model(config), config, **features)
    for value in model.graph.initializers.values():
        if "embed_tokens" in (value.name or ""):
            value.const_value = ir.tensor(TABLE, name=value.name)
    ir.save(model, file, external_data="embedding.data")
    return file


def test_an_embedding_graph_says_it_itself(tmp_path: Path) -> None:
    given = by_mobius(tmp_path / "given.onnx")
    file = tmp_path / "decoder.onnx"
    ir.save(write(tiny_llama(), Style()), file)
    report = cut(file, tmp_path, embedding=given)
    folder = Path(report.artifact)
    assert {"embedding.onnx", "embedding.onnx.data"} < set(report.files)
    assert "vision_mask" in report.inputs
    ids = asked()["input_ids"]
    pictures = np.random.default_rng(1).normal(size=(IMAGE, HIDDEN)).astype(np.float32)
    feeds = {"input_ids": ids, "image_features": pictures}
    before, after = opened(given), opened(folder / "embedding.onnx")
    outputs = [value.name for value in after.get_outputs()]
    embeds, mask = after.run(None, feeds)
    assert outputs[-1] == "vision_mask"
    np.testing.assert_array_equal(embeds, before.run(None, feeds)[0])
    np.testing.assert_array_equal(embeds[0, 3 : 3 + IMAGE], pictures)
    np.testing.assert_array_equal(mask, ids == PLACE)


def looking_for(*numbers: int, ids: str = "input_ids") -> onnx.ModelProto:
    """An embedding graph that compares ids with numbers."""
    seen = "".join(
        f"n{n} = Constant <value_int: int = {n}> () e{n} = Equal (wide, n{n})" for n in numbers
    )
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        e (int32[b, s] {ids}, float[{VOCAB}, {HIDDEN}] table) => (float[b, s, h] embeds)
        {{ wide = Cast <to: int = 7> ({ids}) {seen} embeds = Gather (table, wide) }}"""
    )


@pytest.mark.parametrize(
    ("numbers", "token", "found"),
    [((5,), None, 5), ((5, 9), 9, 9), ((), 4, 4), ((), None, "no id"), ((9, 5), None, "ids 5, 9")],
)
def test_one_id_is_found_or_asked_for(
    numbers: tuple[int, ...], token: int | None, found: int | str, tmp_path: Path
) -> None:
    from vtr_export.retrofit.embedding import read_embedding

    file = tmp_path / "e.onnx"
    onnx.save(looking_for(*numbers), file)
    if isinstance(found, int):
        assert read_embedding(file, token).image_token_id == found
        return
    with pytest.raises(InputError, match=found) as error:
        read_embedding(file, token)
    assert "--image-token-id" in error.value.hint


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    file, schedule = tmp_path / "decoder.onnx", tmp_path / "s.yaml"
    ir.save(write(tiny_llama(), STYLES["token ids"]), file)
    schedule.write_text(STAGES)
    command = ["export", "--onnx", file, "-s", schedule, "-o", tmp_path / "x", "--image-tokens", 8]
    twice = vtr(*command, "--vision-mask", "--image-token-id", PLACE)
    assert (twice.code, "--vision-mask" in twice.err) == (2, True)
    needless = vtr(*command, "--embedding", file)
    assert (needless.code, "input_ids" in needless.err) == (2, True)
    alone = vtr("export", "-s", schedule, "-o", tmp_path / "x", "--vision-mask")
    assert (alone.code, "--vision-mask says nothing" in alone.err) == (2, True)
    assert not (tmp_path / "x").exists()
