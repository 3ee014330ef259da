"""What is particular to Gemma 4: embeddings for every layer, and layers that see unlike tokens."""

from importlib import import_module as load
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import Gemma4ForConditionalGeneration

from vtr_export import Artifact, Schedule, ops
from vtr_export.errors import CheckpointError
from vtr_export.exporter import export
from vtr_export.families import read_facts
from vtr_export.reference import Head, Reference, embed, embeddings, groups_for, positions_for
from vtr_export.runtime.decoder import Decoder
from vtr_export.verify.sessions import Parts

STAGES = [{"before_layer": 1, "keep": "50%"}, {"before_layer": 3, "keep": "25%"}]
CUTS = Schedule.from_data({"version": 1, "prefill": {"stages": STAGES}})
IMAGE, PAD, LAYERS, WIDTH = 4, 0, 4, 16


@pytest.fixture(scope="module")
def model() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "samples" / "bench")
        config = load("zoo_config").tiny_config("gemma4")
        config.text_config.sliding_window = 64  # no prompt is longer
        config._attn_implementation = "eager"
        built = Gemma4ForConditionalGeneration(config)
        load("zoo").randomize(built, 0)
        return built.eval()


@pytest.fixture(scope="module")
def artifact(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("gemma4")
    model.save_pretrained(room / "checkpoint")
    export(CUTS, room / "checkpoint", room / "out", verify="none")
    return room / "out"


def graph(artifact: Path, part: str) -> ir.Graph:
    (path,) = artifact.rglob(f"{part}*.onnx")
    return ir.load(path).graph


def test_layers_with_a_window_see_images_whole_in_every_stage(artifact: Path) -> None:
    attentions = [n for n in graph(artifact, "decoder") if n.op_type == "Attention"]
    made = [node.inputs[3].producer() for node in attentions]
    kinds = [ops.GROUPED] * 3 + [ops.CAUSAL]
    assert [node.op_type for node in made] == kinds
    assert len({id(node) for node in made}) == 3  # layer 0; layers 1 and 2; layer 3


def test_a_cut_narrows_the_embeddings_of_all_later_layers(artifact: Path) -> None:
    narrowed = [
        node
        for node in graph(artifact, "decoder")
        if node.op_type == "VtrNarrow"
        and len(node.inputs[0].shape or ()) == 3
        and node.inputs[0].shape[-1] == WIDTH
    ]
    again = [node for node in narrowed if node.inputs[0].producer() in narrowed]
    assert len(narrowed) == 4  # of layers 1, 2 and 3 before layer 1
    assert len(again) == 1  # of layer 3 before layer 3


def test_pruned_logits_are_those_of_the_reference(model: Any, artifact: Path) -> None:
    """A prefill of two unlike rows and a decode step, all from the same embeddings."""
    ids = torch.full((2, 20), PAD)
    ids[0, 2:], ids[1, 6:] = 20, 21
    ids[:, 7:17] = IMAGE
    mask = (torch.arange(20)[None] >= torch.tensor([[2], [6]])).long()
    embeds, index = embed(model, ids, mask, None)
    image = ids == IMAGE
    embeds[..., : -LAYERS * WIDTH][image] = torch.randn(int(image.sum()), 32)
    groups, positions = groups_for(model, ids, mask), positions_for(model, ids, mask, None)
    facts = read_facts(model.config.to_dict(), "config.json")
    reference = Reference(model.get_decoder(), Head(model), CUTS.resolve(facts))
    said = reference.generate(
        embeddings(model),
        embeds,
        mask,
        index,
        max_new_tokens=2,
        positions=positions,
        groups=groups,
    )
    parts = Parts.of(artifact, Artifact.load(artifact).manifest)
    decoder = Decoder(parts.open(parts.decoder), keep=parts.keep)
    fed = embeds.numpy(), mask.numpy(), index.numpy()
    first = decoder(decoder.empty(2), *fed, None, groups.numpy(), kept=True)
    words = embeddings(model)(said.tokens[:, :1]).detach().numpy()
    nothing = np.zeros((2, 0), np.int64)
    second = decoder(first.cache, words, np.ones((2, 1), np.int64), nothing)
    for ours, theirs in zip(first.kept, said.prefill.kept, strict=True):
        assert np.array_equal(ours, theirs)
    ours = np.stack([first.logits, second.logits], 1)
    assert np.abs(ours - said.logits.numpy()).max() < 1e-4


def test_an_image_has_a_pads_embeddings_for_the_layers(model: Any, artifact: Path) -> None:
    (path,) = artifact.rglob("embed_tokens*.onnx")
    session = onnxruntime.InferenceSession(path)
    ids = np.array([[IMAGE, 20, PAD]])
    (found,) = session.run(None, {"input_ids": ids})
    beside = found[0, :, -LAYERS * WIDTH :]
    with torch.no_grad():
        table = model.model.language_model.embed_tokens_per_layer(torch.tensor([20, PAD]))
    assert np.array_equal(beside[0], beside[2])
    assert np.allclose(beside[1:], table.numpy(), atol=1e-6)
    words, _ = embed(model, torch.tensor(ids), torch.ones(1, 3, dtype=torch.long), None)
    assert np.allclose(found, words.numpy(), atol=1e-6)


def test_groups_are_those_of_the_layers_with_a_window(model: Any) -> None:
    ids = torch.tensor([[20, IMAGE, IMAGE, 21, IMAGE, IMAGE, 22]])
    groups = groups_for(model, ids, torch.ones_like(ids))
    assert groups.tolist() == [[0, 1, 1, 0, 2, 2, 0]]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("num_kv_shared_layers", 10, "KV sharing"),
        ("use_bidirectional_attention", "all", "what comes behind"),
    ],
)
def test_layers_that_no_cut_follows_are_refused(field: str, value: object, reason: str) -> None:
    config = {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", field: value}}
    with pytest.raises(CheckpointError, match=reason):
        read_facts(config, "config.json")


def test_attends_as_its_config_says() -> None:
    for said, attends in (("vision", "images"), (None, "causal")):
        text = {"model_type": "gemma4_text", "use_bidirectional_attention": said}
        facts = read_facts({"model_type": "gemma4", "text_config": text}, "config.json")
        assert facts.attends == attends
