"""A checkpoint in torch as a search needs it: questions in, batches for the reference out."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vtr_export.errors import InputError
from vtr_export.families import read_facts
from vtr_export.reference import (
    Head,
    Held,
    Reference,
    groups_for,
    image_features,
    load_model,
    pad_batch,
    positions_for,
    vision_index_of,
)
from vtr_export.runtime.reader import FOLDER
from vtr_export.schedule import Resolved
from vtr_export.search.evaluators.prompts import Prompts
from vtr_export.search.evaluators.work import Width
from vtr_export.search.questions.calibration import Question

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IMAGES = 16  # encoded at a time
_HASHED = (  # a model folder's own files
    *("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"),
    *(f"{FOLDER}/{kind}" for kind in ("*.json", "*.txt")),
)
Image: TypeAlias = tuple[Path, str]  # and what is read with it


@dataclass(frozen=True)
class Batch:
    """Questions side by side, left-padded, each with its draft behind the prompt."""

    embeds: Tensor  # [B, S, D], or [B, S, (1 + n) D] with planes
    mask: Tensor  # [B, S]
    vision: Tensor  # [B, V]
    groups: Tensor  # [B, S]
    drafted: int  # the last columns; the last token of a draft is not fed
    positions: Tensor  # [B, S], or [3, B, S]
    ahead: Tensor  # [B] what follows stands so far ahead of a count

    @property
    def width(self) -> Width:
        """Its shape, for counting."""
        rows, columns = self.mask.shape
        return Width(rows, columns - self.vision.shape[1], self.vision.shape[1])


class TorchModel:
    """The checkpoint ``folder``, loaded by transformers; features of all images are held."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        self.folder, self.device = folder, device
        self.model: Any = load_model(folder, folder, DTYPES[dtype]).to(device)
        self.facts = read_facts(self.model.config.to_dict(), str(folder / "config.json"))
        if self.facts.crosses:
            raise InputError(
                "a search ranks tokens, and images are keys of cross-attention in this model",
                where=str(folder),
                hint="write the schedule yourself: stages behind its cross layers",
            )
        self.prompts = Prompts(folder)
        self.ends = _end_tokens(self.model)
        self.head = Head(self.model)
        self._features: dict[Image, Tensor] = {}  # → [tokens, D], on the CPU
        self._given: dict[Path, Mapping[str, Any]] = {}  # image → what tells its places
        self._ids: dict[str, tuple[int, ...]] = {}  # question → tokens, its image's among them

    @property
    def embed_tokens(self) -> Any:
        """The table of text tokens."""
        return self.model.get_input_embeddings()

    def reference(self, schedule: Resolved) -> Reference:
        """The decoder under a schedule, with fused attention."""
        decoder = self.model.get_decoder()
        return Reference(decoder, self.head, schedule, attention="sdpa")

    @torch.no_grad()
    def batch(self, questions: Sequence[Question], drafts: Sequence[Sequence[int]] = ()) -> Batch:
        """The questions' embeddings, and ``drafts`` without their last tokens behind them."""
        image_id, pad = self.facts.image_token_id, 0
        assert image_id is not None, "a family without an image token has no prompts"
        asked = [[(path, self.prompts.read(q)) for path in q.images] for q in questions]
        self._encode({image for images in asked for image in images})
        features = [[self._features[image] for image in images] for images in asked]
        rows = [self._tokens(question) for question in questions]
        ids, mask = pad_batch(rows, pad, image_id)
        is_vision = ids == image_id
        vision = vision_index_of(is_vision, mask)
        groups = groups_for(self.model, ids, mask)
        positions, ahead = self._positions(ids, mask, [p for q in questions for p in q.images])
        fed = max((len(draft) - 1 for draft in drafts), default=0)
        tail = torch.tensor([[*draft[:-1], *[pad] * (fed + 1 - len(draft))] for draft in drafts])
        if fed:
            after = (mask.sum(1) + ahead)[:, None] + torch.arange(fed)
            positions = torch.cat((positions, after.expand(*positions.shape[:-1], fed)), -1)
            ids, mask = torch.cat((ids, tail), 1), torch.nn.functional.pad(mask, (0, fed), value=1)
            groups = torch.nn.functional.pad(groups, (0, fed))
        embeds = self.embed_tokens(ids.to(self.device)).clone()
        if any(features):
            flat = torch.cat([one for own in features for one in own])
            places = torch.nn.functional.pad(is_vision, (0, fed))
            embeds = torch.nn.functional.pad(embeds, (0, flat.shape[1] - embeds.shape[2]))
            embeds[places.to(self.device)] = flat.to(embeds)
        mask, vision, groups = (each.to(self.device) for each in (mask, vision, groups))
        positions, ahead = positions.to(self.device), ahead.to(self.device)
        return Batch(embeds, mask, vision, groups, fed, positions, ahead)

    def hold(self, batch: Batch) -> Held:
        """A call before layer 0."""
        anything = self.reference(Resolved(self.facts.layers, self.facts.tokens_per_image, ()))
        inputs = batch.embeds, batch.mask, batch.positions, batch.vision
        return anything.hold(*inputs, groups=batch.groups, drafted=batch.drafted)

    def _positions(
        self, ids: Tensor, mask: Tensor, images: Sequence[Path]
    ) -> tuple[Tensor, Tensor]:
        """As the model's own rule gives them."""
        grids = [self._given[path]["image_grid_thw"] for path in images if self._given[path]]
        given = {"image_grid_thw": np.concatenate(grids)} if grids else None
        return positions_for(self.model, ids, mask, given)

    def _tokens(self, question: Question) -> tuple[int, ...]:
        if question.sha256 not in self._ids:
            self._ids[question.sha256] = self.prompts.ids(question)
        return self._ids[question.sha256]

    @torch.no_grad()
    def _encode(self, images: Collection[Image]) -> None:
        """Features ``[tokens, D]`` of each image, made when it is first asked for."""
        new = sorted(image for image in images if image not in self._features)
        at_once = 1 if any(read for _, read in new) else IMAGES  # unlike questions have no width
        for start in range(0, len(new), at_once):
            some = new[start : start + at_once]
            parts = [self.prompts.image(*image).given for image in some]
            given = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            places = ("image_grid_thw",)
            self._given |= {
                path: {name: part[name] for name in places if name in part}
                for (path, _), part in zip(some, parts, strict=True)
            }
            features = image_features(self.model, given, self.device)
            counts = [self.prompts.seen(path).tokens for path, _ in some]
            for image, own in zip(some, torch.split(features, counts), strict=True):
                self._features[image] = own.cpu()


def describe(folder: Path, device: str, dtype: str, max_new_tokens: int) -> dict[str, str]:
    """What answers depend on: the model, the precision, and how long an answer may be."""
    return {
        "evaluator": "reference",
        "model": hash_folder(folder),
        "dtype": dtype,
        "device": device.partition(":")[0],
        "max_new_tokens": str(max_new_tokens),
    }


def hash_folder(folder: Path) -> str:
    """Sha256 of a model folder: weights, configuration, tokenizer, chat template, every byte."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _HASHED for file in folder.glob(pattern)}):
        with file.open("rb") as content:
            digest.update(
                f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()


def _end_tokens(model: Any) -> tuple[int, ...]:
    """What ends an answer, by the generation config or else the model's."""
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)
    return ()
