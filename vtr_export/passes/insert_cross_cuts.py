"""Drop vision keys of cross-attention where a schedule says so."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis import find_layers, label_axes, token_seeds
from vtr_export.analysis.axes import CROSS_STATES, NONE, Axes, Labels
from vtr_export.analysis.layers import Layer, ancestors, descendants
from vtr_export.errors import AnalysisError
from vtr_export.passes.build import Build, renamed, replay
from vtr_export.schedule import Cut, Resolved

LENGTHS = ("vision", "cross_past", "cross_total")


@dataclass
class Stage:
    """What the cross layers between two cuts read.

    ``states`` [B,V,D], ``seen`` [B,S,V] by rows, ``current`` [B,V] by later ones, ``index`` [B,V];
    ``streams`` maps the unpruned graph's values to this stage's.
    """

    states: ir.Value
    seen: ir.Value
    current: ir.Value
    index: ir.Value
    mask: ir.Value
    streams: dict[ir.Value, ir.Value] = field(default_factory=dict)


class InsertCrossCuts(ir.passes.InPlacePass):
    """Keep only the best vision keys from each scheduled cross layer on.

    Those that the last row does not see go with the first cut that drops any.

    Before::

        keys = Concat(past, project(cross_states)); Attention(query, keys, values, mask)

    After::

        states', kept, index' = vtr.VtrTopKPrune(
            query, keys, mask, index, keep, budget, cross_states)       # of a layer before
        keys = Concat(past, project(states')); Attention(query, keys, values, mask')
    """

    def __init__(self, schedule: Resolved, *, tunable: bool = False) -> None:
        self.schedule, self.tunable = schedule, tunable

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find everything first, then edit: a graph that cannot be cut stays as it was."""
        if not self.schedule.crosses or not self.schedule.cuts:
            return ir.passes.PassResult(model, modified=False)
        labels = label_axes(model.graph, token_seeds(model.graph))
        layers = _cross_layers(model.graph, labels, self.schedule)
        _Surgeon(model, labels, layers, self.schedule, self.tunable).operate()
        return ir.passes.PassResult(model, modified=True)


def _cross_layers(graph: ir.Graph, labels: Labels, schedule: Resolved) -> Mapping[int, Layer]:
    """By the model's number of the layer."""
    found = [layer for layer in find_layers(graph, labels) if layer.crosses]
    if len(found) != len(schedule.crosses):
        raise AnalysisError(
            f"the graph has {len(found)} layers of cross-attention, "
            f"the model {len(schedule.crosses)}",
            hint="vtr inspect lists the layers that were found",
        )
    return dict(zip(schedule.crosses, found, strict=True))


class _Surgeon:
    """One operation on one model."""

    def __init__(
        self,
        model: ir.Model,
        labels: Labels,
        layers: Mapping[int, Layer],
        schedule: Resolved,
        tunable: bool,
    ) -> None:
        self.graph, self.labels, self.layers = model.graph, labels, layers
        self.cuts = schedule.cuts
        choice = ops.Choice(schedule.query, schedule.heads, schedule.rank, len(self.cuts) > 1)
        self.build = Build(model, choice)
        self.inputs = {value.name: value for value in self.graph.inputs}
        self.states = self.inputs[CROSS_STATES]
        self.outputs = {value.name: value for value in self.graph.outputs}
        self.made = descendants(self.states)
        rows = [node.outputs[0] for node in self.graph if node.op_type == ops.CROSS_ROWS]
        self.rows = rows[0] if rows else None  # that the rest of a cross layer counts in
        embedded = descendants(self.inputs["inputs_embeds"])
        self.counted = descendants(rows[0]) - embedded if rows else set()
        self.keep = (
            self.build.graph_input("keep", [len(self.cuts)], ir.DataType.INT64) if tunable else None
        )

    def operate(self) -> None:
        """Build a narrower stage at each cut, then move every node behind it onto that stage."""
        afters = [self._after(cut) for cut in self.cuts]
        stages = [self._first()]
        for number, cut in enumerate(self.cuts):
            stages.append(self._cut(number, cut, stages[-1], afters[number]))
        for node in set().union(*afters):
            stage = sum(node in after for after in afters)
            for index, value in enumerate(node.inputs):
                if value in stages[stage].streams:
                    node.replace_input_with(index, stages[stage].streams[value])
        self._name_lengths(afters)

    def _after(self, cut: Cut) -> set[ir.Node]:
        """All that runs on what ``cut`` leaves: cross layers behind it, and their projections."""
        behind = [layer for number, layer in self.layers.items() if number >= cut.before_layer]
        before = [layer for number, layer in self.layers.items() if number < cut.before_layer]
        nodes = {layer.attention for layer in behind}
        nodes |= descendants(behind[0].attention.outputs[0])
        return nodes | (self._projections(behind) - self._projections(before))

    def _projections(self, layers: Sequence[Layer]) -> set[ir.Node]:
        """Between the states and the keys and values of ``layers``."""
        read = [value for layer in layers for value in layer.attention.inputs[1:3]]
        return ancestors(read) & self.made

    def _first(self) -> Stage:
        build, seen = self.build, self.inputs["cross_mask"]
        build.prefix = "cut"
        index = build.call("VtrColumns", [self.states], "index")
        concat = self.outputs["present_mask.cross"].producer()
        current = concat.inputs[1] if concat is not None else None
        assert current is not None, "AttachCross made it"
        self.count = build.call("VtrVisionCount", [current, index, self.states], "count")
        self.width = build.op("Shape", [self.states], "width", start=1, end=2)
        mask = next(iter(self.layers.values())).mask
        return Stage(self.states, seen, current, index, mask)

    def _cut(self, number: int, cut: Cut, stage: Stage, after: Set[ir.Node]) -> Stage:
        build = self.build
        build.prefix = f"cut.{cut.before_layer}"
        past = build.graph_input(
            f"past_mask.{number}", ["batch", f"cross_past_{number + 1}"], ir.DataType.INT64
        )
        scored = self.layers[max(layer for layer in self.layers if layer < cut.before_layer)]
        width, budget, drops_none = self._budgets(number, cut)
        inputs = [scored.query, scored.keys, stage.mask, stage.index, width, budget, stage.states]
        states, kept, index = build.prune(inputs, scored.scale)
        states.type = self.states.type
        current = build.call("VtrNarrow", [stage.current, kept], "current")
        seen = build.narrow(stage.seen, kept, axis=2, name="seen")
        if number:  # what stands in for a key is none
            current = build.call("VtrAlive", [current, kept], "alive")
        _declare(current, ir.DataType.INT64, ["batch", f"vision_{number + 1}"])
        seen = self._left(seen, current, drops_none)
        padding = build.op("Concat", [past, current], "padding", axis=1)
        mask = build.call(ops.CROSS, [past, seen], "mask")
        new = Stage(states, seen, current, index, mask)
        new.streams = self._narrow(stage, new, past, kept, after)
        for value, name, length in (
            (padding, "present_mask", "cross_total"),
            (kept, "kept", "vision"),
        ):
            build.graph_output(value, f"{name}.{number}", ["batch", f"{length}_{number + 1}"])
        return new

    def _left(self, seen: ir.Value, current: ir.Value, drops_none: ir.Value) -> ir.Value:
        """``seen`` [B,S,V] of keys that were ranked, or of all where a cut drops none."""
        build = self.build
        ranked = build.op("Cast", [current], "ranked", to=int(ir.DataType.BOOL))
        stays = build.op("Or", [ranked, drops_none], "stays")
        stays.type, stays.shape = ir.TensorType(ir.DataType.BOOL), current.shape
        wide = build.op("Unsqueeze", [stays, build.constant([1], "rows.axis")], "stays.wide")
        batch, keys = current.shape or (None, None)
        wide.type, wide.shape = stays.type, ir.Shape([batch, 1, keys])
        left = build.op("And", [seen, wide], "seen.left")
        left.type, left.shape = seen.type, seen.shape
        return left

    def _budgets(self, number: int, cut: Cut) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The width [1] that TopK keeps, each row's own budget [B], and whether that is all [1]."""
        build, keep = self.build, cut.keep
        per = build.constant([keep.denominator], "per")
        if self.keep is None:
            numerator = build.constant([keep.numerator], "keep")
        else:
            at = build.constant([number], "number")
            numerator = build.op("Gather", [self.keep, at], "keep", axis=0)
        up = int(keep.rounding == "ceil")
        width = build.call("VtrBudget", [self.width, numerator, per], "width", ceil=up)
        budget = build.call("VtrBudget", [self.count, numerator, per], "budget", ceil=up)
        drops_none = build.op("GreaterOrEqual", [numerator, per], "drops_none")
        _declare(drops_none, ir.DataType.BOOL, [1])
        return width, budget, drops_none

    def _narrow(
        self, stage: Stage, new: Stage, past: ir.Value, kept: ir.Value, after: Set[ir.Node]
    ) -> dict[ir.Value, ir.Value]:
        """The unpruned graph's values that the nodes behind read → this stage's versions."""
        build, masks = self.build, {layer.mask for layer in self.layers.values()}
        streams = {self.states: new.states, **dict.fromkeys(masks, new.mask)}
        read = {value: None for node in after for value in node.inputs if value is not None}
        if self.rows is not None:
            told = [past, new.seen, self.inputs["cross_rows"]]
            streams[self.rows] = build.call(ops.CROSS_ROWS, told, "rows")
        for value in sorted(read, key=lambda value: value.name or ""):
            if value in streams or value.producer() in after:
                continue
            axes: Axes = self.labels.get(value, NONE)
            if self.rows is not None and value.producer() in self.counted:
                streams[value] = replay(build, value, self.rows, streams, value.name or "rows")
            elif axes.vision is not None:
                if axes.token is not None:
                    raise _stray(value)
                wide = stage.streams.get(value, value)
                name = value.name or "stream"
                streams[value] = build.narrow(wide, kept, axis=axes.vision, name=name)
        return streams

    def _name_lengths(self, afters: Sequence[Set[ir.Node]]) -> None:
        """Say in the graph that each stage has vision keys of its own number."""
        for node in set().union(*afters):
            stage = sum(node in after for after in afters)
            pasts = [value for value in node.inputs if value is not None and value.is_graph_input()]
            for value in (*node.outputs, *pasts):
                value.shape = renamed(value.shape, stage, LENGTHS)


def _declare(value: ir.Value, dtype: ir.DataType, dims: Sequence[int | str]) -> None:
    """What the analysis of the graph is to know of ``value``."""
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(dims)


def _stray(value: ir.Value) -> AnalysisError:
    return AnalysisError(
        f"the value {value.name!r} crosses a cut of vision keys and cannot be narrowed",
        where=f"made by {value.producer()}",
        hint="report the model: its layers share what they attend to",
    )
