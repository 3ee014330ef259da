"""A decoder beside another: the same calls, prefill and then steps, each on its own cache."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from vtr_export.errors import AnalysisError, InputError, VtrError
from vtr_export.manifest import Gate
from vtr_export.retrofit.probe import Array, cache_sizes, session
from vtr_export.verify.gates import at_most

# rows side by side → tokens of each call after the prefill: decode, decode, a later turn
STEPS: Final[Mapping[int, tuple[int, ...]]] = {2: (1, 1), 1: (1, 1, 3)}
TEXT: Final = 4  # tokens of the prefill beside the vision tokens, which begin at column 2
BARS: Final = {"tensor(float)": 1e-4, "tensor(float16)": 2e-2, "tensor(double)": 1e-6}
VISION: Final = 6  # tokens of an image, where the model does not say


class Player:
    """One graph in ONNX Runtime, fed call after call.

    ``roles`` maps its input names to ours (inputs_embeds, attention_mask …), ``carried`` its past
    inputs to the outputs that are their present.
    """

    def __init__(self, file: Path, roles: Mapping[str, str], carried: Mapping[str, str]) -> None:
        self.file, self.session = file, _open(file)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.roles, self.carried = roles, carried
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.cache: dict[str, Array] = {}
        self.kept: list[list[Array]] = []  # of each call, the columns each cut kept

    @property
    def dtype(self) -> str:
        """Of the logits."""
        types = {value.name: value.type for value in self.session.get_outputs()}
        return str(types[self.logits])

    @property
    def logits(self) -> str:
        """The output that is no cache: logits by name, or the first."""
        free = [name for name in self.outputs if name not in self.carried.values()]
        return "logits" if "logits" in free else free[0]

    def takes(self, rows: int) -> bool:
        """Whether no input is for another number of rows."""
        sources = ("inputs_embeds", "input_ids")
        batches = [v.shape[0] for n, v in self.inputs.items() if self.roles.get(n, n) in sources]
        return all(not isinstance(batch, int) or batch == rows for batch in batches)

    def play(self, conversations: Sequence[Sequence[Mapping[str, Array]]]) -> list[Array]:
        """Logits of every call; each conversation begins with an empty cache."""
        found = []
        for calls in conversations:
            self.cache = {}
            found += [self._call(call) for call in calls]
        return found

    def _call(self, call: Mapping[str, Array]) -> Array:
        feeds = {name: self._feed(name, call) for name in self.inputs}
        try:
            results = self.session.run(None, feeds)
        except Exception as error:  # ONNX Runtime has no class of its own for what a graph does
            raise InputError(
                f"the decoder does not run: {str(error).splitlines()[0]}",
                where=str(self.file),
                hint="it must run in ONNX Runtime on the CPU, or --no-verify",
            ) from None
        found = dict(zip(self.outputs, results, strict=True))
        self.cache = {past: found[present] for past, present in self.carried.items()}
        names = sorted(name for name in found if name.startswith("kept."))
        self.kept.append([found[name] for name in sorted(names, key=_number)])
        logits: Array = found[self.logits]
        return logits

    def _feed(self, name: str, call: Mapping[str, Array]) -> Array:
        value = self.inputs[name]
        dtype = _DTYPES.get(value.type)
        if dtype is None:
            raise InputError(
                f"the input {name!r} is a {value.type}, which cannot be fed on the CPU",
                where=str(self.file),
                hint="--no-verify publishes without comparing",
            )
        if name in self.carried:
            batch = len(call["attention_mask"])
            empty = np.zeros(cache_sizes(value.shape, batch, 0), dtype)
            return self.cache.get(name, empty)
        role = self.roles.get(name, name)
        if role == "position_ids" and len(value.shape) == 3:
            return np.broadcast_to(call[role], (value.shape[0], *call[role].shape)).astype(dtype)
        if role in call:
            return call[role].astype(dtype)
        if role in ("total_sequence_length", "total_seq_len"):
            return np.reshape(call["total"], [1] * len(value.shape)).astype(dtype)
        if role == "seqlens_k":
            return np.full(len(call["attention_mask"]), call["total"] - 1, dtype)
        if len(value.shape) < 2 and all(isinstance(dim, int) for dim in value.shape):
            return np.ones(value.shape, dtype)
        raise AnalysisError(
            f"nothing is known of the input {name!r} {list(value.shape)}",
            hint="--no-verify publishes without comparing",
        )


_DTYPES: Final[Mapping[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def hidden(
    asked: Sequence[Sequence[Mapping[str, Array]]], kept: Sequence[Sequence[Array]]
) -> list[list[dict[str, Array]]]:
    """The same calls, told which keys each stage sees: ``visible.J`` [B,T] of ``HideKeys``."""
    found, chosen = [], iter(kept)
    for calls in asked:
        seen: list[Array] = []
        told = []
        for call in calls:
            now = _visible(next(chosen), call["position_ids"].shape)
            before = seen or [np.zeros((len(each), 0), np.int64) for each in now]
            seen = [np.concatenate(pair, 1) for pair in zip(before, now, strict=True)]
            told.append({**call, **{f"visible.{stage}": each for stage, each in enumerate(seen)}})
        found.append(told)
    return found


def _visible(kept: Sequence[Array], shape: tuple[int, ...]) -> list[Array]:
    """Of this call's columns, those that are there behind each cut."""
    columns: Array = np.broadcast_to(np.arange(shape[-1]), shape)
    found = []
    for each in kept:
        columns = np.take_along_axis(columns, each, 1)
        now = np.zeros(shape, np.int64)
        np.put_along_axis(now, columns, 1, 1)
        found.append(now)
    return found


def last_rows(logits: Sequence[Array]) -> list[Array]:
    """Of each call: the row that every schedule keeps."""
    return [each[:, -1:] for each in logits]


def _open(file: Path) -> Any:
    """A session; InputError where ONNX Runtime does not take the graph."""
    try:
        return session(str(file), optimise=True)
    except VtrError:
        raise
    except Exception as error:  # ONNX Runtime has no class of its own for what a graph is
        raise InputError(
            f"ONNX Runtime does not open the decoder: {str(error).splitlines()[0]}",
            where=str(file),
            hint="it must run in ONNX Runtime on the CPU, or --no-verify",
        ) from None


def conversations(
    width: int | None, vocabulary: int, vision: int | None, token: int | None = None
) -> list[list[dict[str, Array]]]:
    """Random tokens, an image of ``vision`` tokens in the prefill; every row is real.

    With ``token``, those ids and no others are ``token``.
    """
    rng = np.random.default_rng(0)
    image = vision or VISION
    found = [
        list(_calls(rng, batch, (TEXT + image, *steps), image, (width, vocabulary)))
        for batch, steps in STEPS.items()
    ]
    if token is None:
        return found
    for call in (call for calls in found for call in calls):
        ids = call["input_ids"]
        ids[ids == token] = 0 if token else 1
        np.put_along_axis(ids, call["vision_index"], token, 1)
    return found


def _calls(
    rng: np.random.Generator,
    batch: int,
    steps: Sequence[int],
    image: int,
    sizes: tuple[int | None, int],
) -> Iterator[dict[str, Array]]:
    past, (width, vocabulary) = 0, sizes
    for new in steps:
        total = past + new
        columns = np.arange(2, 2 + image) if not past else np.arange(0)
        call: dict[str, Array] = {
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.broadcast_to(np.arange(past, total), (batch, new)),
            "input_ids": rng.integers(0, vocabulary, (batch, new)),
            "vision_index": np.tile(columns, (batch, 1)),
            "vision_mask": np.tile(np.isin(np.arange(new), columns), (batch, 1)),
            "total": np.array(total),
        }
        if width is not None:
            call["inputs_embeds"] = rng.normal(size=(batch, new, width))
        yield call
        past = total


def compare(name: str, expected: Sequence[Array], actual: Sequence[Array], bar: float) -> Gate:
    """The largest difference of logits, relative to the largest logit."""
    worst, detail = 0.0, ""
    for number, (wanted, given) in enumerate(zip(expected, actual, strict=True)):
        if wanted.shape != given.shape:
            return at_most(name, float("inf"), bar, f"{wanted.shape} became {given.shape}")
        scale = float(np.max(np.abs(wanted.astype(np.float64)), initial=1e-6))
        gap = np.abs(wanted.astype(np.float64) - given.astype(np.float64)) / scale
        found = float(np.max(gap)) if np.isfinite(gap).all() else float("inf")
        if found >= worst:
            worst, detail = found, f"call {number} of {len(expected)}"
    return at_most(name, worst, bar, detail)
