"""Many questions about one image in one sequence, each seeing the image and itself only."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from network import EOS, TOKENS, WIDTH, make_tokenizer
from questions import Question
from scenes import COLOURS, MOST, Scenes, patch_labels
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

QUESTIONS = 12  # two of each kind
LENGTH = 10  # longest question, "assistant :" and answer
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IGNORE = -100
PATCH_LOGITS = (10, len(COLOURS) + 1, 4, MOST)


@dataclass(frozen=True)
class Batch:
    """``B`` scenes with ``Q`` questions each, and what every patch shows."""

    pixels: Tensor  # [B, 3, 96, 96]
    tokens: Tensor  # [B, Q * LENGTH]
    targets: Tensor  # [B, Q * LENGTH], -100 where nothing is asked
    hints: Tensor  # [B, Q * LENGTH], the answer from the word on that the question is about
    patches: tuple[Tensor, ...]  # digit, colour, extreme, count


@cache
def encode(text: str) -> tuple[int, ...]:
    """Token ids without ``<s>``."""
    return tuple(_tokenizer()(text, add_special_tokens=False).input_ids)


@cache
def _tokenizer() -> object:
    return make_tokenizer()


def make_batch(scenes: Scenes, asked: list[list[Question]]) -> Batch:
    """Tensors of scenes and their questions."""
    tokens = np.zeros((len(asked), len(asked[0]), LENGTH), np.int64)
    targets, hints = np.full_like(tokens, IGNORE), np.full_like(tokens, IGNORE)
    for row, questions in enumerate(asked):
        for column, question in enumerate(questions):
            prompt = encode(f"{question.text} assistant:")
            answer = encode(question.answer)
            whole, start = (*prompt, *answer), len(prompt) - 1
            tokens[row, column, : len(whole)] = whole
            targets[row, column, start : start + len(answer) + 1] = (*answer, EOS)
            hints[row, column, first_hint(prompt, question.about) : start] = answer[0]
    pixels = (scenes.images.astype(np.float32) / 255 - np.array(MEAN, "f4")) / np.array(STD, "f4")
    labels = patch_labels(scenes)
    return Batch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(tokens.reshape(len(asked), -1)),
        torch.from_numpy(targets.reshape(len(asked), -1)),
        torch.from_numpy(hints.reshape(len(asked), -1)),
        tuple(map(torch.from_numpy, (labels.digit, labels.colour, labels.extreme, labels.count))),
    )


def first_hint(prompt: tuple[int, ...], about: str) -> int:
    """Where the answer can first be known: at the word the question is about, or at the end."""
    return prompt.index(encode(about)[0]) if about else len(prompt) - 1


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as two products: several times faster backwards than the fused one on a CPU."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    rows = (query * scaling).reshape(batch * groups, -1, width)
    keys, values = key.reshape(-1, length, width), value.reshape(-1, length, width)
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(-1, heads // groups, length, length)
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    seen = torch.bmm(scores.softmax(-1).view(batch * groups, -1, length), values)
    return seen.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)


class Packed(nn.Module):
    """The model over packed questions, with a head that names patches while training."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        model.set_attn_implementation("plain")
        self.patch_head = nn.Linear(WIDTH, sum(PATCH_LOGITS))
        nn.init.normal_(self.patch_head.weight, std=WIDTH**-0.5)
        self.prefix = encode("user:")
        self.mask, self.positions = layout(1 + len(self.prefix) + TOKENS, QUESTIONS * LENGTH)

    def features(self, pixels: Tensor) -> Tensor:
        """Vision tokens as the decoder sees them, ``[B, 144, WIDTH]``."""
        tower = self.model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        return self.model.model.multi_modal_projector(hidden[:, 1:])

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logits at the question positions, ``[B, Q * LENGTH, vocabulary]``."""
        decoder = self.model.model.language_model
        prefix = torch.tensor([[1, *self.prefix]]).expand(len(tokens), -1)
        before, after = decoder.embed_tokens(prefix), decoder.embed_tokens(tokens)
        hidden = torch.cat([before, features.to(before.dtype), after], 1)
        mask = self.mask.to(features.dtype)
        rotary = decoder.rotary_emb(hidden, position_ids=self.positions)
        for layer in decoder.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return self.model.lm_head(decoder.norm(hidden[:, -tokens.shape[1] :]))


def layout(prefix: int, asked: int) -> tuple[Tensor, Tensor]:
    """Who sees whom, ``[1, 1, S, S]`` additive, and the position of each token, ``[1, S]``."""
    block = torch.cat([torch.full((prefix,), -1), torch.arange(asked) // LENGTH])
    causal = torch.ones(prefix + asked, prefix + asked, dtype=torch.bool).tril()
    visible = causal & ((block[:, None] == block[None]) | (block[None] < 0))
    positions = torch.cat([torch.arange(prefix), prefix + torch.arange(asked) % LENGTH])
    mask = torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    return mask[None, None], positions[None]


def patch_loss(logits: Tensor, patches: tuple[Tensor, ...]) -> Tensor:
    """Cross entropy of digit (twice), colour, outermost side and count, summed."""
    digit, colour, extreme, count = logits.float().split(PATCH_LOGITS, -1)
    entropy = nn.functional.cross_entropy
    inked = (patches[0] < 10).unsqueeze(-1)
    sides = nn.functional.binary_cross_entropy_with_logits(
        extreme, patches[2].float(), weight=inked.expand_as(extreme).float(), reduction="sum"
    ) / (4 * inked.sum())
    named = patches[0].masked_fill(patches[0] == 10, IGNORE).flatten()
    return (
        2 * entropy(digit.flatten(0, 1), named, ignore_index=IGNORE)
        + entropy(colour.flatten(0, 1), patches[1].flatten())
        + sides
        + entropy(count.flatten(0, 1), patches[3].flatten(), ignore_index=IGNORE)
    )


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over answer tokens, the end included."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )
