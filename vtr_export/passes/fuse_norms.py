"""Recognise root-mean-square norms; the rules are onnxscript's."""

import onnx_ir as ir


class FuseNorms(ir.passes.InPlacePass):
    """Turn a decomposed RMS norm into one node that computes in fp32.

    Before::

        Mul(scale, Cast(Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), epsilon))))))

    After::

        RMSNormalization(x, scale)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the fusion rules until none matches."""
        from onnxscript.rewriter.rules.fusion import _rms_normalization

        count = _rms_normalization.fuse_rms_normalization(model)
        return ir.passes.PassResult(model, modified=bool(count))
