"""Video-LLaVA: LLaVA with two towers, one for images and one for the frames of videos."""

from dataclasses import replace

from vtr_export.families.facts import ModelFacts
from vtr_export.families.llava import llava
from vtr_export.families.section import Config


def video_llava(config: Config, where: str) -> ModelFacts:
    """Both towers are exported; a frame keeps its CLS token, an image as LLaVA says."""
    facts = llava(config, where)
    assert facts.vision is not None
    return replace(facts, vision=replace(facts.vision, parameters=2 * facts.vision.parameters))
