"""Drop vision tokens where a schedule says so."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis import Site, find_layers, find_sites, label_axes, token_seeds
from vtr_export.analysis.axes import symbol
from vtr_export.analysis.layers import descendants
from vtr_export.errors import AnalysisError
from vtr_export.passes.build import Build, renamed, replay
from vtr_export.schedule import Resolved
from vtr_export.schedule_document import Correlate, Recycle


@dataclass
class Stage:
    """What the layers between two cuts run on.

    ``padding`` [B,T] tells real keys, ``current`` [B,S] real rows, ``groups`` [B,S] who else sees
    each other (None: nobody), ``marks`` [B,S] who is protected, ``raters`` [B,S] the weights of who
    ranks; ``streams`` maps the unpruned graph's values to this stage's.
    """

    hidden: ir.Value
    padding: ir.Value
    current: ir.Value
    vision_index: ir.Value
    groups: ir.Value | None
    marks: ir.Value | None = None
    raters: ir.Value | None = None
    streams: dict[ir.Value, ir.Value] = field(default_factory=dict)


class InsertCuts(ir.passes.InPlacePass):
    """Keep only the best vision tokens from each scheduled layer on.

    Before::

        layer_2(hidden, cos, sin, mask)

    After::

        hidden', kept, vision_index' = vtr.VtrTopKPrune(
            query, keys, mask, vision_index, keep, budget, hidden)
        layer_2(hidden', VtrNarrow(cos, kept), VtrNarrow(sin, kept), mask')
    """

    def __init__(self, schedule: Resolved, *, tunable: bool = False) -> None:
        self.schedule, self.tunable = schedule, tunable

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find every cut first, then edit: a graph that cannot be cut stays as it was."""
        if not self.schedule.cuts:
            return ir.passes.PassResult(model, modified=False)
        _check(model.graph)
        if self.schedule.positions == "repacked":
            _check_positions(model.graph)
        labels = label_axes(model.graph, token_seeds(model.graph))
        sites = find_sites(find_layers(model.graph, labels), labels, self.schedule)
        if sites:
            _Surgeon(model, self.schedule, _softcap(sites), self.tunable).operate(sites)
        return ir.passes.PassResult(model, modified=bool(sites))


def _check(graph: ir.Graph) -> None:
    """AnalysisError for what is no decoder of any length, or has cuts already."""
    inputs = {value.name: value for value in graph.inputs}
    for name in ("inputs_embeds", "attention_mask", "position_ids"):
        if name not in inputs:
            raise AnalysisError(f"the graph has no input {name}", hint="give it a decoder")
    if any(ops.is_cut(node) for node in graph):
        raise AnalysisError("the graph has cuts already", hint="cut the graph without cuts")
    if symbol(inputs["inputs_embeds"]) is None:
        raise AnalysisError(
            "the graph takes a fixed number of tokens",
            where="input inputs_embeds",
            hint="export it with a symbolic dimension for the sequence",
        )


def _check_positions(graph: ir.Graph) -> None:
    """AnalysisError unless all that knows positions follows from one row of them."""
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    if positions.shape is not None and len(positions.shape) != 2:
        why = "position_ids has several components (mRoPE)"
    elif not positions.uses():
        why = "nothing follows from position_ids"
    else:
        return
    raise AnalysisError(
        f"positions cannot be repacked: {why}",
        where="input position_ids",
        hint="use positions: original",
    )


def _softcap(sites: Sequence[Site]) -> float | None:
    """What bends the logits of all layers that are asked."""
    first, *others = {site.scored.softcap: site.scored for site in sites}.values()
    for other in others:
        raise AnalysisError(
            f"layer {first.index} and layer {other.index} bend their logits by unlike softcaps",
            where=f"node {other.attention.name!r}",
            hint="rank all cuts by layers that are alike",
        )
    return first.softcap


def _by_blocks(schedule: Resolved, scale: float) -> tuple[str, dict[str, float | str]]:
    """The cut that looks at all vision rows, or "" where few rows rank; and what its node says."""
    said: dict[str, float | str] = {"scale": scale}
    merge = schedule.merge if isinstance(schedule.merge, Correlate) else None
    if schedule.rule == "attention" and merge is None:
        return "", said
    said |= {name: getattr(schedule, name) for name in ("rule", "query", "heads", "rank")}
    if merge is None:
        return ops.SCORED, said
    return ops.CORRELATE, said | {"direct": merge.direct, "nearest": merge.nearest}


def _by_raters(schedule: Resolved, scale: float) -> tuple[str, dict[str, float | str]]:
    """The cut of SparseVLM, or "" for none of its kind; and what its node says."""
    said: dict[str, float | str] = {"scale": scale}
    rates = schedule.query == "raters"
    if not isinstance(merge := schedule.merge, Recycle):
        return (ops.RATERS if rates else ""), said
    share = Fraction(merge.share)
    said |= {"numerator": share.numerator, "denominator": share.denominator, "each": merge.each}
    return (ops.RATER_RECYCLE if rates else ops.RECYCLE), said


class _Surgeon:
    """One operation on one model."""

    def __init__(
        self, model: ir.Model, schedule: Resolved, softcap: float | None, tunable: bool
    ) -> None:
        self.graph, self.schedule = model.graph, schedule
        # a row of fewer tokens may lose more of them to a later cut than the widest row does
        self.is_ragged = schedule.tokens_per_image is None and len(schedule.cuts) > 1
        if schedule.threshold is not None:  # each row by its own, from the first cut on
            self.is_ragged = True
        said = schedule.query, schedule.heads, schedule.rank
        choice = ops.Choice(*said, self.is_ragged, softcap, schedule.rule)
        self.build = Build(model, choice)
        self.inputs = {value.name: value for value in model.graph.inputs}
        self.positions = self.inputs["position_ids"]
        self.tokens = str(symbol(self.inputs["inputs_embeds"]))
        self.total = symbol(self.inputs["attention_mask"]) or "total"
        self.past = ""
        self.positional = descendants(self.positions)
        self.embedded = descendants(self.inputs["inputs_embeds"])
        self.keep = (
            self.build.graph_input("keep", [len(schedule.cuts)], ir.DataType.INT64)
            if tunable
            else None
        )

    def operate(self, sites: list[Site]) -> None:
        """Build a narrower stage behind each site, then move every node onto its stage."""
        self.past = symbol(sites[0].scored.past_key, 2) or "past"
        stages = [self._first(sites)]
        for number, site in enumerate(sites):
            stages.append(self._cut(number, site, stages[-1]))
        for node in [node for site in sites[:1] for node in site.after]:
            number = sum(node in site.after for site in sites)
            for index, value in enumerate(node.inputs):
                if value in stages[number].streams:
                    node.replace_input_with(index, stages[number].streams[value])
            for value in node.outputs:
                value.shape = renamed(value.shape, number, (self.tokens, self.past, self.total))
        self._name_pasts(sites)

    def _first(self, sites: list[Site]) -> Stage:
        build, hidden, padding = (
            self.build,
            self.inputs["inputs_embeds"],
            self.inputs["attention_mask"],
        )
        vision_index = build.graph_input("vision_index", ["batch", "vision"], ir.DataType.INT64)
        build.prefix = "cut"
        length = build.op("Shape", [hidden], "length", start=1, end=2)
        current = build.call("VtrTail", [padding, length], "current")
        self.count = build.call("VtrVisionCount", [padding, vision_index, hidden], "count")
        self.width = build.op("Shape", [vision_index], "width", start=1, end=2)
        masks = [mask for site in sites for mask in (site.scored.mask, *site.masks)]
        groups = next(filter(None, map(ops.groups_of, masks)), None)
        marks, raters = self._marks(vision_index, hidden), self._raters(vision_index, sites)
        return Stage(hidden, padding, current, vision_index, groups, marks, raters)

    def _cut(self, number: int, site: Site, stage: Stage) -> Stage:
        build = self.build
        build.prefix = f"cut.{site.cut.before_layer}"
        past = build.graph_input(
            f"past_mask.{number}", ["batch", f"{self.past}_{number + 1}"], ir.DataType.INT64
        )
        keep, budget = self._budgets(number, site)
        entry = stage.streams.get(site.entry, site.entry)
        query, keys, mask, wide_key = self._scored(site, stage, past)
        asked = [query, keys, mask, stage.vision_index, keep, budget]
        hidden, kept, vision_index = self._pruned(asked, entry, stage, site.scored.scale)
        hidden.type = site.entry.type
        hidden.shape = renamed(site.entry.shape, number + 1, (self.tokens,))
        current = build.call("VtrNarrow", [stage.current, kept], "current")
        if self._may_lack(number):
            current = build.call("VtrAlive", [current, kept], "alive")
        padding = build.op("Concat", [past, current], "padding", axis=1)
        groups = None
        if stage.groups is not None:
            groups = build.call("VtrNarrow", [stage.groups, kept], "groups")
            if self._may_lack(number):  # what stands in for a pad belongs to nobody
                groups = build.call("VtrAlive", [groups, kept], "alive_groups")
        marks = stage.marks
        if marks is not None:
            marks = build.call("VtrNarrow", [marks, kept], "marks")
        raters = stage.raters
        if raters is not None:
            raters = build.call("VtrNarrow", [raters, kept], "raters")
        new = Stage(hidden, padding, current, vision_index, groups, marks, raters)
        new.streams = self._narrow(site, stage, new, kept)
        if wide_key is not None:
            new.streams[site.scored.key] = build.narrow(wide_key, kept, axis=2, name="key")
        for value, name, length in (
            (padding, "present_mask", self.total),
            (kept, "kept", self.tokens),
        ):
            build.graph_output(value, f"{name}.{number}", ["batch", f"{length}_{number + 1}"])
        return new

    def _may_lack(self, number: int) -> bool:
        """Whether a row may be short of pads behind cut ``number``, so that others stand in."""
        return self.is_ragged and (number > 0 or self.schedule.threshold is not None)

    def _marks(self, vision_index: ir.Value, hidden: ir.Value) -> ir.Value | None:
        """``[B,S]``, 1 where a token is protected; None where nobody asks."""
        if not self.schedule.protect:
            return None
        shape = ["batch", "vision"]
        protected = self.build.graph_input("protected", shape, ir.DataType.INT64)
        return self.build.call("VtrMark", [vision_index, protected, hidden], "marks")

    def _raters(self, vision_index: ir.Value, sites: Sequence[Site]) -> ir.Value | None:
        """``[B,S]``: the weights of those who rank, where not all of a kind do."""
        if self.schedule.query != "raters":
            return None
        hidden, padding = self.inputs["inputs_embeds"], self.inputs["attention_mask"]
        widths = [value.shape and value.shape[-1] for value in (hidden, sites[0].scored.entry)]
        if widths[0] != widths[1]:
            raise AnalysisError(
                "what else enters with the embeddings stands beside them in one tensor",
                where="input inputs_embeds",
                hint="use score: {query: text}",
            )
        return self.build.call("VtrRaters", [hidden, padding, vision_index], "raters")

    def _pruned(
        self, asked: Sequence[ir.Value], entry: ir.Value, stage: Stage, scale: float
    ) -> Sequence[ir.Value]:
        """Narrow hidden states, kept indices, narrow vision index; by the cut that is said."""
        build, threshold = self.build, self.schedule.threshold
        names = ["hidden", "kept", "vision_index"]
        operator, said = _by_blocks(self.schedule, scale)
        if operator:
            return build.calls(operator, [*asked, entry], names, **said)
        operator, said = _by_raters(self.schedule, scale)
        if operator:
            raters = [] if stage.raters is None else [stage.raters]
            labels = ["label"] if isinstance(self.schedule.merge, Recycle) else []
            made = build.calls(operator, [*asked, *raters, entry], names + labels, **said)
            return made[:3]
        if stage.marks is not None:
            protected = build.call("VtrMarked", [stage.marks, stage.vision_index], "protected")
        elif threshold is not None:
            nobody = build.constant([0], "nobody")
            protected = build.op("Less", [stage.vision_index, nobody], "protected")
        else:
            return build.prune([*asked, entry], scale)
        operator = ops.PROTECT
        if threshold is not None:
            operator = ops.THRESHOLD
            said |= {"whole": threshold.whole, "single": threshold.single}
        return build.calls(operator, [*asked, protected, entry], names, **said)

    def _budgets(self, number: int, site: Site) -> tuple[ir.Value, ir.Value]:
        """The width [1] that TopK keeps, and each row's own budget [B] (or the images [1])."""
        build, keep = self.build, site.cut.keep
        per = build.constant([keep.denominator], "per")
        if self.keep is None:
            numerator = build.constant([keep.numerator], "keep")
        else:
            at = build.constant([number], "number")
            numerator = build.op("Gather", [self.keep, at], "keep", axis=0)
        up = int(keep.rounding == "ceil")
        width = build.call("VtrBudget", [self.width, numerator, per], "width", ceil=up)
        if self.schedule.rank == "per_image":
            return width, build.op("Div", [self.width, per], "images")
        return width, build.call("VtrBudget", [self.count, numerator, per], "budget", ceil=up)

    def _scored(
        self, site: Site, stage: Stage, past: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]:
        """Query, keys and mask to rank by; and, scored by the next layer, its wide new keys."""
        layer = site.scored
        if self.schedule.source == "previous":
            return layer.query, layer.keys, stage.streams.get(layer.mask, layer.mask), None
        build, hidden = self.build, stage.streams.get(site.entry, site.entry)
        rows = build.call("VtrRows", [stage.vision_index, hidden], "rows")
        one = build.constant([1], "one")
        some = build.op("Max", [rows, one], "mask_rows")
        wide = {site.entry: hidden, **stage.streams}
        tail = {
            value: build.tail(wide.get(value, value), rows, axis=axis, name=f"tail.{value.name}")
            for value, axis in ((site.entry, 1), *((s.value, s.axis) for s in site.streams))
        }
        key = replay(build, layer.key, site.entry, wide, "key")
        query = replay(build, layer.query, site.entry, {**wide, **tail}, "query")
        keys = build.op("Concat", [layer.past_key, key], "keys", axis=2)
        padding = build.op("Concat", [past, stage.current], "scored_padding", axis=1)
        groups = stage.groups if ops.groups_of(layer.mask) else None
        last = build.call("VtrTail", [groups or hidden, some], "mask_tail")
        mask = self._mask(padding, last, groups, "scored_mask")
        made = self.schedule.positions == "repacked" or isinstance(self.schedule.merge, Recycle)
        return query, keys, mask, None if made else key

    def _mask(
        self, padding: ir.Value, rows: ir.Value, groups: ir.Value | None, name: str
    ) -> ir.Value:
        """What ``rows`` see of all keys; with ``groups`` [B,S], rows are the last of these."""
        if groups is None:
            return self.build.call(ops.CAUSAL, [padding, rows], name)
        return self.build.call(ops.GROUPED, [padding, rows, groups], name)

    def _masks(self, site: Site, new: Stage) -> dict[ir.Value, ir.Value]:
        """The masks that cross the cut → the stage's own; layers of one kind share one."""
        made: dict[bool, ir.Value] = {}
        for mask in site.masks:
            if (kind := ops.groups_of(mask) is not None) not in made:
                groups = new.groups if kind else None
                made[kind] = self._mask(new.padding, groups or new.hidden, groups, "mask")
        return {mask: made[ops.groups_of(mask) is not None] for mask in site.masks}

    def _narrow(
        self, site: Site, stage: Stage, new: Stage, kept: ir.Value
    ) -> dict[ir.Value, ir.Value]:
        """The unpruned graph's values that cross the cut → their narrow versions."""
        build = self.build
        streams = {site.entry: new.hidden, **self._masks(site, new)}
        if self.schedule.positions == "repacked":
            packed = build.call("VtrPack", [new.padding, new.hidden], "positions")
            packed.type = self.positions.type
            packed.shape = ir.Shape(new.hidden.shape[:2]) if new.hidden.shape else None
            streams[self.positions] = packed
        for stream in site.streams:
            if stream.value in streams:
                continue
            name = stream.value.name or "stream"
            if self.positions in streams and self._is_position(stream.value):
                again = replay(build, stream.value, self.positions, streams, name)
                streams[stream.value] = again
                continue
            wide = stage.streams.get(stream.value, stream.value)
            streams[stream.value] = build.narrow(wide, kept, axis=stream.axis, name=name)
        return streams

    def _is_position(self, value: ir.Value) -> bool:
        """Whether ``value`` follows from positions alone (what attention rotated does not)."""
        return value.producer() in self.positional and value.producer() not in self.embedded

    def _name_pasts(self, sites: list[Site]) -> None:
        """Say in the signature that each stage has a past of its own length."""
        for value in self.graph.inputs:
            stages = [sum(use.node in site.after for site in sites) for use in value.uses()]
            value.shape = renamed(value.shape, max(stages, default=0), (self.past,))
