"""Images as words: which word of a codebook the graph finds, where words are equal or nearly so."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEVectorQuantizer
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAEVectorQuantizer

from vtr_export.frontends.trace import OPSET

WORDS, WIDTH, SIDE = 16, 8, 12


class Chameleon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = ChameleonVQVAEConfig(num_embeddings=WORDS, embed_dim=WIDTH)
        self.quantize = ChameleonVQVAEVectorQuantizer(config)

    def forward(self, states: Tensor) -> Tensor:
        return self.quantize(states)[2].flatten()


class Emu3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = Emu3VQVAEConfig(codebook_size=WORDS, embed_dim=WIDTH)
        self.quantize = Emu3VQVAEVectorQuantizer(config)

    def forward(self, states: Tensor) -> Tensor:
        return self.quantize(states[:, None]).flatten()


def found(model: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Words by transformers' code, and by its graph in ONNX Runtime."""
    program = torch.onnx.export(
        model, (states,), opset_version=OPSET, optimize=False, verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (ours,) = session.run(None, {session.get_inputs()[0].name: states.numpy()})
    with torch.no_grad():
        return model(states), torch.tensor(np.array(ours))


@pytest.fixture(params=[Chameleon, Emu3])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    built = request.param().eval()
    words = torch.randint(-4, 5, (WORDS // 2, WIDTH)).float()  # distances are exact
    built.quantize.embedding.weight.data = words.repeat(2, 1)
    return built


def test_of_equal_words_the_first_is_taken(model: Any) -> None:
    at = torch.randint(0, WORDS, (SIDE * SIDE,))
    states = model.quantize.embedding.weight.data[at].T.reshape(1, WIDTH, SIDE, SIDE)
    theirs, ours = found(model, states)
    assert ours.tolist() == theirs.tolist() == (at % (WORDS // 2)).tolist()


def test_words_differ_only_where_two_are_as_near_as_rounding_tells(model: Any) -> None:
    table = model.quantize.embedding.weight.data[: WORDS // 2].clone()
    table += torch.randn_like(table)
    model.quantize.embedding.weight.data = torch.cat((table, table + 100))
    pairs = torch.randint(0, WORDS // 2, (2, SIDE * SIDE))
    between = (table[pairs[0]] + table[pairs[1]]) / 2  # as far from the one as from the other
    theirs, ours = found(model, between.T.reshape(1, WIDTH, SIDE, SIDE))
    far = torch.cdist(between.double(), table.double())
    gap = (far.gather(1, ours[:, None]) - far.gather(1, theirs[:, None])).abs()
    assert gap.max() < 1e-5
    assert (gap == 0).float().mean() > 0.5
