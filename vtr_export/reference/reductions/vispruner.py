"""VisPruner (arXiv 2412.01818 v2): tokens that matter, and others thinned out round by round."""

import torch

from vtr_export.keeps import tokens_of
from vtr_export.reductions.vispruner import VisPruner
from vtr_export.reference.reductions.seen import Reduced, Seen


def reduce(reduction: VisPruner, seen: Seen) -> Reduced:
    """In raster order."""
    score = seen.attention_to(reduction.layer)
    listed = torch.sort(score, descending=True, stable=True).indices
    wanted = tokens_of(reduction.keep, len(score))
    ranked = tokens_of(reduction.important, wanted)
    kept = torch.cat((listed[:ranked], _thinned(seen, listed[ranked:], wanted - ranked)))
    kept = kept.sort().values
    return Reduced(seen.features[kept], kept)


def _thinned(seen: Seen, listed: torch.Tensor, wanted: int) -> torch.Tensor:
    """``wanted`` of the tokens ``listed``: up to 8 at even places leave in a round."""
    if not wanted:
        return listed[:0]
    unit = torch.nn.functional.normalize(seen.features.float(), dim=1)
    place = {int(token): number for number, token in enumerate(listed)}
    while len(listed) > wanted:
        even, odd = listed[::2], listed[1::2]
        most = (unit[even] @ unit[odd].T).max(1).values.tolist()
        ordered = sorted(range(len(even)), key=lambda i: (-most[i], place[int(even[i])]))
        listed = torch.cat((even[ordered[min(8, len(listed) - wanted) :]], odd))
    return listed
