"""How a family's images become features: what is traced, and on what inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from vtr_export.families import ModelFacts
from vtr_export.frontends.families import (
    idefics,
    idefics2,
    idefics3,
    internvl,
    llava,
    mllama,
    mplug_owl3,
    pixtral,
    qformer,
    qwen_vl,
    video_llava,
    vlora,
)
from vtr_export.frontends.feeds import Feed, VisionGraph
from vtr_export.frontends.generic import accessor


class VisionEncoder(Module):
    """The feeds in order → image_features [..., hidden]; and what leaves the layer ``last``."""

    def __init__(
        self,
        model: PreTrainedModel,
        graph: VisionGraph,
        names: Sequence[str],
        last: Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.graph, self.names, self._last = model, graph, names, (last,)

    def forward(self, *feeds: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Encode and project."""
        named, (last,) = dict(zip(self.names, feeds, strict=True)), self._last
        if last is None:
            return self.graph.forward(self.model, **named)
        heard = list[Tensor]()
        handle = last.register_forward_hook(lambda *said: heard.append(_stream(said[-1])))
        try:
            return self.graph.forward(self.model, **named), heard[-1]
        finally:
            handle.remove()


def _stream(said: Any) -> Tensor:
    """What a layer gives, alone or with what it attended to."""
    found: Tensor = said if isinstance(said, Tensor) else said[0]
    return found


def one_size(facts: ModelFacts, dtype: torch.dtype) -> dict[str, Feed]:
    """``pixel_values`` [images, channels, H, W] of the one size that the tower takes."""
    vision = facts.vision
    assert vision is not None
    assert vision.image_size is not None
    side = vision.image_size
    pixels = torch.empty(2, vision.channels, side, side, dtype=dtype)
    return {"pixel_values": Feed(pixels, ("images", None, None, None))}


def whole_images(model: Any, pixel_values: Tensor) -> Tensor:
    """[images, tokens, D], by the model's own accessor."""
    found = accessor(model)(pixel_values).pooler_output
    return found if isinstance(found, Tensor) else torch.stack(list(found))


GRAPHS: Final[Mapping[str, VisionGraph]] = {
    **dict.fromkeys(("idefics3", "smolvlm"), VisionGraph(idefics3.features, one_size)),
    "idefics": VisionGraph(idefics.keys, one_size),
    "instructblip": VisionGraph(qformer.asked, qformer.image_and_question),
    "internvl": VisionGraph(internvl.features, one_size),
    "idefics2": VisionGraph(idefics2.resampled, idefics2.patches),
    "aya_vision": VisionGraph(llava.projected, one_size),
    "llava": VisionGraph(llava.projected, one_size),
    "mllama": VisionGraph(mllama.projected, mllama.tiles),
    "llava_next": VisionGraph(llava.packed, llava.tiles),
    "llava_onevision": VisionGraph(llava.blended, llava.blended_tiles),
    "mplug_owl3": VisionGraph(mplug_owl3.keys, one_size),
    "vlora": VisionGraph(vlora.weights, one_size),
    "video_llava": VisionGraph(video_llava.packed, video_llava.images_and_frames),
    **dict.fromkeys(qwen_vl.KINDS, VisionGraph(qwen_vl.merged, qwen_vl.patches)),
}


TOWERS: Final[Mapping[str, VisionGraph]] = {  # of a tower, whatever the family
    "pixtral": VisionGraph(pixtral.merged, qwen_vl.patches),
}


def vision_graph(facts: ModelFacts) -> VisionGraph:
    """The tower's or the family's own, or its model's accessor on images of one size."""
    own = TOWERS.get(facts.vision.kind) if facts.vision is not None else None
    return own or GRAPHS.get(facts.model_type, VisionGraph(whole_images, one_size))
