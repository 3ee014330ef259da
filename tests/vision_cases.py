"""Vision encoders traced once; a reduction in a copy of one, run, and held against its oracle."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import tiny_internvl
import tiny_models
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from vtr_export.checkpoint import Checkpoint
from vtr_export.compile import canonical, copied, run
from vtr_export.families import ModelFacts, read_facts, tower_of
from vtr_export.frontends.transformers import load
from vtr_export.passes.reduce_vision import ReduceVision
from vtr_export.reductions import Tower, VisionReduction
from vtr_export.reference.inputs import image_features
from vtr_export.reference.load import with_held
from vtr_export.reference.reducing import projector_name, reduced_features
from vtr_export.reference.reductions.seen import Reduced
from vtr_export.schedule import Schedule
from vtr_export.weights import write_weights

DIGITS = Path(__file__).parents[1] / "samples" / "digits" / "model"
SIDE, PATCH = 42, 7  # pixels: 6 by 6 tokens
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Traced:
    """A checkpoint's vision encoder as every pass before reductions leaves it, and its model."""

    model: Any
    facts: ModelFacts
    tower: Tower
    graph: ir.Model
    held: Mapping[str, Tensor]  # weights of trained reductions
    dtype: str

    def reduced(self, text: str, pixels: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The graph's outputs by name, with the ``vision`` entries that ``text`` lists."""
        session = _session(self.key, text, self.dtype)
        pixels = pixels.astype(np.float16 if self.dtype == "fp16" else np.float32)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {"pixel_values": pixels}), strict=True))

    def defined(self, text: str, pixels: np.ndarray[Any, Any]) -> list[Reduced]:
        """Of each image, what the reference leaves."""
        given = {"pixel_values": torch.from_numpy(pixels)}
        encode = partial(image_features, self.model)
        return reduced_features(self.model, given, entries(text), self.tower, encode)

    @property
    def key(self) -> str:
        """Its name in MODELS."""
        return str(self.model.name_or_path)


def entries(text: str) -> tuple[VisionReduction, ...]:
    """The ``vision`` part of a schedule: a list in YAML, ``[{method: …}]``."""
    found: tuple[VisionReduction, ...] = Schedule.parse(
        f"version: 1\nvision: {text}"
    ).document.vision
    return found


def _llava(vision: CLIPVisionConfig | SiglipVisionConfig) -> LlavaForConditionalGeneration:
    is_clip = isinstance(vision, CLIPVisionConfig)
    text = LlamaConfig(**{**tiny_models.TEXT, "num_hidden_layers": 2})
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tiny_models.IMAGE,
            image_seq_length=(SIDE // PATCH) ** 2,
            vision_feature_select_strategy="default" if is_clip else "full",
            vision_feature_layer=-2 if is_clip else -1,
            tie_word_embeddings=False,
        )
    )
    tiny_models.randomize(model, 0)
    return model.eval()


def make_clip(folder: Path) -> Path:
    """CLIP and LLaMA, random: the features are those before the tower's last layer."""
    return tiny_models.save_checkpoint(_llava(CLIPVisionConfig(projection_dim=16, **TOWER)), folder)


def make_siglip(folder: Path) -> Path:
    """SigLIP and LLaMA, random: no class token, all layers feed the projector."""
    return tiny_models.save_checkpoint(
        _llava(SiglipVisionConfig(vision_use_head=False, **TOWER)), folder
    )


def make_internvl(folder: Path) -> Path:
    """InternVL, random: a token is two by two patches."""
    tiny_internvl.internvl(folder)
    return folder


MODELS = {"clip": make_clip, "siglip": make_siglip, "internvl": make_internvl}
"""What makes each checkpoint; ``digits`` is there already."""


@cache
def checkpoint(name: str) -> Path:
    """Its folder."""
    return DIGITS if name == "digits" else MODELS[name](Path(mkdtemp(prefix=f"vtr-{name}-")))


@cache
def traced(name: str, dtype: str = "fp32") -> Traced:
    """One of MODELS, or ``digits``."""
    torch.set_num_threads(1)
    folder = checkpoint(name)
    opened = Checkpoint.open(folder)
    facts = read_facts(opened.config, str(folder))
    tower = tower_of(facts)
    assert tower is not None
    graph = run(canonical(), load(opened, facts, dtype, whole=True).vision_encoder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    model.name_or_path = name
    held = {**sampler(model.eval(), facts, tower), **wide_projector(tower)}
    return Traced(with_held(model, held), facts, tower, graph, held, dtype)


@torch.no_grad()
def sampler(model: Any, facts: ModelFacts, tower: Tower) -> dict[str, Tensor]:
    """FocusLLaVA's router, random, where the usual features are the middle: it takes every scale."""
    seen = list[Tensor]()
    projector = model.get_submodule(projector_name(model))
    handle = projector.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    image_features(model, {"pixel_values": torch.from_numpy(noise(facts, 4, 1))})
    handle.remove()
    (reduction,) = entries("[{method: focusllava}]")
    generator = torch.Generator().manual_seed(0)
    shapes = reduction.weights(tower).items()
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes}
    inner, bias, *_ = found
    found[bias] = -found[inner] @ seen[0].flatten(0, 1).mean(0)
    return found


def wide_projector(tower: Tower) -> dict[str, Tensor]:
    """Pixel shuffle's own, random."""
    (reduction,) = entries("[{method: pixel_shuffle}]")
    generator = torch.Generator().manual_seed(0)
    shapes = reduction.weights(tower).items()
    return {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes
    }


def graph_of(name: str, text: str, dtype: str = "fp32") -> ir.Model:
    """A copy of a traced encoder, reduced."""
    own = traced(name, dtype)
    held = {weight: ir.tensor(values.numpy()) for weight, values in own.held.items()}
    passes = (
        ReduceVision(entries(text), own.tower, held),
        RemoveUnusedNodesPass(),
        TopologicalSortPass(),
        *copied(),
    )
    return run(passes, own.graph.clone())


@cache
def file_of(name: str, text: str, dtype: str = "fp32") -> Path:
    """The reduced encoder, written."""
    folder = Path(mkdtemp(prefix="vtr-reduced-"))
    model = graph_of(name, text, dtype)
    write_weights({"vision_encoder": model}, folder)
    ir.save(model, folder / "vision_encoder.onnx")
    return folder / "vision_encoder.onnx"


@cache
def _session(name: str, text: str, dtype: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file_of(name, text, dtype), options)


def pictures(name: str, count: int = 2, seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth noise as the encoder takes it, ``[count, 3, H, W]``: near patches look alike."""
    return noise(traced(name).facts, count, seed)


def noise(facts: ModelFacts, count: int, seed: int) -> np.ndarray[Any, Any]:
    """``pictures`` of a model."""
    side = facts.vision.image_size  # type: ignore[union-attr]  # it has a tower
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    fine = torch.randn(count, 3, side, side, generator=generator)  # type: ignore[arg-type]
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    found: np.ndarray[Any, Any] = (smooth + 0.2 * fine).numpy()
    return found


def rows_of(said: Mapping[str, np.ndarray[Any, Any]], images: int) -> list[np.ndarray[Any, Any]]:
    """``image_features`` of each image, packed or not."""
    features = said["image_features"]
    if "image_counts" not in said:
        return [features[image] for image in range(images)]
    ends = np.cumsum(said["image_counts"])
    return np.split(features, ends[:-1])


def worst(mine: Sequence[np.ndarray[Any, Any]], theirs: Sequence[Tensor]) -> float:
    """Largest difference, by the largest value; infinite for unlike shapes."""
    errors = []
    for own, other in zip(mine, theirs, strict=True):
        expected = other.numpy()
        if own.shape != expected.shape:
            return float("inf")
        errors.append(
            float(np.abs(own - expected).max(initial=0) / (1 + np.abs(expected).max(initial=0)))
        )
    return max(errors)
