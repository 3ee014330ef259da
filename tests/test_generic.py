"""Architectures without a reader of their own: what is refused, and what is only estimated."""

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig
from transformers.masking_utils import create_bidirectional_mask

from vtr_export.errors import CheckpointError
from vtr_export.families import read_facts
from vtr_export.frontends.skeleton import _fill_buffers
from vtr_export.frontends.trace import attention


@pytest.mark.parametrize("option", ["position_bias", "s_aux", "block_indices", "indices"])
def test_an_attention_with_a_foreign_term_is_refused_by_its_name(option: str) -> None:
    states = torch.zeros(1, 2, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(CheckpointError, match=option):
        attention(nn.Module(), states, states, states, mask, **{option: torch.zeros(1)})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "florence2"}, "encoder-decoder"),
        ({"model_type": "qwen3_5"}, "linear_attention"),
        ({"model_type": "gemma3n"}, "num_kv_shared_layers"),
    ],
)
def test_what_no_schedule_follows_is_refused_by_its_config(config: dict, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_facts(config, "config.json")


def test_facts_of_a_config_that_names_its_type_alone() -> None:
    facts = read_facts({"model_type": "glm4v"}, "config.json")
    assert (facts.layers, facts.hidden, facts.heads, facts.kv_heads) == (40, 4096, 32, 2)
    assert (facts.head_dim, facts.context, facts.image_token_id) == (128, 32768, 151343)
    assert facts.estimated
    assert "estimates" in facts.remarks[0]
    assert not read_facts({"model_type": "llava"}, "config.json").remarks


def test_where_no_token_stands_for_an_image_the_first_id_behind_the_words_does() -> None:
    config = {"model_type": "kosmos-2", "text_config": {"vocab_size": 90, "attention_heads": 4}}
    facts = read_facts(config, "config.json")
    assert (facts.image_token_id, facts.vocab, facts.heads) == (90, 90, 4)
    assert facts.first_position == 2  # behind the pad's id
    assert facts.learned_positions


def test_masks_of_encoders_are_made() -> None:
    """Transformers makes none for an attention that it does not know."""
    config = SiglipVisionConfig(attn_implementation="vtr")
    states, real = torch.zeros(1, 4, 8), torch.tensor([[1, 1, 1, 0]])
    made = create_bidirectional_mask(config, inputs_embeds=states, attention_mask=real)
    assert made.expand(1, 1, 4, 4)[0, 0].tolist() == [[True, True, True, False]] * 4


def test_buffers_of_timms_kind_are_computed_when_a_model_is_built() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bands", torch.empty(3, device="meta"), persistent=False)

        def init_non_persistent_buffers(self) -> None:
            self.bands.copy_(torch.arange(3.0))

    rotary = Rotary()
    _fill_buffers(rotary)
    assert rotary.bands.tolist() == [0, 1, 2]
