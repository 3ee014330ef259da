"""Methods of the literature as words of the schedule: one file, one method, a few operators each.

Those of other packages are found by the entry points ``vtr_export.reductions``: ``registry`` lists
all. It is not imported here, for what it finds imports from here.
"""

from vtr_export.reductions.reduction import Reduction, VisionReduction
from vtr_export.reductions.tokens import Images, Tokens
from vtr_export.reductions.tower import Grid, Tower

__all__ = [
    "Grid",
    "Images",
    "Reduction",
    "Tokens",
    "Tower",
    "VisionReduction",
]
