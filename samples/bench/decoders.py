"""Decoders of any exporter in ONNX Runtime: one prompt in, then token after token, timed."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from safetensors import safe_open

from vtr_export.runtime.session import Array, Session, Value

CACHE = re.compile(r"(\d+)\.(key|value)")  # of past_key_values.3.key, ….layers.3.keys, …


@dataclass(frozen=True)
class Prompt:
    """One row: ids and their embeddings [1,S,D]; ``vision`` of its columns from ``first`` on."""

    ids: Array
    embeddings: Array
    vision: int
    first: int
    steps: int  # tokens to decode after it

    @classmethod
    def draw(
        cls, table: Array, vision: int, text: int, steps: int, *, reach: int = 100
    ) -> "Prompt":
        """Random ids below ``reach``, embedded by the model's own ``table`` [vocab, D]."""
        ids = np.random.default_rng(0).integers(5, reach, (1, vision + text))
        return cls(ids, table[ids], vision, text // 2, steps)


@dataclass(frozen=True)
class Timing:
    """Seconds of one prefill and of one decode step behind it."""

    prefill: float
    decode: float


class Decoder:
    """A graph for prefill and one for decode (the same for most exporters), and their cache."""

    def __init__(self, prefill: Session, decode: Session | None = None) -> None:
        self.prefill, self.decode = prefill, decode or prefill

    def logits(self, prompt: Prompt) -> Array:
        """``[vocab]`` of the prompt's last position."""
        values, _ = self._call(self.prefill, prompt, {}, prompt.ids.shape[1], 0)
        found: Array = np.asarray(values["logits"], np.float32)[0, -1]
        return found

    def measure(self, prompt: Prompt) -> Timing:
        """Time a prefill and the steps behind it."""
        length = prompt.ids.shape[1]
        start = time.perf_counter()
        _, cache = self._call(self.prefill, prompt, {}, length, 0)
        filled = time.perf_counter()
        for step in range(prompt.steps):
            _, cache = self._call(self.decode, prompt, cache, 1, length + step)
        return Timing(filled - start, (time.perf_counter() - filled) / prompt.steps)

    def _call(
        self, session: Session, prompt: Prompt, cache: Mapping[str, Value], new: int, past: int
    ) -> tuple[dict[str, Value], dict[str, Value]]:
        """Run ``new`` columns behind ``past`` others; what it presents is returned by slot."""
        vision = np.arange(prompt.first, prompt.first + prompt.vision)[None]
        known: dict[str, Array] = {
            "input_ids": prompt.ids[:, -new:],
            "inputs_embeds": prompt.embeddings[:, -new:],
            "attention_mask": np.ones((1, past + new), np.int64),
            "position_ids": np.arange(past, past + new)[None],
            "vision_index": vision if new > 1 else vision[:, :0],
        }
        feeds: dict[str, Value] = {}
        for name, port in session.inputs.items():
            if name in known:
                feeds[name] = known[name]
                continue
            tail = [size if isinstance(size, int) else 0 for size in port.shape[1:]]
            empty = np.zeros((1, *tail), port.dtype)
            feeds[name] = cache.get(_slot(name), empty)
        resident = [name for name in session.outputs if _slot(name)]
        values = session.run(feeds, ["logits", *resident], resident=resident)
        return values, {_slot(name): values[name] for name in resident}


def _slot(name: str) -> str:
    """The place in the cache that a port reads or writes; empty for any other port."""
    if (found := CACHE.search(name)) is not None:
        return f"{found[1]}.{found[2]}"
    head, _, number = name.rpartition(".")
    return f"mask.{number}" if head in ("past_mask", "present_mask") else ""


def medians(timings: list[Timing]) -> Timing:
    """Of several rounds."""
    return Timing(median(t.prefill for t in timings), median(t.decode for t in timings))


def embedding_table(checkpoint: Path) -> Array:
    """The decoder's embedding weights [vocab, D], read from the shard that holds them."""
    name = "language_model.model.embed_tokens.weight"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    with safe_open(checkpoint / index["weight_map"][name], "numpy") as shard:
        table: Array = shard.get_tensor(name)
    return table
