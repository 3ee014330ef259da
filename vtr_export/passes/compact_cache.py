"""The graph that runs once behind a prefill: what later layers dropped leaves every cache."""

from collections.abc import Mapping, Sequence
from typing import Final

import onnx_ir as ir

from vtr_export.errors import AnalysisError
from vtr_export.ops import Choice
from vtr_export.passes.build import Build

GRAPH: Final = "compact_cache"
PAST, PRESENT = "past_key_values.", "present."
PAST_MASK, PRESENT_MASK, KEPT = "past_mask.", "present_mask.", "kept."
_TOKENS: Final = 2  # the axis of a cache [B, kv_heads, tokens, head_dim]


def compact_cache(decoder: ir.Model) -> ir.Model | None:
    """What gathers the caches between a decoder's first and last cut to the last stage's tokens.

    Its inputs are outputs of the decoder, its outputs are the next call's inputs, shorter::

        columns = kept.2; columns' = GatherElements(kept.1, columns)     # of stage 2, of stage 1
        past_key_values.3.key = VtrNarrowCache(present.3.key, VtrCacheColumns(columns', …))

    Tokens of earlier calls stay. None with fewer than two cuts: all caches are as short already.
    MustDrop, arXiv 2411.10803, section 3.4. Its code leaves layers 0 and 1 whole, though it cuts
    behind layer 2 first; here a mask is a stage's, so layers are narrowed from the first cut on.
    """
    inputs = {value.name or "": value for value in decoder.graph.inputs}
    masks = _numbered(inputs, PAST_MASK)
    if len(masks) < 2:
        return None
    imports = {"": decoder.opset_imports.get("", 24)}
    graph = ir.Graph([], [], nodes=[], opset_imports=imports, name=GRAPH)
    model = ir.Model(graph, ir_version=decoder.ir_version)
    caches = [_caches(inputs, mask) for mask in masks[:-1]]
    _Compaction(Build(model, Choice(), "compact"), caches).write()
    return model


def _numbered(inputs: Mapping[str, ir.Value], start: str) -> list[ir.Value]:
    """``<start>0``, ``<start>1``, … as far as they go."""
    count = sum(name.startswith(start) for name in inputs)
    return [inputs[f"{start}{number}"] for number in range(count)]


def _caches(inputs: Mapping[str, ir.Value], mask: ir.Value) -> list[ir.Value]:
    """The caches as long as ``mask`` [B, past of a stage]; AnalysisError for another layout."""
    assert mask.shape is not None
    length, found = str(mask.shape[1]), []
    for name, value in inputs.items():
        dims = [str(dim) for dim in value.shape or ()]
        if not name.startswith(PAST) or length not in dims:
            continue
        if len(dims) != 4 or dims.index(length) != _TOKENS:
            raise AnalysisError(
                f"the cache {name} is {dims}, not [batch, heads, tokens, width]",
                where=f"input {name}",
                hint="leave decode out of the schedule",
            )
        found.append(value)
    return found


class _Compaction:
    """One graph; ``caches[J]`` are the inputs of the stage behind cut J, the last stage's apart."""

    def __init__(self, build: Build, caches: Sequence[Sequence[ir.Value]]) -> None:
        self.build, self.caches = build, caches
        self.cuts = range(len(caches) + 1)
        self.masks = [self._given(PRESENT_MASK, cut, "total") for cut in self.cuts]
        self.kept = [self._given(KEPT, cut, "sequence") for cut in self.cuts]

    def write(self) -> None:
        """Every stage between the cuts."""
        for cut, columns in zip(self.cuts, self._columns(), strict=False):
            self.build.prefix = f"stage.{cut + 1}"
            own, mask = self.kept[cut], self.masks[cut]
            last = self.masks[-1], self.kept[-1]
            compacted = self.build.call("VtrCacheMask", [mask, own, *last], "mask")
            name = f"{PAST_MASK}{cut}"
            self.build.graph_output(compacted, name, ["batch", f"past_{cut + 1}"])
            at = self.build.call("VtrCacheColumns", [columns, own, mask], "columns")
            for past in self.caches[cut]:
                self._narrow(past, at, cut + 1)

    def _columns(self) -> list[ir.Value]:
        """``[B, S_last]`` by stage: the columns, among this call's own, of what is left at last."""
        columns = [self.kept[-1]]
        for kept in reversed(self.kept[1:-1]):
            inputs, name = [kept, columns[0]], f"columns.{len(columns)}"
            columns.insert(0, self.build.op("GatherElements", inputs, name, axis=1))
        return columns

    def _narrow(self, past: ir.Value, columns: ir.Value, stage: int) -> None:
        name, dims = (
            past.name or "",
            [d if isinstance(d, int) else str(d) for d in past.shape or ()],
        )
        assert past.dtype is not None
        wide = [*dims[:_TOKENS], f"total_{stage}", *dims[_TOKENS + 1 :]]
        stem = name.removeprefix(PAST)
        present = self.build.graph_input(f"{PRESENT}{stem}", wide, past.dtype)
        narrow = self.build.call("VtrNarrowCache", [present, columns], stem)
        narrow.name, narrow.type, narrow.shape = name, past.type, ir.Shape(dims)
        self.build.graph.outputs.append(narrow)

    def _given(self, start: str, cut: int, length: str) -> ir.Value:
        shape = ["batch", f"{length}_{cut + 1}"]
        return self.build.graph_input(f"{start}{cut}", shape, ir.DataType.INT64)
