"""The composite that a fused kernel may replace: its name, its ports, and what its node says."""

from typing import Final

import onnx_ir as ir

from vtr_export.ops.functions import BLOCK_SCORES, DOMAIN, Choice

PRUNE: Final = "VtrTopKPrune"
PROTECT: Final = "VtrProtectPrune"
THRESHOLD: Final = "VtrThresholdPrune"
SCORED: Final = "VtrScoredPrune"
CORRELATE: Final = "VtrCorrelatePrune"
RATERS: Final = "VtrRaterPrune"
RECYCLE: Final = "VtrRecyclePrune"
RATER_RECYCLE: Final = "VtrRaterRecyclePrune"
CUTS: Final = frozenset(
    (PRUNE, PROTECT, THRESHOLD, SCORED, CORRELATE, RATERS, RECYCLE, RATER_RECYCLE)
)
"""What stands for a cut: its first six inputs, its last and its outputs are those of PRUNE.

Where tokens are recycled a fourth output says whose cluster each vision token is, [B,V] or -1.
"""
BLOCKS: Final = "VtrVisionBlocks"
"""(query, keys, mask, vision_index, hidden) → what vision rows [B,V,V] and asking rows [B,V,R] give
each vision key, which vision tokens are real [B,V], and which rows ask [B,R]."""
PLUGIN_NAMESPACE: Final = DOMAIN
PLUGIN_VERSION: Final = "1"
INPUTS: Final = ("query", "keys", "mask", "vision_index", "keep", "budget", "hidden")
OUTPUTS: Final = ("kept_hidden", "indices", "kept_vision_index")
SHAPE_INPUTS: Final = (INPUTS.index("keep"),)
FIELDS: Final = ("scale", "query", "heads", "rank")
"""What a kernel is told: the factor of the logits, and the choice the body was resolved with."""


def is_prune(node: ir.Node) -> bool:
    """Whether ``node`` is the cut that a kernel may replace."""
    return (node.domain, node.op_type) == (DOMAIN, PRUNE)


def is_cut(node: ir.Node) -> bool:
    """Whether ``node`` is a cut."""
    return node.domain == DOMAIN and node.op_type in CUTS


def scoring(cut: ir.Node) -> list[ir.Node]:
    """New nodes whose last has one output: what ``cut`` ranks by, ``[B, V]``."""
    *first, hidden = [*cut.inputs[:4], cut.inputs[-1]]
    if cut.op_type in (SCORED, CORRELATE):
        return _block_scoring(cut)
    said = [cut.attributes[name] for name in ("scale", "whole", "single") if name in cut.attributes]
    if cut.op_type == THRESHOLD:
        return [ir.Node(DOMAIN, "VtrEvidence", [*first, cut.inputs[-2], hidden], said)]
    if cut.op_type in (RATERS, RATER_RECYCLE):
        return [ir.Node(DOMAIN, "VtrRaterScore", [*first, cut.inputs[-2], hidden], said)]
    score = ir.Node(DOMAIN, "VtrScore", [*first, hidden], said)
    if cut.op_type == PROTECT:
        return [score, ir.Node(DOMAIN, "VtrProtect", [score.outputs[0], cut.inputs[-2]])]
    return [score]


def _blocks(cut: ir.Node) -> ir.Node:
    told = [*cut.inputs[:4], cut.inputs[-1]]
    return ir.Node(DOMAIN, BLOCKS, told, [cut.attributes["scale"]], num_outputs=4)


def _block_scoring(cut: ir.Node) -> list[ir.Node]:
    blocks = _blocks(cut)
    ranks = BLOCK_SCORES[cut.attributes["rule"].as_string()]
    return [blocks, ir.Node(DOMAIN, ranks, blocks.outputs)]


def narrowing(cut: ir.Node, kept: ir.Value, *chosen: ir.Value) -> list[ir.Node]:
    """New nodes whose last makes what ``cut`` makes of its hidden states, with its outputs given.

    ``kept`` and ``chosen``: those but the first.
    """
    hidden = cut.inputs[-1]
    if cut.op_type in (RECYCLE, RATER_RECYCLE):
        vision, label = chosen
        asked = [cut.inputs[3], label, kept, vision, cut.inputs[4], hidden]
        return [ir.Node(DOMAIN, "VtrMerge", asked)]
    if cut.op_type != CORRELATE:
        return [ir.Node(DOMAIN, "VtrNarrow", [hidden, kept])]
    blocks = _blocks(cut)  # a function that the cut was resolved with, as is what merges
    said = [cut.attributes[name] for name in ("direct", "nearest")]
    asked = [*blocks.outputs, cut.inputs[3], kept, hidden]
    return [blocks, ir.Node(DOMAIN, "VtrMergeCorrelated", asked, said)]


def prune_attributes(scale: float, choice: Choice) -> list[ir.Attr]:
    """Everything on the node of a cut.

    The body reads ``scale`` only. The others are for a TensorRT plugin of the node's name: the
    ``plugin_*`` pair makes the parser prefer it to the body where it is registered, and
    ``tensorrt_plugin_shape_input_indices`` tells it that keep decides an output's length. No
    plugin bends logits: with a softcap the body runs.
    """
    told = [
        ir.AttrFloat32("scale", scale),
        ir.AttrString("query", choice.query),
        ir.AttrString("heads", choice.heads),
        ir.AttrString("rank", choice.rank),
    ]
    if choice.softcap is not None:
        return told
    return [
        *told,
        ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE),
        ir.AttrString("plugin_version", PLUGIN_VERSION),
        ir.AttrInt64s("tensorrt_plugin_shape_input_indices", SHAPE_INPUTS),
    ]
