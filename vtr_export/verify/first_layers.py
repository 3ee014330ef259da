"""The first layers of a checkpoint, exported again for a verification that fits into memory."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np

from vtr_export.assemble import save_graphs
from vtr_export.checkpoint import Checkpoint, read_json
from vtr_export.compile import lower
from vtr_export.errors import InputError
from vtr_export.families import read_facts
from vtr_export.manifest import Manifest
from vtr_export.passes.compact_cache import GRAPH as COMPACTION
from vtr_export.schedule import Resolved
from vtr_export.verify.sessions import Parts
from vtr_export.weights import link_weights, write_weights

DECODER = "decoder_model_merged"


def first_layers(schedule: Resolved, count: int) -> Resolved:
    """What ``schedule`` says of the first ``count`` layers."""
    crosses = tuple(layer for layer in schedule.crosses if layer < count)
    last = crosses[-1] if crosses else count - 1  # behind which a cut would drop nothing
    cuts = tuple(cut for cut in schedule.cuts if cut.before_layer <= last)
    return replace(schedule, layers=count, cuts=cuts, crosses=crosses)


def truncate(checkpoint: Checkpoint, count: int, folder: Path) -> Checkpoint:
    """The same weights under a config of ``count`` decoder layers, which ``folder`` gets."""
    config = written = _shortened(checkpoint.config, count)
    for name in checkpoint.code:  # which reads its own form of the config
        written = _shortened(read_json(checkpoint.folder / "config.json"), count)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(checkpoint.folder / name, folder / name)
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    return replace(checkpoint, folder=folder, config=config)


def _shortened(given: dict[str, Any], count: int) -> dict[str, Any]:
    """A configuration of ``count`` decoder layers."""
    config: dict[str, Any] = json.loads(json.dumps(given))
    is_flat = "text_config" not in config and "num_hidden_layers" in config
    text = config if is_flat else config.setdefault("text_config", {})
    text["num_hidden_layers"] = _own(config, count)
    if isinstance(kinds := text.get("layer_types"), list):
        text["layer_types"] = kinds[:count]
    return config


def _own(config: dict[str, Any], count: int) -> int:
    """Layers without Idefics' blocks, which no number of layers says; InputError between two."""
    if config.get("model_type") != "idefics":
        return count
    every = 1 + int(config.get("cross_layer_interval") or 1)
    if count % every:
        raise InputError(
            f"no model has {count} of these layers: a block stands before every {every - 1}",
            hint=f"verify a multiple of {every} layers",
        )
    return count // every * (every - 1)


def build_decoder(
    parts: Parts, checkpoint: Checkpoint, manifest: Manifest, schedule: Resolved, folder: Path
) -> Parts:
    """``parts`` with a decoder of ``schedule.layers`` layers, made by the same passes.

    Its weights are copied into ``folder``, or linked like those of the artifact.
    """
    from vtr_export.frontends.transformers import load

    short = truncate(checkpoint, schedule.layers, folder)
    facts = read_facts(short.config, str(folder / "config.json"))
    graphs = load(short, facts, manifest.dtype)
    mode = manifest.weights.mode
    alone = replace(schedule, vision=(), tower=None)  # images were encoded by the whole artifact
    models = lower(graphs, alone, weights=mode, tunable=manifest.tunable)
    models = {name: models[name] for name in (DECODER, COMPACTION) if name in models}
    if mode == "link":
        link_weights(models, checkpoint.folder)
    else:
        write_weights(models, folder)
    save_graphs(models, folder)
    keep = np.array([cut.keep.numerator for cut in schedule.cuts], np.int64)
    cut_layers = tuple(cut.before_layer for cut in schedule.cuts)
    compaction = folder / f"{COMPACTION}.onnx" if COMPACTION in models else None
    return parts.with_decoder(folder / f"{DECODER}.onnx", keep, cut_layers, compaction)
