"""The same from its definition, for the gates; torch stays out of the method's own module."""

from toy_reduction import Longest
from vtr_export.reference.reductions.seen import Reduced, Seen


def reduce(reduction: Longest, seen: Seen) -> Reduced:
    """Square, sum, sort."""
    lengths = (seen.features.float() ** 2).sum(-1)
    order = lengths.argsort(descending=True, stable=True)
    kept = order[: reduction.count(seen.tower)].sort().values
    return Reduced(seen.features[kept], kept)
