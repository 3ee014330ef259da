"""FasterVLM (arXiv 2412.01818): the tokens with the most attention of the class token."""

from vtr_export.reductions.fastervlm import FasterVLM
from vtr_export.reference.reductions.seen import Reduced, Seen, best


def reduce(reduction: FasterVLM, seen: Seen) -> Reduced:
    """In raster order."""
    kept = best(seen.attention_to(reduction.layer), reduction.count(seen.tower))
    return Reduced(seen.features[kept], kept)
