"""What we must know of a model before reading a weight: facts from its config.json."""

from vtr_export.families.decoders import DECODERS
from vtr_export.families.facts import Anyres, Attends, Features, ModelFacts, Sight, VisionFacts
from vtr_export.families.foreign import RAN, own_code
from vtr_export.families.read import FAMILIES, read_facts
from vtr_export.families.reducible import tower_of
from vtr_export.families.towers import TOWERS

__all__ = [
    "DECODERS",
    "FAMILIES",
    "RAN",
    "TOWERS",
    "Anyres",
    "Attends",
    "Features",
    "ModelFacts",
    "Sight",
    "VisionFacts",
    "own_code",
    "read_facts",
    "tower_of",
]
