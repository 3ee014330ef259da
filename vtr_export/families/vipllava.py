"""VipLLaVA: LLaVA with features of several layers, normed before they are projected."""

from dataclasses import replace

from vtr_export.families.facts import ModelFacts
from vtr_export.families.llava import llava
from vtr_export.families.section import Config


def vipllava(config: Config, where: str) -> ModelFacts:
    """It always drops the CLS token, and its projector has biases, whatever the file says."""
    fixed = {"vision_feature_select_strategy": "default", "multimodal_projector_bias": True}
    facts = llava({**config, **fixed}, where)
    width = (facts.projector_macs - facts.hidden**2) // facts.hidden  # of what is projected
    return replace(facts, projector_parameters=facts.projector_parameters + 2 * width)
