"""Fewer vision tokens before the decoder: reductions written into a vision encoder's graph."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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

    def __init__(
        self,
        reductions: Sequence[VisionReduction],
        tower: Tower,
        held: Mapping[str, ir.TensorProtocol] | None = None,
    ) -> None:
        """``held``: weights that only reductions read, by name."""
        self.reductions, self.tower, self.held = reductions, tower, held or {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Reduce, then show what the next phases need."""
        images = ReducedImages(model, self.tower, self.held)
        for number, reduction in enumerate(self.reductions):
            images.build.prefix = f"vision.{number}"
            images.take(reduction, reduction.reduce(images))
        images.build.prefix = "vision"
        images.finish()
        _hide_tower(model.graph)
        return ir.passes.PassResult(model, modified=True)


class ReducedImages:
    """The ``Images`` of a traced graph; ``tower`` is what is left of it so far."""

    def __init__(
        self, model: ir.Model, tower: Tower, held: Mapping[str, ir.TensorProtocol]
    ) -> None:
        self.build, self.graph, self.tower = Build(model, ops.Choice()), model.graph, tower
        self._whole, self._held = tower, held
        self._order = order_of(model.graph)
        self._attentions = _attentions(model.graph, tower)
        self._entry = _projected(model.graph)
        self._tokens = Tokens(self._entry)
        self._names = Counter[str]()
        self._inside = list[ir.Value]()  # streams of the tower that a reduction made
        self._rows: ir.Value | None = None  # which of the tower's last rows the tokens are

    @property
    def features(self) -> ir.Value:
        """``[I,N,C]``."""
        return self._tokens.features

    @property
    def projected(self) -> ir.Value:
        """``[I,N,D]``, by nodes of its own."""
        if self._tokens.projected is not None:
            return self._tokens.projected
        output, features = self.graph.outputs[0], self._tokens.features
        _check_by_token(self._entry, self._order)
        given = {self._entry: features}
        projected = replay(self.build, output, self._entry, given, "projected")
        projected.type = output.type
        if features is not self._entry:
            open_lengths(features, self._whole.grid.tokens)
        self._tokens = replace(self._tokens, projected=projected)
        return projected

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
        return score if self._is_whole(layer) else self._of_left(score, layer)

    def _behind(self, layer: int) -> int:
        """How many of the streams that reductions made a layer attends to."""
        before = ancestors([self.query(layer)])
        return sum(stream.producer() in before for stream in self._inside)

    def _is_whole(self, layer: int) -> bool:
        """Whether a layer attends to the tokens that there are, in their order."""
        is_last = self._behind(layer) == len(self._inside)
        return is_last and self._tokens.features is self._entry

    def _of_left(self, score: ir.Value, layer: int) -> ir.Value:
        """``score`` of what a layer attends to, of the tokens that are left."""
        behind, of_last = self._behind(layer), len(self._inside)
        if self._tokens.source is None:
            raise AnalysisError(
                "tokens that stand for several have no attention of their own",
                hint="list the reduction that ranks by attention first",
            )
        if 0 < behind < of_last:
            raise AnalysisError(
                f"some of the tokens that layer {layer} attends to leave the tower behind it",
                hint="rank by layer -1, or by one before the reduction inside the tower",
            )
        known = self._rows if of_last and behind == of_last else self._tokens.source
        assert known is not None, "tokens behind the tower have sources"
        source = self.op("Max", [known, self.constant([0], "nobody")], "known")
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
        if stream is not self._entry:
            self._inside.append(by)
        by.type = stream.type
        open_lengths(by, self._whole.sequence, self._whole.patches.tokens, self._whole.grid.tokens)

    def weight(self, name: str) -> ir.Value:
        """One of ``held``, as an initializer."""
        if name not in self._held:
            raise AnalysisError(
                f"a reduction reads {name}, which the checkpoint does not hold",
                hint="give a checkpoint that was trained with it",
            )
        if name not in self.graph.initializers:
            tensor = self._held[name]
            value = ir.val(name, tensor.dtype, tensor.shape.numpy(), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def show_only(self, mask: ir.Value, layer: int) -> None:
        """For towers whose own attention sees everything."""
        for node in self._attentions[layer + 1 :]:
            if len(node.inputs) > 3:
                raise AnalysisError(
                    "an attention of the vision tower has a mask of its own",
                    where=f"node {node.name!r}",
                    hint="choose a form with a fixed number of tokens",
                )
            node.resize_inputs(4)
            node.replace_input_with(3, mask)

    def call(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        names: Sequence[str],
        **attributes: float,
    ) -> Sequence[ir.Value]:
        """One of our operators."""
        own = [self._unlike_others(name) for name in names]
        return self.build.calls(operator, inputs, own, **attributes)

    def op(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int
    ) -> ir.Value:
        """A standard operator with one output."""
        return self.build.op(op_type, inputs, self._unlike_others(name), **attributes)

    def constant(self, values: Sequence[int], name: str) -> ir.Value:
        """An int64 vector."""
        return self.build.constant(values, self._unlike_others(name))

    def _unlike_others(self, name: str) -> str:
        """A method may ask for the same thing twice, and call what it makes as we do."""
        whole = f"{self.build.prefix}.{name}"
        self._names[whole] += 1
        return name if self._names[whole] == 1 else f"{name}.{self._names[whole]}"

    def take(self, reduction: VisionReduction, tokens: Tokens) -> None:
        """What ``reduction`` left is what there is."""
        before = self._tokens
        if tokens.features is not self._entry:
            self._rows = self._among(self._rows, tokens.source, "row")
        if tokens.protected is None and before.protected is not None and tokens.source is not None:
            still = self._among(before.protected, tokens.source, "still")
            tokens = replace(tokens, protected=still)
        if tokens.source is not None and before.source is not None:
            tokens = replace(tokens, source=self._among(before.source, tokens.source, "origin"))
        self._tokens, self.tower = tokens, reduction.leaves(self.tower)

    def _among(self, known: ir.Value | None, at: ir.Value | None, name: str) -> ir.Value | None:
        """``at`` points into ``known``, or at what everything else points at."""
        if known is None or at is None:
            return at
        nobody = self.constant([0], f"{name}.nobody")
        somebody = self.op("Max", [at, nobody], f"{name}.at")
        return self.op("GatherElements", [known, somebody], name, axis=1)

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
