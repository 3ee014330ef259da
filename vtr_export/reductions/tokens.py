"""A vision encoder's graph as a reduction sees it: values to read, operators to call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtr_export.reductions.tower import Tower


@dataclass(frozen=True)
class Tokens:
    """What a reduction leaves of the tokens of each image; I images, K tokens at most.

    ``features`` [I,K,C] are what the projector takes. ``counts`` [I] int64: only so many of an
    image's are tokens, and they come first; None: all K. ``source`` [I,K] int64: which of the
    image's own tokens each one was, -1 for one that stands for several; None: none is one of them.
    ``protected`` [I,K] bool: not to be dropped by any later phase. ``projected`` [I,K,D]: what the
    projector would give, where the reduction has it from ``Images.projected``.
    """

    features: ir.Value
    counts: ir.Value | None = None
    source: ir.Value | None = None
    protected: ir.Value | None = None
    projected: ir.Value | None = None


class Images(Protocol):
    """The graph of a vision encoder while its tokens are reduced; n = ``tower.sequence``.

    Layers are counted from 0, or from the tower's last (-1), whether they feed the projector or
    not.
    """

    tower: Tower

    @property
    def features(self) -> ir.Value:
        """``[I,N,C]``: what the projector takes, N = ``tower.grid.tokens``."""
        ...

    @property
    def projected(self) -> ir.Value:
        """``[I,N,D]``: what the projector gives for ``features``."""
        ...

    def query(self, layer: int) -> ir.Value:
        """``[I,H,n,d]`` of a layer's attention."""
        ...

    def key(self, layer: int) -> ir.Value:
        """``[I,H,n,d]`` of a layer's attention."""
        ...

    def scale(self, layer: int) -> float:
        """The factor of that attention's logits."""
        ...

    def attention_to(self, layer: int, heads: str = "mean") -> ir.Value:
        """``[I,N]`` fp32: how much the tower looks at each token in a layer.

        The class token's attention; where there is none, the mean of all patches'. Over heads
        their ``mean`` or ``sum``; over the patches of a token their mean.
        """
        ...

    def attended(self, layer: int) -> ir.Value:
        """``[I,n,D]``: the residual stream between a layer's attention and its MLP."""
        ...

    def left(self, layer: int) -> ir.Value:
        """``[I,n,D]``: the residual stream behind a layer."""
        ...

    def replace(self, stream: ir.Value, by: ir.Value) -> None:
        """Give whoever reads ``stream`` another one, of another length; what made it stays."""
        ...

    def weight(self, name: str) -> ir.Value:
        """A weight of the checkpoint that the reduction's own ``weights`` names, as stored."""
        ...

    def show_only(self, mask: ir.Value, layer: int) -> None:
        """Let the attentions behind ``layer`` see only what ``mask`` ``[I,1,n,n]`` bool says."""
        ...

    def call(
        self, operator: str, inputs: Sequence[ir.Value], names: Sequence[str], **attributes: float
    ) -> Sequence[ir.Value]:
        """One of our operators (``graphs/ops``); an attribute is an int or a float."""
        ...

    def op(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int
    ) -> ir.Value:
        """A standard operator with one output."""
        ...

    def constant(self, values: Sequence[int], name: str) -> ir.Value:
        """An int64 vector."""
        ...
