"""Fold what follows from constants alone; weights are never read."""

import onnx_ir as ir

SMALL = 1024  # elements; larger results stay computed


class FoldConstants(ir.passes.InPlacePass):
    """Evaluate constant subgraphs (axes, slice bounds), leaving every weight where it lies.

    Before::

        axis = Cast(Constant(0)); starts = Reshape(axis, [-1]); Slice(x, starts, …)

    After::

        Slice(x, Constant([0]), …)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Hide the weights, fold, and show them again."""
        from onnxscript.optimizer import fold_constants

        weights = {
            name: value.const_value
            for name, value in model.graph.initializers.items()
            if not isinstance(value.const_value, ir.Tensor)
        }
        for name in weights:
            model.graph.initializers[name].const_value = None
        try:
            folded = fold_constants(
                model,
                onnx_shape_inference=False,
                input_size_limit=SMALL,
                output_size_limit=SMALL,
            )
        finally:
            for name, tensor in weights.items():
                model.graph.initializers[name].const_value = tensor
        return ir.passes.PassResult(model, modified=bool(folded.modified))
