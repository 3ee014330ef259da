"""Drop vision tokens where a schedule says so."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis import Axes, Site, find_layers, find_sites, label_axes
from vtr_export.passes.build import Build, depends, replay
from vtr_export.schedule import Resolved


@dataclass
class Stage:
    """What the layers between two cuts run on.

    ``padding`` [B,T] tells real keys, ``current`` [B,S] real rows; ``streams`` maps the unpruned
    graph's values to this stage's.
    """

    hidden: ir.Value
    padding: ir.Value
    current: ir.Value
    vision_index: ir.Value
    mask: ir.Value
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
        labels = label_axes(model.graph, token_seeds(model.graph))
        sites = find_sites(find_layers(model.graph, labels), labels, self.schedule)
        if sites:
            _Surgeon(model, self.schedule, self.tunable).operate(sites)
        return ir.passes.PassResult(model, modified=bool(sites))


def token_seeds(graph: ir.Graph) -> Mapping[ir.Value, Axes]:
    """The graph inputs whose axis 1 counts this call's tokens."""
    names = ("inputs_embeds", "position_ids")
    return {value: Axes(token=1) for value in graph.inputs if value.name in names}


class _Surgeon:
    """One operation on one model."""

    def __init__(self, model: ir.Model, schedule: Resolved, tunable: bool) -> None:
        self.graph, self.schedule = model.graph, schedule
        self.build = Build(model, ops.Choice(schedule.query, schedule.heads, schedule.rank))
        self.inputs = {value.name: value for value in model.graph.inputs}
        self.positions = self.inputs["position_ids"]
        self.keep = (
            self.build.graph_input("keep", [len(schedule.cuts)], ir.DataType.INT64)
            if tunable
            else None
        )

    def operate(self, sites: list[Site]) -> None:
        """Build a narrower stage behind each site, then move every node onto its stage."""
        stages = [self._first(sites)]
        for number, site in enumerate(sites):
            stages.append(self._cut(number, site, stages[-1]))
        for node in [node for site in sites[:1] for node in site.after]:
            number = sum(node in site.after for site in sites)
            for index, value in enumerate(node.inputs):
                if value in stages[number].streams:
                    node.replace_input_with(index, stages[number].streams[value])
            for value in node.outputs:
                value.shape = stage_shape(value.shape, number)
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
        return Stage(hidden, padding, current, vision_index, sites[0].scored.mask)

    def _cut(self, number: int, site: Site, stage: Stage) -> Stage:
        build = self.build
        build.prefix = f"cut.{site.cut.before_layer}"
        past = build.graph_input(
            f"past_mask.{number}", ["batch", f"past_{number + 1}"], ir.DataType.INT64
        )
        keep, budget = self._budgets(number, site)
        entry = stage.streams.get(site.entry, site.entry)
        query, keys, mask, wide_key = self._scored(site, stage, past)
        hidden, kept, vision_index = build.prune(
            [query, keys, mask, stage.vision_index, keep, budget, entry], site.scored.scale
        )
        hidden.type = site.entry.type
        current = build.call("VtrNarrow", [stage.current, kept], "current")
        padding = build.op("Concat", [past, current], "padding", axis=1)
        new = Stage(hidden, padding, current, vision_index, mask)
        new.mask = build.call("VtrCausalMask", [padding, hidden], "mask")
        new.streams = self._narrow(site, stage, new, kept)
        if wide_key is not None:
            new.streams[site.scored.key] = build.narrow(wide_key, kept, axis=2, name="key")
        build.graph_output(padding, f"present_mask.{number}", ["batch", f"total_{number + 1}"])
        build.graph_output(kept, f"kept.{number}", ["batch", f"sequence_{number + 1}"])
        return new

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
            return layer.query, layer.keys, stage.mask, None
        build, hidden = self.build, stage.streams.get(site.entry, site.entry)
        rows = build.call("VtrRows", [stage.vision_index, hidden], "rows")
        one = build.constant([1], "one")
        some = build.op("Max", [rows, one], "mask_rows")
        wide = {site.entry: hidden, **stage.streams}
        tail = {
            value: build.call("VtrTail", [wide.get(value, value), rows], f"tail.{value.name}")
            for value in (site.entry, *(stream.value for stream in site.streams))
        }
        key = replay(build, layer.key, site.entry, {**wide})
        query = replay(build, layer.query, site.entry, {**wide, **tail})
        keys = build.op("Concat", [layer.past_key, key], "keys", axis=2)
        padding = build.op("Concat", [past, stage.current], "scored_padding", axis=1)
        last = build.call("VtrTail", [hidden, some], "mask_tail")
        mask = build.call("VtrCausalMask", [padding, last], "scored_mask")
        return query, keys, mask, None if self.schedule.positions == "repacked" else key

    def _narrow(
        self, site: Site, stage: Stage, new: Stage, kept: ir.Value
    ) -> dict[ir.Value, ir.Value]:
        """The unpruned graph's values that cross the cut → their narrow versions."""
        build = self.build
        streams = {site.entry: new.hidden, **dict.fromkeys(site.masks, new.mask)}
        if self.schedule.positions == "repacked":
            packed = build.call("VtrPack", [new.padding, new.hidden], "positions")
            streams[self.positions] = packed
        for stream in site.streams:
            if stream.value in streams:
                continue
            if self.positions in streams and self._is_position(stream.value):
                streams[stream.value] = replay(build, stream.value, self.positions, streams)
                continue
            wide = stage.streams.get(stream.value, stream.value)
            name = stream.value.name or "stream"
            streams[stream.value] = build.narrow(wide, kept, axis=stream.axis, name=name)
        return streams

    def _is_position(self, value: ir.Value) -> bool:
        """Whether ``value`` follows from positions alone (what attention rotated does not)."""
        return depends(value, self.positions) and not depends(value, self.inputs["inputs_embeds"])

    def _name_pasts(self, sites: list[Site]) -> None:
        """Say in the signature that each stage has a past of its own length."""
        for value in self.graph.inputs:
            parts = (value.name or "").split(".")
            if parts[0] == "past_key_values":
                stage = sum(int(parts[1]) >= site.cut.before_layer for site in sites)
                value.shape = stage_shape(value.shape, stage)


def stage_shape(shape: ir.Shape | None, stage: int) -> ir.Shape | None:
    """``shape`` with this stage's own names for its lengths."""
    if shape is None or stage == 0:
        return shape
    own = {name: f"{name}_{stage}" for name in ("sequence", "past", "total")}
    return ir.Shape([own.get(str(dim), dim) for dim in shape])
