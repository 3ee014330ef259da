"""Read our ONNX functions from text and declare them, with all they call, in a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

import onnx
import onnx.parser
import onnx_ir as ir

from vtr_export.errors import AnalysisError
from vtr_export.reductions.registry import operator_folders

DOMAIN = "vtr"
VERSION = 1
OLDEST = 18  # opset whose operators a body can be read with: reductions take their axes as input


BLOCK_SCORES: Final[Mapping[str, str]] = {
    "attention": "VtrTextMean",
    "self_cross": "VtrSelfCross",
    "redundancy": "VtrRedundancy",
}
"""Rule → what ranks by it, given what vision rows and asking rows attend to."""


@dataclass(frozen=True)
class Choice:
    """Which variant stands behind each abstract operator of a body (VtrRows, VtrHeads …).

    One schedule makes one choice, so one model holds one body of each composite. ``ragged``: a
    row may have to drop more than the widest row drops, and be short of pads to stay as wide.
    ``softcap`` bends the logits of a score (VtrCap) as attention's are bent. ``rule`` says what
    ranks where whole blocks of attention are at hand (VtrBlockScore).
    """

    query: Literal["last", "text", "raters"] = "last"
    heads: Literal["mean", "max"] = "mean"
    rank: Literal["joint", "per_image"] = "joint"
    ragged: bool = False
    softcap: float | None = None
    rule: Literal["attention", "self_cross", "redundancy"] = "attention"

    def names(self) -> Mapping[str, str]:
        """Abstract operator → the function that implements it."""
        joint = "VtrRankRagged" if self.ragged else "VtrRankJoint"
        return {
            "VtrRows": "VtrRowsLast" if self.query == "last" else "VtrRowsText",
            "VtrWeight": "VtrWeightLast" if self.query == "last" else "VtrWeightText",
            "VtrHeads": {"mean": "VtrHeadsMean", "max": "VtrHeadsMax"}[self.heads],
            "VtrRank": {"joint": joint, "per_image": "VtrRankPerImage"}[self.rank],
            "VtrSelect": "VtrSelectRagged" if self.ragged else "VtrSelect",
            "VtrBlockScore": BLOCK_SCORES[self.rule],
        }


def folder() -> Path:
    """Where the operators' text lies: beside this file in a wheel, ``graphs/ops`` in a clone."""
    packaged = Path(__file__).parent / "graphs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "graphs" / "ops"


@cache
def _parse(name: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(_file(name).read_text(encoding="utf-8"))


def _file(name: str) -> Path:
    """Ours, or that of a package that brings a reduction."""
    places = [place / f"{name}.onnxtxt" for place in (folder(), *operator_folders())]
    found = [place for place in places if place.is_file()]
    if len(found) != 1:
        said = "twice: " + ", ".join(map(str, found)) if found else "nowhere"
        raise AnalysisError(
            f"the operator {name} is {said}",
            hint="its text lies in `graphs` beside the reduction that calls it, under its own name",
        )
    return found[0]


def load(name: str, choice: Choice) -> ir.Function:
    """The function ``name``, its abstract operators resolved by ``choice``.

    Values inside bear its name: TensorRT's parser confuses a constant of a body with one of the
    graph that is called the same.
    """
    function = ir.serde.deserialize_function(_parse(name))
    for node in list(function):
        if node.op_type == "VtrCap":
            _cap(function, node, choice.softcap)
        node.op_type = choice.names().get(node.op_type, node.op_type)
    for node in ir.traversal.RecursiveGraphIterator(function):
        for value in set(node.outputs) - set(function.outputs):
            value.name = f"{name}.{value.name}"
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for value in attribute.as_graph().inputs:
                    value.name = f"{name}.{value.name}"
    return function


def _cap(function: ir.Function, node: ir.Node, softcap: float | None) -> None:
    """Bend the logits, or leave nothing between them and what follows."""
    if softcap is None:
        logits = node.inputs[0]
        assert logits is not None
        node.outputs[0].replace_all_uses_with(logits)
        function.remove(node, safe=True)
    else:
        node.op_type = "VtrSoftcap"
        node.attributes["softcap"] = ir.AttrFloat32("softcap", softcap)


def declare(model: ir.Model, name: str, choice: Choice | None = None) -> None:
    """Add ``name`` and every function it calls to ``model``; twice is once."""
    choice = choice or Choice()
    name = choice.names().get(name, name)
    if (DOMAIN, name, "") in model.functions:
        return
    function = load(name, choice)
    for node in list(function):
        if node.domain == DOMAIN:
            declare(model, node.op_type, choice)
    write_out(function, choice)
    opset = model.opset_imports.get("", OLDEST)
    function.opset_imports[""] = max(OLDEST, opset)  # onnx.checker refuses a mixture
    model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = VERSION


def write_out(function: ir.Function, choice: Choice) -> None:
    """Put bodies in the place of those calls that hand on an attribute of ``function``.

    TensorRT's parser reads an attribute that passes through two functions as 0, silently
    (TensorRT-RTX 1.7.1).
    """
    for call in list(function):
        if call.domain == DOMAIN and any(given.is_ref() for given in call.attributes.values()):
            body = load(call.op_type, choice)
            if any(
                told.type == ir.AttributeType.GRAPH for n in body for told in n.attributes.values()
            ):
                continue  # a loop, which TensorRT is not given
            write_out(body, choice)
            _replace(function, call, body)


def handed_on(model: ir.Model) -> list[str]:
    """Functions of ``model`` whose bodies hand an attribute on, as ``write_out`` leaves none."""
    return [
        function.name
        for function in model.functions.values()
        for node in function
        if node.domain == DOMAIN and any(given.is_ref() for given in node.attributes.values())
    ]


def _replace(function: ir.Function, call: ir.Node, body: ir.Function) -> None:
    """Nodes of ``body`` for ``call``; their values are named after its first output, too."""
    values: dict[ir.Value, ir.Value | None] = dict(zip(body.inputs, call.inputs, strict=True))
    for node in body:
        told = [_resolved(each, call, body) for each in node.attributes.values()]
        inputs = [None if each is None else values[each] for each in node.inputs]
        count = len(node.outputs)
        clone = ir.Node(node.domain, node.op_type, inputs, told, num_outputs=count)
        for old, new in zip(node.outputs, clone.outputs, strict=True):
            values[old], new.name = new, f"{call.outputs[0].name}.{old.name}"
        function.insert_before(call, clone)
    for old, inner in zip(call.outputs, body.outputs, strict=True):
        made = values[inner]
        assert made is not None
        name, old.name = old.name, f"{old.name}.called"
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        made.name = name
    function.remove(call, safe=True)


def _resolved(attribute: ir.Attr, call: ir.Node, body: ir.Function) -> ir.Attr:
    """An attribute of the callee's node, as the caller says it."""
    if not attribute.is_ref():
        return attribute
    name = attribute.ref_attr_name or ""
    given = call.attributes.get(name) or body.attributes[name]
    if given.is_ref():
        return ir.RefAttr(attribute.name, given.ref_attr_name or "", attribute.type)
    return ir.Attr(attribute.name, given.type, given.value)
