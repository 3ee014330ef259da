"""Fewer vision tokens before the decoder: reductions written into a vision encoder's graph."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from vtr_export import ops
from vtr_export.analysis.axes import rank
from vtr_export.analysis.layers import ancestors, descendants, order_of, residual
from vtr_export.errors import AnalysisError
from vtr_export.passes.build import Build, replay
from vtr_export.passes.open_lengths import open_lengths
from vtr_export.reductions import Tokens, Tower, VisionReduction

PROJECTOR: Final = ".multi_modal_projector."  # in the names of its weights
TOWER: Final = "tower"  # an output that keeps layers alive which nothing else needs
OUTPUTS: Final = {"source": "image_source", "protected": "image_protected"}
BY_TOKEN: Final = frozenset(
    (
        *("Add", "Cast", "Constant", "Div", "Erf", "Gelu", "Identity", "LayerNormalization"),
        *("MatMul", "Mul", "Pow", "RMSNormalization", "Relu", "Sigmoid", "Sub", "Tanh"),
        *("Transpose", "Gemm", "Sqrt", "ReduceMean", "Reciprocal"),
    )
)


class ReduceVision(ir.passes.InPlacePass):
    """Give the projector what ``reductions`` leave of the tokens.

    Before::

        pixel_values → tower → features [images, N, C] → projector → image_features [images, N, D]

    After::

        … → features → score, select, merge → [images, K, C] → projector → [images, K, D]

    Where K depends on the image, the tokens of all images lie in one row, image_features
    [tokens, D], and ``image_counts`` [images] says how many each has. ``image_source`` and
    ``image_protected`` say which tokens they were, and which no later phase may drop.
    """

    def __init__(self, reductions: Sequence[VisionReduction], tower: Tower) -> None:
        self.reductions, self.tower = reductions, tower

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Reduce, then show what the next phases need."""
        images = ReducedImages(model, self.tower)
        for number, reduction in enumerate(self.reductions):
            images.build.prefix = f"vision.{number}"
            images.take(reduction, reduction.reduce(images))
        images.build.prefix = "vision"
        images.finish()
        _hide_tower(model.graph)
        return ir.passes.PassResult(model, modified=True)


class ReducedImages:
    """The ``Images`` of a traced graph; ``tower`` is what is left of it so far."""

    def __init__(self, model: ir.Model, tower: Tower) -> None:
        self.build, self.graph, self.tower = Build(model, ops.Choice()), model.graph, tower
        self._whole = tower
        self._order = order_of(model.graph)
        self._attentions = _attentions(model.graph, tower)
        self._entry = _projected(model.graph)
        self._tokens = Tokens(self._entry)

    @property
    def features(self) -> ir.Value:
        """``[I,N,C]``."""
        return self._tokens.features

    @property
    def projected(self) -> ir.Value:
        """``[I,N,D]``, by nodes of its own."""
        if self._tokens.projected is None:
            output, features = self.graph.outputs[0], self._tokens.features
            _check_by_token(self._entry, self._order)
            given = {self._entry: features}
            projected = replay(self.build, output, self._entry, given, "projected")
            projected.type = output.type
            if features is not self._entry:
                open_lengths(features, self._whole.grid.tokens)
            self._tokens = replace(self._tokens, projected=projected)
        return self._tokens.projected

    def query(self, layer: int) -> ir.Value:
        """``[I,H,n,d]``."""
        return _given(self._attentions[layer], 0)

    def key(self, layer: int) -> ir.Value:
        """``[I,H,n,d]``."""
        return _given(self._attentions[layer], 1)

    def scale(self, layer: int) -> float:
        """The attention's own, or one by the square root of a head's width."""
        scale = self._attentions[layer].attributes.get("scale")
        return (
            float((self._whole.hidden // self._whole.heads) ** -0.5)
            if scale is None
            else scale.as_float()
        )

    def attention_to(self, layer: int, heads: str = "mean") -> ir.Value:
        """``[I,N]`` fp32; of tokens that are left, where some are gone."""
        tower, operator = self._whole, "VtrReceivedAttention"
        if tower.has_cls:
            operator = "VtrClassAttention"
        asked = [self.query(layer), self.key(layer)]
        (each,) = self.call(operator, asked, ["attention"], scale=self.scale(layer))
        axis = self.constant([1], "heads")
        reduce = "ReduceMean" if heads == "mean" else "ReduceSum"
        score = self.op(reduce, [each, axis], "score", keepdims=0)
        if tower.merge > 1:
            grid = tower.grid.rows, tower.merge, tower.grid.columns, tower.merge
            (score,) = self.call("VtrPoolPatches", [score, self.constant(grid, "grid")], ["pooled"])
        if self._tokens.features is self._entry:
            return score
        if self._tokens.source is None:
            raise AnalysisError(
                "tokens that stand for several have no attention of their own",
                hint="list the reduction that ranks by attention first",
            )
        nobody = self.constant([0], "nobody")
        source = self.op("Max", [self._tokens.source, nobody], "known")
        return self.op("GatherElements", [score, source], "left", axis=1)

    def attended(self, layer: int) -> ir.Value:
        """``[I,n,D]``, between attention and MLP."""
        node = self._attentions[layer]
        return _sum_behind(node, self._left_or_end(layer))

    def left(self, layer: int) -> ir.Value:
        """``[I,n,D]``, behind a layer."""
        found = self._left_or_end(layer)
        if found is None:
            raise AnalysisError("nothing reads the last layer", hint="reduce behind one before it")
        return found

    def _left_or_end(self, layer: int) -> ir.Value | None:
        """The stream between two attentions."""
        layer %= len(self._attentions)
        if layer + 1 == len(self._attentions):
            return None
        before, after = self._attentions[layer : layer + 2]
        return residual(self.graph, before, after, self._order)

    def replace(self, stream: ir.Value, by: ir.Value) -> None:
        """Whoever read ``stream`` reads ``by``; its own ancestors go on reading ``stream``."""
        made = ancestors([by])
        for use in list(stream.uses()):
            if use.node in self._order and use.node not in made:  # one of the traced graph
                use.node.replace_input_with(use.idx, by)
        by.type = stream.type
        open_lengths(by, self._whole.sequence, self._whole.patches.tokens, self._whole.grid.tokens)

    def call(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        names: Sequence[str],
        **attributes: float,
    ) -> Sequence[ir.Value]:
        """One of our operators."""
        return self.build.calls(operator, inputs, names, **attributes)

    def op(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int
    ) -> ir.Value:
        """A standard operator with one output."""
        return self.build.op(op_type, inputs, name, **attributes)

    def constant(self, values: Sequence[int], name: str) -> ir.Value:
        """An int64 vector."""
        return self.build.constant(values, name)

    def take(self, reduction: VisionReduction, tokens: Tokens) -> None:
        """What ``reduction`` left is what there is."""
        before = self._tokens
        if tokens.source is not None and before.source is not None:
            nobody = self.constant([0], "from")
            at = self.op("Max", [tokens.source, nobody], "at")
            source = self.op("GatherElements", [before.source, at], "origin", axis=1)
            tokens = replace(tokens, source=source)
        if tokens.protected is None and before.protected is not None and tokens.source is not None:
            kept = self.op("GatherElements", [before.protected, tokens.source], "still", axis=1)
            tokens = replace(tokens, protected=kept)
        self._tokens, self.tower = tokens, reduction.leaves(self.tower)

    def finish(self) -> None:
        """Project what is left, and say in the signature what it is."""
        tokens, entry = self._tokens, self._entry
        if tokens.features is not entry:
            _check_by_token(entry, self._order)
            self.replace(entry, tokens.features)
        (output, *_) = self.graph.outputs
        if tokens.projected is not None:
            output = self._instead(output, tokens.projected)
        if tokens.counts is None:
            width = self.tower.grid.tokens
            output.shape = (
                ir.Shape([output.shape[0], width, output.shape[2]]) if output.shape else None
            )
            lead: list[str | int] = ["images", width]
        else:
            self._pack(output, tokens.counts)
            lead = ["tokens"]
        for part, name in OUTPUTS.items():
            value = getattr(tokens, part)
            if value is None:
                continue
            if tokens.counts is not None:
                (value,) = self.call("VtrPackRows", [value, tokens.counts], [part])
            dtype = ir.DataType.BOOL if part == "protected" else ir.DataType.INT64
            self._show(value, name, lead, dtype)

    def _instead(self, output: ir.Value, projected: ir.Value) -> ir.Value:
        """``projected`` as the graph's output."""
        projected.name, output.name = output.name, "vision.unread"
        projected.type, projected.shape = output.type, output.shape
        self.graph.outputs[0] = projected
        return projected

    def _pack(self, output: ir.Value, counts: ir.Value) -> None:
        """The tokens of all images in one row, in place of ``output``."""
        (packed,) = self.call("VtrPackRows", [output, counts], ["packed"])
        packed.type = output.type
        packed.shape = ir.Shape(["tokens", output.shape[2] if output.shape else None])
        name, output.name = output.name, "vision.padded"
        packed.name = name
        self.graph.outputs[0] = packed
        self._show(counts, "image_counts", ["images"], ir.DataType.INT64)

    def _show(
        self, value: ir.Value, name: str, shape: Sequence[str | int], dtype: ir.DataType
    ) -> None:
        shown = self.op("Identity", [value], name)
        shown.name, shown.type, shown.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(shown)


def _attentions(graph: ir.Graph, tower: Tower) -> list[ir.Node]:
    found = [node for node in graph if (node.domain, node.op_type) == ("", "Attention")]
    if len(found) != tower.layers:
        raise AnalysisError(
            f"the vision encoder has {len(found)} attentions, its tower {tower.layers} layers",
            hint="this tower cannot be reduced: leave vision out of the schedule",
        )
    return found


def _given(node: ir.Node, number: int) -> ir.Value:
    value = node.inputs[number]
    assert value is not None, "an attention has a query and a key"
    return value


def _projected(graph: ir.Graph) -> ir.Value:
    """What the projector takes, ``[I,N,C]``: the first value that meets one of its weights."""
    weights = {v for name, v in graph.initializers.items() if PROJECTOR in name}
    own = set(weights)
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if not own.isdisjoint(inputs):
            others = [value for value in inputs if value not in own and rank(value) == 3]
            if others:
                return others[0]
            own |= set(node.outputs)  # a weight, transposed or cast
    raise AnalysisError(
        "no projector was found behind the vision tower",
        hint="this tower cannot be reduced: leave vision out of the schedule",
    )


def _sum_behind(node: ir.Node, end: ir.Value | None) -> ir.Value:
    """The first Add behind an attention whose result goes two ways: into the MLP and around it."""
    stack, seen = list(node.outputs), set[ir.Value]()
    while stack:
        value = stack.pop(0)
        if value in seen or value is end:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is not None and producer.op_type == "Add" and len(value.uses()) > 1:
            return value
        stack += [output for use in value.uses() for output in use.node.outputs]
    raise AnalysisError(
        "no stream was found between an attention of the vision tower and its MLP",
        where=f"node {node.name!r}",
        hint="this tower cannot be reduced inside: choose a reduction behind it",
    )


def _check_by_token(entry: ir.Value, traced: Collection[ir.Node]) -> None:
    """What the trace has behind it must treat tokens one by one, however many they are."""
    for node in descendants(entry).intersection(traced):
        if node.op_type not in BY_TOKEN:
            raise AnalysisError(
                f"{node.op_type} behind the vision features does not go token by token",
                where=f"node {node.name!r}",
                hint="this projector cannot be reduced before: leave vision out of the schedule",
            )


def _hide_tower(graph: ir.Graph) -> None:
    """What kept the tower whole has done its work."""
    for value in [value for value in graph.outputs if value.name == TOWER]:
        graph.outputs.remove(value)
