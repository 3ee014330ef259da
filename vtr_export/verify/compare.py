"""Cases played on the graphs and held against the reference's answers: the gates, in order."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from vtr_export.manifest import Gate
from vtr_export.verify.blame import first_deviation
from vtr_export.verify.case import Array, Case, sampled
from vtr_export.verify.gates import (
    Bars,
    at_least,
    at_most,
    cosines,
    differing,
    failed_to_run,
    worst_difference,
)
from vtr_export.verify.keep_sets import compare as compare_keep_sets
from vtr_export.verify.keep_sets import keep_set_gates, score_gates, tie_gate
from vtr_export.verify.overflow import (
    beyond_in_decoder,
    beyond_in_embeddings,
    beyond_in_features,
)
from vtr_export.verify.play import Inputs, Played, embed, encode, play_forced, play_free
from vtr_export.verify.sessions import GraphError, Parts

T = TypeVar("T")


def compare(parts: Parts, cases: Sequence[Case], bars: Bars) -> list[Gate]:
    """Vision encoder, embedding, then the decoder with the reference's keep-sets and its own.

    Ends early at a graph that does not run. At most one session is open at a time.
    """
    gates: list[Gate] = []
    features = _try(gates, "vision_encoder", lambda: encode(parts, cases))
    if features is None:
        return gates
    seen = _vision_gate(cases, features, bars)
    gates.append(seen if seen.passed else _with(seen, beyond_in_features(parts, cases)))
    inputs = _try(gates, "embed_tokens", lambda: embed(parts, cases, features))
    if inputs is None:
        return gates
    gates += [
        gate if gate.passed else _with(gate, beyond_in_embeddings(parts, inputs))
        for gate in _embedding_gates(inputs)
    ]
    forced = _try(gates, "forced", lambda: play_forced(parts, inputs))
    if forced is not None:
        found = logit_gates("forced", forced, bars)
        gates += _explained(found, parts, inputs, forced, bars) if _all_pass(gates) else found
        gates += score_gates(forced, bars, parts.cut_layers)
    free = _try(gates, "free", lambda: play_free(parts, inputs))
    if free is not None:
        gates += _free_gates(*free, bars, parts.cut_layers)
    return gates


def _all_pass(gates: Sequence[Gate]) -> bool:
    return all(gate.passed for gate in gates)


def _try(gates: list[Gate], name: str, run: Callable[[], T]) -> T | None:
    try:
        return run()
    except GraphError as error:
        gates.append(failed_to_run(name, str(error)))
        return None


def _vision_gate(cases: Sequence[Case], features: Sequence[Array], bars: Bars) -> Gate:
    """By cosine; of tokens that a schedule chose, in a dtype that rounds, by how many are there."""
    if bars.difference is None and cases[0].features.ndim == 2:
        return _chosen_gate(cases, features, bars)
    pairs = [
        (sampled(mine, rows=case.features.ndim == 2), case.features)
        for mine, case in zip(features, cases, strict=True)
    ]
    if any(mine.shape != theirs.shape for mine, theirs in pairs):
        shapes = ", ".join(str(mine.shape) for mine in features)
        return at_least("vision_encoder.cosine", -1, bars.cosine, f"features of shape {shapes}")
    worst = min(float(cosines(mine.reshape(-1), theirs.reshape(-1))) for mine, theirs in pairs)
    return at_least("vision_encoder.cosine", worst, bars.cosine)


def _chosen_gate(cases: Sequence[Case], features: Sequence[Array], bars: Bars) -> Gate:
    """How many of the reference's tokens are among the graph's: rounding may swap near ties."""
    found, asked = 0, 0
    for case, mine in zip(cases, features, strict=True):
        rows = mine.reshape(-1, mine.shape[-1])
        for token in case.features:
            found += bool(len(rows)) and bool(cosines(rows, token[None]).max() >= bars.cosine)
        asked += len(case.features)
    detail = f"{asked - found} of {asked} tokens of the reference are not among the graph's"
    return at_least("vision_encoder.tokens", found / max(asked, 1), bars.overlap, detail)


def _embedding_gates(inputs: Sequence[Inputs]) -> list[Gate]:
    """To the bit; only beside the checkpoint."""
    counts = [
        differing(each.text_embeds, each.case.trace.text_embeds)
        for each in inputs
        if each.case.trace is not None
    ]
    return [at_most("embed_tokens.differences", sum(counts), 0)] if counts else []


def logit_gates(name: str, played: Sequence[Played], bars: Bars) -> list[Gate]:
    """Prefill and decode apart; ``bars`` say what is asked."""
    gates = []
    for phase, part in (("prefill", slice(0, 1)), ("decode", slice(1, None))):
        label = f"{name}.{phase}"
        found = [(_at_ids(each)[:, part], each.case.logits[:, part], each) for each in played]
        worst = [float(np.min(cosines(mine, theirs))) for mine, theirs, _ in found]
        at = int(np.argmin(np.nan_to_num(worst, nan=-2.0)))
        where = f"worst in {found[at][2].case.question.name}"
        gates.append(at_least(f"{label}.cosine", worst[at], bars.cosine, where))
        if bars.difference is not None:
            most = max(worst_difference(mine, theirs) for mine, theirs, _ in found)
            gates.append(at_most(f"{label}.difference", most, bars.difference))
    if bars.top1 is not None:
        agree = np.concatenate([_same_choice(each, bars.near_tie).reshape(-1) for each in played])
        detail = f"{np.count_nonzero(~agree)} of {agree.size} positions choose another token"
        gates.append(at_least(f"{name}.top1", float(agree.mean()), bars.top1, detail))
    return gates


def _at_ids(played: Played) -> Array:
    """The graph's logits that the case knows; NaN where any of a position's is not finite."""
    logits: Array = np.take_along_axis(played.logits, played.case.logit_ids, -1)
    finite = np.isfinite(played.logits).all(-1, keepdims=True)
    return np.where(finite, logits, np.nan)


def _same_choice(played: Played, near_tie: float) -> Array:
    """``[B, 1 + n]``: the same best token, or one the reference scores within rounding of it."""
    case = played.case
    chosen = played.logits.argmax(-1)[..., None]
    best = case.logits[..., :1]
    close = np.abs(case.logits - best) <= near_tie * np.abs(best)
    same: Array = ((case.logit_ids == chosen) & close).any(-1)
    return same


def _explained(
    found: list[Gate],
    parts: Parts,
    inputs: Sequence[Inputs],
    forced: Sequence[Played],
    bars: Bars,
) -> list[Gate]:
    """The first failed gate says where it begins, and what left its range first."""
    failed = [index for index, gate in enumerate(found) if not gate.passed]
    if not failed:
        return found
    why, beyond = first_deviation(parts, inputs, bars), ""
    if parts.dtype != "fp32" or not all(np.isfinite(each.logits).all() for each in forced):
        beyond = beyond_in_embeddings(parts, inputs) or beyond_in_decoder(parts, inputs)
    found[failed[0]] = _with(found[failed[0]], why, beyond)
    return found


def _with(gate: Gate, *why: str) -> Gate:
    """``gate`` with more to say."""
    detail = "; ".join(part for part in (gate.detail, *why) if part)
    return gate.model_copy(update={"detail": detail})


def _free_gates(
    played: Sequence[Played], silent: Sequence[Played], bars: Bars, layers: Sequence[int]
) -> list[Gate]:
    """Keep-sets always; logits where the graph kept what the reference kept."""
    if not played[0].case.kept:
        return logit_gates("free", played, bars)
    rows = [
        row for each in played for row in compare_keep_sets(each.case, each.kept, bars.near_tie)
    ]
    gates = keep_set_gates(rows, bars, layers)
    gates.append(tie_gate(silent[0].case, silent[0].kept, layers))
    same = [each for each in played if _kept_the_same(each)]
    return gates + (logit_gates("free", same, bars) if same else [])


def _kept_the_same(played: Played) -> bool:
    pairs = zip(played.kept, played.case.kept, strict=True)
    return all(differing(mine, theirs) == 0 for mine, theirs in pairs)
