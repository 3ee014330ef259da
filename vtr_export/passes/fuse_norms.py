"""Recognise root-mean-square norms; the rules are onnxscript's."""

from typing import Any

import onnx_ir as ir


class FuseNorms(ir.passes.InPlacePass):
    """Turn a decomposed RMS norm into one node that computes in fp32.

    Before::

        Mul(scale, Cast(Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), epsilon))))))

    After::

        RMSNormalization(x, scale)

    ``scale`` has one entry for each feature; a norm times anything else stays what it is. A wider
    ``scale`` (Gemma: ``1 + weight`` in fp32) widens ``x``: mixed types mean different things to
    different checkers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the fusion rules until none matches."""
        from onnxscript.rewriter import pattern
        from onnxscript.rewriter.rules.fusion import _rms_normalization as rules

        class OneScaleAFeature(rules.RmsNormFusion):  # type: ignore[misc]  # a wheel without types
            def check(self, op: Any, x: ir.Value, scale: ir.Value, **others: Any) -> Any:
                if _is_one_a_feature(x, scale):
                    return super().check(op, x, scale, **others)
                return pattern.MatchResult().fail("The scale is no vector over features.", scale)

            def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, **others: Any) -> Any:
                if scale.dtype == ir.DataType.FLOAT and x.dtype != scale.dtype:
                    wide = op.Cast(x, to=ir.DataType.FLOAT)
                    wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
                    x = wide
                return super().rewrite(op, x, scale, **others)

        ordered = [
            OneScaleAFeature.rule(f"norm.{order}", mul_order=order) for order in (True, False)
        ]
        count = pattern.RewriteRuleSet(ordered).apply_to_model(model)
        return ir.passes.PassResult(model, modified=bool(count))


def _is_one_a_feature(x: ir.Value, scale: ir.Value) -> bool:
    if x.shape is None or scale.shape is None or len(scale.shape) != 1:
        return False
    return isinstance(scale.shape[0], int) and scale.shape[0] == x.shape[-1]
