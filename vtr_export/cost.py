"""What prefill and decode cost: the four counting rules in use, and what our graph computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.reductions import Tower, VisionReduction
from vtr_export.schedule import Resolved
from vtr_export.schedule_document import Correlate, Recycle


@dataclass(frozen=True)
class Rows:
    """Tokens of one decoder layer: ``entering`` it, and ``leaving`` its attention for the MLP.

    They differ in the layer before a cut with ``drop_point: inside`` or ``attended``. ``past``
    tokens are in the layer's cache already and are only attended to. ``keys`` of images are
    attended to in place of the layer's own tokens, where it crosses. o_proj runs on ``projected``
    rows, where they are more than those that leave.
    """

    entering: int
    leaving: int
    past: int = 0
    keys: int | None = None
    projected: int | None = None

    @property
    def mixed(self) -> int:
        """Rows of o_proj."""
        return self.leaving if self.projected is None else self.projected

    @property
    def new_keys(self) -> int:
        """Keys that are projected."""
        return self.entering if self.keys is None else self.keys

    def step(self, done: int) -> "Rows":
        """A token decoded after ``done`` others."""
        if self.keys is None:
            return Rows(1, 1, past=self.entering + done)
        return Rows(1, 1, past=self.keys, keys=0)


def layer_rows(resolved: Resolved, vision_tokens: int, text_tokens: int) -> tuple[Rows, ...]:
    """Rows per decoder layer of one prompt, whose images have ``vision_tokens`` unreduced."""
    keeps = resolved.keep_per_layer(resolved.entering(vision_tokens))
    if resolved.crosses:
        return tuple(
            Rows(text_tokens, text_tokens, keys=keep if layer in resolved.crosses else None)
            for layer, keep in enumerate(keeps)
        )
    tokens = [v + text_tokens for v in keeps]
    after = tokens if resolved.drop_point == "between" else [*tokens[1:], tokens[-1]]
    pairs = zip(tokens, after, strict=True)
    is_attended = resolved.drop_point == "attended"
    return tuple(Rows(*pair, projected=pair[0] if is_attended else None) for pair in pairs)


def decode_rows(resolved: Resolved, vision_tokens: int, text_tokens: int) -> tuple[Rows, ...]:
    """Rows whose ``entering`` is what a layer's cache holds when decoding begins."""
    rows = layer_rows(resolved, vision_tokens, text_tokens)
    if not resolved.compacts:
        return rows
    first, left = resolved.cuts[0].before_layer, rows[-1].entering
    return (*rows[:first], *(replace(row, entering=left) for row in rows[first:]))


def without_cuts(resolved: Resolved) -> Resolved:
    """The same model, unpruned and unreduced."""
    return replace(resolved, cuts=(), vision=(), tower=None, decode=())


def _macs(facts: ModelFacts, rows: Rows, mlp_matrices: int) -> int:
    """Multiply-adds of one layer: projections, attention of all rows to all keys, MLP."""
    n, a, d = rows.entering, rows.leaving, facts.hidden
    q, kv = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    projections = n * d * q + rows.new_keys * d * 2 * kv + rows.mixed * q * d
    attention = 2 * n * (rows.past + rows.new_keys) * q
    return projections + attention + mlp_matrices * a * d * facts.intermediate


def _f_a(facts: ModelFacts, rows: Rows) -> int:
    return _macs(facts, rows, 3 if facts.gated else 2)


def _f_b(facts: ModelFacts, rows: Rows) -> int:
    return _macs(facts, rows, 2)


def _f_c(facts: ModelFacts, rows: Rows) -> int:
    return 2 * _f_a(facts, rows)


def _f_d(facts: ModelFacts, rows: Rows) -> int:
    """Knows nothing of key-value heads or the MLP's width: m = 4d, 24nd² + 4n²d."""
    n, a, k, d = rows.entering, rows.leaving, rows.new_keys, facts.hidden
    return (2 * n + 4 * k + 2 * rows.mixed + 16 * a) * d * d + 4 * n * (rows.past + k) * d


@dataclass(frozen=True)
class Convention:
    """A way to count a decoder layer, from its facts and rows; ``formula`` is its prefill's."""

    name: str
    unit: str
    formula: str
    users: str
    layer: Callable[[ModelFacts, Rows], int]


_MACS: Final = "multiply-adds, published as FLOPs"
_LAYER_RULES: Final = (
    Convention("F-A", _MACS, "4nd² + 2n²d + 3ndm", "PyramidDrop, SparseVLM, FitPrune", _f_a),
    Convention("F-B", _MACS, "4nd² + 2n²d + 2ndm", "FastV, DivPrune", _f_b),
    Convention("F-C", "FLOPs", "2 (4nd² + 2n²d + 3ndm)", "FiCoCo, LLM-Viewer", _f_c),
    Convention("F-D", "FLOPs", "24nd² + 4n²d", "VisPCO's text", _f_d),
    Convention(
        "exact",
        "FLOPs",
        "2 (4nd² + 2n²d + 3ndm), the cuts' scores and the last position's logits",
        "what the exported graph computes; matrix products only",
        _f_c,
    ),
)
# n rows, d width, m MLP width. Grouped key-value heads narrow k and v (F-A to F-C, exact), an MLP
# without gate has two matrices (F-A, F-C, exact). F-A to F-D know no cut, logits or embedding. The
# papers count prefill alone; a decode step is the same layer with one row and a cache.
CONVENTIONS: Final[Mapping[str, Convention]] = {rule.name: rule for rule in _LAYER_RULES}


def get_convention(name: str) -> Convention:
    """A counting rule by name."""
    if (convention := CONVENTIONS.get(name)) is None:
        raise InputError(f"no convention {name!r}", hint=f"one of: {', '.join(CONVENTIONS)}")
    return convention


def prefill_cost(
    facts: ModelFacts, resolved: Resolved, vision_tokens: int, text_tokens: int, convention: str
) -> int:
    """The decoder's prefill of one prompt, in the convention's unit."""
    rule = get_convention(convention)
    rows = layer_rows(resolved, vision_tokens, text_tokens)
    total = sum(rule.layer(facts, row) for row in rows)
    if rule.name == "exact":
        cuts = cut_flops(facts, resolved, vision_tokens, text_tokens)
        total += sum(cuts) + 2 * facts.hidden * facts.vocab
    return total


def decode_cost(
    facts: ModelFacts,
    resolved: Resolved,
    vision_tokens: int,
    text_tokens: int,
    steps: int,
    convention: str,
) -> int:
    """``steps`` tokens decoded one by one after the prefill, in the convention's unit.

    Each layer's cache begins with the tokens that entered it, or what a compaction leaves of them,
    and grows by one a step; a step cuts nothing. ``exact`` adds the logits of every step.
    """
    rule = get_convention(convention)
    total = 0
    for row in decode_rows(resolved, vision_tokens, text_tokens):
        first, last = (rule.layer(facts, row.step(done)) for done in (0, steps - 1))
        total += steps * (first + last) // 2  # each step costs as much more as the one before
    return total + (2 * facts.hidden * facts.vocab * steps if rule.name == "exact" else 0)


def ideal_speedup(
    facts: ModelFacts, resolved: Resolved, vision_tokens: int, text_tokens: int
) -> float:
    """Prefill FLOPs unpruned by pruned, counted ``exact`` on both sides."""
    whole, pruned = (
        prefill_cost(facts, r, vision_tokens, text_tokens, "exact")
        for r in (without_cuts(resolved), resolved)
    )
    return whole / pruned


def cut_flops(
    facts: ModelFacts, resolved: Resolved, vision_tokens: int, text_tokens: int
) -> tuple[int, ...]:
    """FLOPs that each cut adds.

    Its query rows meet all keys; with ``from: next`` they are projected, and so are the keys of
    the tokens then dropped. ``query: text`` counts all ``text_tokens`` as rows, an upper bound.
    Other rules, and a merge by correlation, ask all vision rows too; the merge multiplies what
    text gives to each two tokens, and what each gives to each with their hidden states. Raters
    are found by all vision and all text tokens, once; recycled tokens are measured by each other,
    and their means are a product with all vision tokens.
    """
    vision_tokens = resolved.entering(vision_tokens)
    keeps = (vision_tokens, *resolved.behind_cuts(vision_tokens))
    rows = text_tokens if resolved.query != "last" else 1
    merges = isinstance(resolved.merge, Correlate)
    q, kv = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    costs: list[int] = []
    for cut, (before, after) in zip(resolved.cuts, pairwise(keeps), strict=True):
        asking = rows + before * resolved.asks_all
        cost = 2 * asking * (before + text_tokens * (not resolved.crosses)) * q
        cost += 2 * before**2 * (rows + facts.hidden) * merges
        anew = before - after
        if isinstance(resolved.merge, Recycle):
            recycled, clusters = resolved.merge.of(before - cut.keep.of(vision_tokens))
            cost += 2 * facts.hidden * (recycled**2 + clusters * before)
            anew = before + text_tokens
        if resolved.source == "next":
            cost += 2 * facts.hidden * (rows * q + anew * kv)
        if resolved.query == "raters" and not costs:
            cost += 2 * facts.hidden * vision_tokens * text_tokens
        costs.append(cost if vision_tokens else 0)
    return tuple(costs)


def vision_flops(facts: ModelFacts, images: int, resolved: Resolved | None = None) -> int:
    """FLOPs of the encoder's layers that run, and of the projector, for ``images`` images.

    With ``resolved`` also of its reductions before the decoder, and of fewer tokens to project.
    0 where an image's tokens vary.
    """
    vision = facts.vision
    if vision is None or facts.tokens_per_image is None:
        return 0
    if vision.tokens is None or vision.image_size is None:
        return 0
    n, d, m = vision.tokens, vision.hidden, vision.intermediate
    patches = (vision.image_size // vision.patch_size) ** 2
    macs = patches * vision.channels * vision.patch_size**2 * d
    macs += vision.layers_run * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    tokens, flops = facts.tokens_per_image, 0
    if resolved is not None and resolved.tower is not None:
        tokens, flops = resolved.entering(tokens), _reduction_flops(resolved.vision, resolved.tower)
    macs += tokens * facts.projector_macs
    return (2 * macs + flops) * images


def _reduction_flops(reductions: Sequence[VisionReduction], tower: Tower) -> int:
    """What reductions of one image compute themselves, and save in the tower."""
    total = 0
    for reduction in reductions:
        total += reduction.flops(tower)
        tower = reduction.leaves(tower)
    return total
