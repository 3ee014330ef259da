"""Behind a stream that became shorter, no shape says how long it was."""

import numpy as np
import onnx_ir as ir

from vtr_export.analysis.layers import descendants


def open_lengths(stream: ir.Value, *lengths: int) -> None:
    """Let everything computed from ``stream`` have any length where it had one of ``lengths``.

    Constant targets of Reshape keep their other numbers: ``[0, 145, 4, 32]`` becomes
    ``[0, -1, 4, 32]``.
    """
    for node in descendants(stream):
        if node.op_type == "Reshape" and node.domain == "":
            _open_target(node, lengths)
        for value in node.outputs:
            if value.shape is not None:
                kept = [None if dim in lengths else dim for dim in value.shape]
                value.shape = ir.Shape(kept)


def _open_target(node: ir.Node, lengths: tuple[int, ...]) -> None:
    target = node.inputs[1]
    tensor = ir.convenience.get_const_tensor(target) if target is not None else None
    if target is None or tensor is None:
        return
    old = [int(size) for size in tensor.numpy().reshape(-1)]
    places = [at for at, size in enumerate(old) if size in lengths and at > 0]
    if not places or -1 in old:
        return
    new = [-1 if at == places[0] else size for at, size in enumerate(old)]
    assert node.graph is not None
    opened = ir.tensor(np.array(new, np.int64), name=f"{target.name}.open")
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", opened)])
    constant.outputs[0].name, constant.outputs[0].const_value = opened.name, opened
    node.graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
