"""The cut decoder beside the given one: what must say the same."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx_ir as ir

from vtr_export.errors import GateError, InputError
from vtr_export.manifest import Gate
from vtr_export.passes.hide_keys import HideKeys
from vtr_export.retrofit.canonical import Decoder
from vtr_export.retrofit.cut import GRAPH, Request, with_cuts
from vtr_export.retrofit.player import BARS, Player, compare, conversations, hidden, last_rows
from vtr_export.retrofit.probe import Array
from vtr_export.schedule import Cut, Keep, Resolved
from vtr_export.schedule_document import Threshold

VOCABULARY: Final = 32  # ids of random prompts; every vocabulary has as many


def gates_of(request: Request, decoder: Decoder, schedule: Resolved, staging: Path) -> list[Gate]:
    """The given decoder, ours without cuts, ours with cuts that keep all, the cut one."""
    plainly = replace(request, image_token_id=None, vision_mask=False, tunable=False)
    cuts = tuple(Cut(cut.before_layer, Keep(1, 1)) for cut in schedule.cuts)
    nothing = None if schedule.threshold is None else Threshold(whole=0, single=0)
    every = replace(schedule, cuts=cuts, threshold=nothing)
    given = Player(request.onnx, decoder.original_inputs, decoder.carried)
    token = None if request.vision_mask else request.image_token_id
    image = request.image_tokens, token
    asked = [
        calls
        for calls in conversations(_width(decoder), VOCABULARY, *image)
        if given.takes(len(calls[0]["attention_mask"]))
    ]
    bar = BARS.get(given.dtype, max(BARS.values()))
    expected = given.play(asked)
    del given
    with _beside(with_cuts(decoder, None, plainly), staging) as file:
        plain = _player(file).play(asked)
    gates = [compare("canonical", expected, plain, bar)]
    if schedule.cuts:
        with _beside(with_cuts(decoder, every, plainly), staging) as file:
            gates.append(compare("keep_all", plain, _player(file).play(asked), bar))
        gates += _compare_cut(request, decoder, schedule, staging, asked, bar)
    for gate in gates:
        if not gate.passed:
            raise GateError(
                f"{gate.name}: the rewritten decoder differs by {gate.measured:.3g} of its largest "
                f"logit, more than {gate.bar:g} ({gate.detail}); nothing was published",
                where=str(request.onnx),
                hint="report the graph; vtr inspect shows what was found in it",
            )
    return gates


def _compare_cut(
    request: Request,
    decoder: Decoder,
    schedule: Resolved,
    staging: Path,
    asked: list[list[dict[str, Array]]],
    bar: float,
) -> list[Gate]:
    """The published decoder beside one that hides what it drops, and drops nothing.

    Not for positions that are numbered anew, budgets that are an input, and dropped tokens of which
    something is made.
    """
    if request.tunable or schedule.positions == "repacked" or schedule.merge is not None:
        return []
    player = _player(staging / GRAPH)
    found = last_rows(player.play(asked))
    told, firsts = hidden(asked, player.kept), [cut.before_layer for cut in schedule.cuts]
    plainly = replace(request, image_token_id=None, vision_mask=False)
    with _beside(with_cuts(decoder, None, plainly, HideKeys(firsts)), staging) as file:
        expected = last_rows(_player(file).play(told))
    return [compare("dropped_as_hidden", expected, found, bar)]


@contextmanager
def _beside(model: ir.Model, staging: Path) -> Iterator[Path]:
    """A graph on the weights that are there, for as long as it is compared."""
    with tempfile.NamedTemporaryFile(dir=staging, suffix=".onnx", delete=False) as file:
        path = Path(file.name)
    saved = ir.load(staging / GRAPH).graph.initializers
    for name, value in model.graph.initializers.items():
        if name in saved:
            value.const_value = saved[name].const_value
    try:
        ir.save(model, path)
        yield path
    finally:
        path.unlink()


def _player(file: Path) -> Player:
    """On a graph of ours."""
    graph = ir.load(file).graph
    carried = {}
    for value in graph.inputs:
        name = value.name or ""
        if name.startswith("past_key_values."):
            carried[name] = name.replace("past_key_values", "present")
        elif name.startswith("past_mask."):
            carried[name] = name.replace("past_mask", "present_mask")
    return Player(file, {}, carried)


def _width(decoder: Decoder) -> int | None:
    """How wide an embedding is, where the decoder takes embeddings."""
    if any(role == "input_ids" for role in decoder.original_inputs.values()):
        return None
    source = next(v for v in decoder.model.graph.inputs if v.name == "inputs_embeds")
    width = source.shape[-1] if source.shape is not None else None
    if not isinstance(width, int):
        raise InputError(
            "the width of inputs_embeds is not in its shape",
            hint="declare it in the graph's input, or publish without comparing (--no-verify)",
        )
    return width
