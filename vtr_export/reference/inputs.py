"""From token ids and images to what the decoder takes, batches included."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import Kosmos2Model

from vtr_export.reference.cut import positions_of
from vtr_export.reference.layered import Embeddings

Given: TypeAlias = Tensor | Mapping[str, Tensor | NDArray[Any]]


def pad_batch(
    rows: Sequence[Sequence[int]], pad_id: int, image_token_id: int
) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, S]``, left-padded to max(text) + max(vision)."""
    vision = [sum(token == image_token_id for token in row) for row in rows]
    text = [len(row) - count for row, count in zip(rows, vision, strict=True)]
    length = max(text) + max(vision)
    ids = [[pad_id] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def vision_index_of(is_vision: Tensor, mask: Tensor) -> Tensor:
    """``[B, V]``: columns of the vision tokens; rows with fewer begin with their leftmost pads.

    ``mask`` ``[B, S]`` is of this call's columns.
    """
    width = int(is_vision.sum(1).max())
    rows = []
    for vision, real in zip(is_vision, mask, strict=True):
        columns, pads = vision.nonzero()[:, 0], (real == 0).nonzero()[:, 0]
        missing = width - len(columns)
        if missing > len(pads):
            raise ValueError("a row lacks pads: left-pad to max(text) + max(vision tokens)")
        rows.append(torch.cat((pads[:missing], columns)))
    return torch.stack(rows)


def positions_for(
    model: Any, input_ids: Tensor, attention_mask: Tensor, given: Given | None
) -> tuple[Tensor, Tensor]:
    """``position_ids`` of a first call, and by how much ``[B]`` what follows is ahead of a count.

    Where transformers' model has its own rule for places of images, that rule.
    """
    rule = getattr(getattr(model, "model", model), "get_rope_index", None)
    if rule is None and model.config.model_type == "kosmos-2":
        return _tabled(model.get_decoder().embed_positions, attention_mask)
    if rule is None:
        return _counted(model, input_ids, attention_mask)
    is_image = (input_ids == model.config.image_token_id).int()
    grids = given.get("image_grid_thw") if isinstance(given, Mapping) else None
    grids = None if grids is None else torch.as_tensor(grids)
    asked = {"mm_token_type_ids": is_image, "image_grid_thw": grids}
    known = {name: asked[name] for name in asked.keys() & signature(rule).parameters.keys()}
    ids, ahead = rule(input_ids, attention_mask=attention_mask, **known)
    return ids, ahead[:, 0]


def _tabled(table: Any, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """By the rule of a table of positions, which tells pads by their id."""
    pad = table.padding_idx
    words = torch.where(attention_mask == 0, pad, pad + 1)
    ids = table.create_position_ids_from_input_ids(words, pad)
    return ids, (ids - positions_of(attention_mask))[:, -1]


def _counted(model: Any, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens before each, from where the model begins to count."""
    counted = positions_of(attention_mask)
    asked = {"attention_mask": attention_mask, "position_ids": counted, "is_first_iteration": True}
    ids = model.prepare_inputs_for_generation(input_ids, **asked).get("position_ids")
    ids = counted if ids is None else ids
    return ids, (ids - counted)[:, -1]


def groups_for(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """``[B, S]``: tokens of one number see each other in a first call; 0: only what came before.

    Read off the mask that transformers' model makes itself; ValueError for any other mask. -1 is
    a token that experts of its own take, as ERNIE 4.5 VL's processor says.
    """
    if model.config.model_type == "ernie4_5_vl_moe":
        config = model.config
        ends = config.image_start_token_id, config.image_end_token_id
        apart = torch.tensor([config.image_token_id, *ends], device=input_ids.device)
        return -(torch.isin(input_ids, apart) & (attention_mask != 0)).long()
    rule = getattr(model, "create_masks_for_generate", None)
    known = signature(rule).parameters if rule is not None else {}
    types = (input_ids == model.config.image_token_id).int()
    if model.config.model_type == "paligemma":  # whose types tell a prompt (0) from an answer (1)
        types = torch.zeros_like(types)
    if "mm_token_type_ids" in known:
        made = _handed_masks(model, input_ids, attention_mask, types)
    elif rule is not None and "token_type_ids" in known:
        made = _generated_masks(model, input_ids, attention_mask, types)
    else:
        return torch.zeros_like(input_ids)
    real = attention_mask != 0
    found = [
        _groups_of(mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0, real)
        for mask in (made.values() if isinstance(made, Mapping) else [made])
    ]
    if model.config.model_type == "gemma4":  # only layers with a window see images whole
        found = [groups for groups in found if groups.any()] or found
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise ValueError("layers of unlike kinds see unlike tokens")
    return found[0]


def _generated_masks(model: Any, input_ids: Tensor, attention_mask: Tensor, types: Tensor) -> Any:
    """Those that ``generate`` makes."""
    return model.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.zeros(*input_ids.shape, 1, dtype=model.dtype, device=input_ids.device),
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=positions_of(attention_mask),
        token_type_ids=types,
    )


class _HeardEnoughError(Exception):
    """Leaves a call that was only asked for something on its way."""


def _handed_masks(model: Any, input_ids: Tensor, attention_mask: Tensor, types: Tensor) -> Any:
    """Those that the model's own ``forward`` hands its decoder."""
    decoder, heard = model.get_decoder(), list[Any]()
    own = decoder.forward

    def listen(*_: Any, **given: Any) -> None:
        heard.append(given["attention_mask"])
        raise _HeardEnoughError

    decoder.forward = listen
    try:
        with suppress(_HeardEnoughError), torch.no_grad():
            model.model(input_ids=input_ids, attention_mask=attention_mask, mm_token_type_ids=types)
    finally:
        decoder.forward = own
    return heard[0]


def _groups_of(seen: Tensor, real: Tensor) -> Tensor:
    """Those of a mask ``seen`` ``[B, S, S]``, numbered in order, where it is causal otherwise."""
    columns = torch.arange(seen.shape[-1], device=seen.device)
    mutual = seen & seen.transpose(1, 2) & real[:, None, :] & real[:, :, None]
    first, grouped = mutual.int().argmax(-1), mutual.sum(-1) > 1
    begins = (first == columns) & grouped
    groups = torch.where(grouped, begins.cumsum(-1).gather(-1, first), 0)
    before = (columns[None, :] <= columns[:, None]) & real[:, None, :]
    same = (groups[:, None, :] == groups[:, :, None]) & grouped[:, None, :]
    if not torch.equal((before | same)[real], (seen & real[:, None, :])[real]):
        raise ValueError("the model's mask is not causal but for groups of tokens")
    return groups


@torch.no_grad()
def image_features(model: Any, given: Given, device: str | torch.device = "cpu") -> Tensor:
    """``[tokens, D]`` of all images, by transformers' own encoder.

    Where it gives planes for later layers (DeepStack), they stand behind: ``[tokens, (1 + n) D]``.

    ``given`` is what its processor made of them, by its names; or the pixel values alone.
    """
    given = {"pixel_values": given} if isinstance(given, Tensor) else given
    inputs = {name: torch.as_tensor(values).to(device) for name, values in given.items()}
    inputs = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    if model.config.model_type == "mllama":  # which has no accessor
        seen = model.model.vision_model(**inputs).last_hidden_state
        return _one_row(model.model.multi_modal_projector(seen))
    if model.config.model_type == "idefics":
        seen = model.model.vision_model(**inputs).last_hidden_state
        resample = getattr(model.model, "perceiver_resampler", None)
        return _one_row(seen if resample is None else resample(seen))
    own = getattr(model, "get_image_features", None) or getattr(model, "get_video_features", None)
    if model.config.model_type == "kosmos-2":
        own = partial(Kosmos2Model.get_image_features, model)
    said = (own or model.model.get_image_features)(**inputs)
    if (over := _over_layers(said)) is not None:
        first = over.pop(0, torch.zeros_like(next(iter(over.values()))))
        entering = first / model.get_decoder().embedding_multiplier  # which layer 0's rows pass
        return torch.cat([entering, *over.values()], -1)
    rows = said.last_hidden_state if said.pooler_output is None else said.pooler_output
    if model.config.model_type == "llama4":  # its forward projects what its accessor gives
        rows = model.multi_modal_projector(rows)
    all_of_them = [rows, *(getattr(said, "deepstack_features", None) or ())]
    found = torch.cat([_one_row(each) for each in all_of_them], -1)
    if model.config.model_type == "molmo2":  # adds them to the words at their places
        found = found + model.get_input_embeddings().weight[model.config.image_token_id]
    return found


def _over_layers(said: Any) -> dict[int, Tensor] | None:
    """Features by the layer before which they are added, ascending; None where they are not so."""
    found = getattr(said, "deepstack_features", None) or ()
    if not found or isinstance(found[0], Tensor) or not isinstance(found[0][0], int):
        return None
    return {layer: _one_row(rows) for layer, rows in sorted(dict(found).items())}


def _behind_each_layer(model: Any, features: Tensor) -> Tensor:
    """A plane behind every layer up to the last that has one, zeros where there is none."""
    layers = {layer for _, layer in getattr(model.config, "deepstack_layer_map", None) or ()}
    layers |= set(getattr(model.config, "spatial_target_layers", None) or ())
    if not layers:
        return features
    first, *planes = features.chunk(1 + len(layers - {0}), -1)
    laid = {0: first, **dict(zip(sorted(layers - {0}), planes, strict=True))}
    nothing = torch.zeros_like(first)
    return torch.cat([laid.get(layer, nothing) for layer in range(max(layers) + 1)], -1)


def _one_row(found: Tensor | Sequence[Tensor]) -> Tensor:
    """``[tokens, D]`` of all images."""
    parts = [found] if isinstance(found, Tensor) else list(found)
    return torch.cat([part.flatten(0, -2) for part in parts])


def embeddings(model: Any) -> nn.Module:
    """Token ids to what the decoder takes of words.

    Gemma 4 has embeddings of a token for each layer, which stand behind: ``[B, S, D + L P]``.
    """
    table: nn.Module = model.get_input_embeddings()
    per_layer = getattr(model.get_decoder(), "embed_tokens_per_layer", None)
    return table if per_layer is None else Embeddings(model, table, per_layer)


@torch.no_grad()
def embed(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    given: Given | None,
    features: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``inputs_embeds`` ``[B, S, D]`` with the image features in place, and ``vision_index``.

    ``features`` ``[tokens, D]`` stand in place of those of ``given``, where it was reduced.

    Planes stand behind, ``[B, S, (1 + n) D]``, and are zeros at text.

    ``model`` is a transformers vision-language model; images are in reading order of the batch.
    ``attention_mask`` may begin with the past.
    """
    is_vision = input_ids == model.config.image_token_id
    table = model.get_input_embeddings()
    words = table.num_embeddings + getattr(table, "num_additional_embeddings", 0)
    known = input_ids.clamp(max=words - 1)  # an image's id may lie behind them
    embeds: Tensor = embeddings(model)(known)
    if features is None and given is not None and len(given):
        features = _behind_each_layer(model, image_features(model, given))
    if features is not None:
        features = features.to(embeds.dtype)
        embeds = functional.pad(embeds, (0, max(features.shape[1] - embeds.shape[2], 0)))
        embeds[..., : features.shape[1]][is_vision] = features
    return embeds, vision_index_of(is_vision, attention_mask[:, -input_ids.shape[1] :])
