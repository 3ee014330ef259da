"""A published decoder beside the PyTorch reference, keep-sets forced, prefill and decode."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from vtr_export.passes.force_keep_sets import ForceKeepSets
from vtr_export.reference import Reference
from vtr_export.retrofit.cut import Request
from vtr_export.retrofit.retrofit import Report, retrofit
from vtr_export.schedule import Resolved, Schedule

IMAGE, TEXT, STEPS, BATCH, PADS = 8, 5, 3, 2, 2
STAGES = (
    "version: 1\nprefill:\n  stages: [{before_layer: 1, keep: 5}, {before_layer: 2, keep: 2}]\n"
)


class Shape:
    """What a schedule asks of a model."""

    tokens_per_image, mrope = IMAGE, False

    def __init__(self, layers: int) -> None:
        self.layers = layers


def cut(file: Path, folder: Path, text: str = STAGES, **options: Any) -> Report:
    """``vtr export --onnx``."""
    schedule = folder / "schedule.yaml"
    schedule.write_text(text)
    request = Request(file, schedule, folder / "cut", IMAGE, **options)
    return retrofit(request)


def resolved(report: Report) -> Resolved:
    """The schedule that was published."""
    return Schedule.load(Path(report.artifact) / "schedule.yaml").resolve(Shape(report.layers))


def forced(report: Report) -> onnxruntime.InferenceSession:
    """The published graph, told what to keep."""
    folder = Path(report.artifact)
    model = ir.load(folder / "decoder.onnx")
    for step in (ForceKeepSets(), RemoveUnusedNodesPass(), TopologicalSortPass()):
        step(model)
    ir.save(model, folder / "forced.onnx")
    return opened(folder / "forced.onnx")


def opened(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(file), options)


def assert_parity(report: Report, model: Any, atol: float = 2e-4, dtype: Any = np.float32) -> None:
    """Prefill and steps, left-padded rows, by forced keep-sets; and the free ones agree."""
    reference = Reference(model.model, model.lm_head, resolved(report))
    force, free = forced(report), opened(Path(report.artifact) / "decoder.onnx")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (BATCH, IMAGE + TEXT), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    vision = (torch.arange(IMAGE) + PADS).expand(BATCH, IMAGE)
    cache, step = {}, None
    for _ in range(STEPS + 1):
        embeds = model.get_input_embeddings()(ids)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        step = reference(embeds, mask, positions, vision, step.cache if step else None)
        feeds = {
            "inputs_embeds": embeds.detach().numpy().astype(dtype),
            "input_ids": ids.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": positions.numpy(),
            "vision_index": vision.numpy(),
        }
        sets = {f"kept.{j}": each.numpy() for j, each in enumerate(step.kept)}
        sets |= {f"kept_vision.{j}": each.numpy() for j, each in enumerate(step.kept_vision)}
        known = cache or None
        found = called(force, feeds | sets, known, dtype)
        np.testing.assert_allclose(
            found["logits"][:, -1:].astype(np.float32), step.logits.numpy(), atol=atol, rtol=1e-3
        )
        alone = called(free, feeds, known, dtype)
        for j, kept in enumerate(step.kept):
            if float(step.margins[j].min()) > 1e-4:
                np.testing.assert_array_equal(alone[f"kept.{j}"], kept.numpy())
        cache = carried(found)
        ids = step.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        vision = vision[:, :0]


def called(
    session: onnxruntime.InferenceSession,
    feeds: dict[str, Any],
    cache: dict[str, Any] | None,
    dtype: Any,
) -> dict[str, Any]:
    """One call; an empty cache before the first."""
    given = {}
    for value in session.get_inputs():
        if value.name in feeds:
            given[value.name] = feeds[value.name]
        elif cache is not None:
            given[value.name] = cache[value.name]
        elif value.name.startswith("past_mask"):
            given[value.name] = np.zeros((BATCH, 0), np.int64)
        else:
            heads, width = value.shape[1], value.shape[3]
            given[value.name] = np.zeros((BATCH, heads, 0, width), dtype)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


def carried(found: dict[str, Any]) -> dict[str, Any]:
    """Every present is the next past."""
    swaps: Sequence[tuple[str, str]] = (
        ("present_mask", "past_mask"),
        ("present", "past_key_values"),
    )
    cache = {}
    for name, value in found.items():
        for old, new in swaps:
            if name.startswith(f"{old}."):
                cache[name.replace(old, new)] = value
    return cache
