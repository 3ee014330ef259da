"""Budgets: what a schedule may cost, in FLOPs, tokens or measured time."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from vtr_export.cost import prefill_cost
from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.search.candidate import Candidate, Score

if TYPE_CHECKING:
    from vtr_export.search.latency import LatencyTable

BACKENDS: Final = ("onnxruntime-cpu", "onnxruntime-cuda")
KINDS: Final = ("flops", "tokens", "latency")
EXAMPLES: Final = (
    "flops=0.4, tokens=0.25, latency=0.5@onnxruntime-cpu or latency=12ms@onnxruntime-cpu"
)
_NUMBER: Final = re.compile(r"(\d+\.?\d*|\.\d+)(e-?\d{1,2})?")


@dataclass(frozen=True)
class Workload:
    """The prompt that is counted or timed: the calibration set's mean, in whole tokens."""

    vision_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Budget:
    """``cost`` of a candidate may be at most ``target``; both are fractions of the unpruned."""

    text: str
    target: float
    cost: Callable[[Candidate], float]


@dataclass(frozen=True)
class BudgetOption:
    """``--budget`` as written: ``amount`` is a fraction of the unpruned model, or milliseconds."""

    text: str
    kind: Literal["flops", "tokens", "latency"]
    amount: float
    is_ms: bool = False
    backend: str | None = None  # of a latency

    def bind(
        self, facts: ModelFacts, workload: Workload, table: "LatencyTable | None" = None
    ) -> Budget:
        """The budget on a model. ``table`` is what a latency was measured as.

        Raises InputError for milliseconds that the unpruned model meets.
        """
        if self.kind == "tokens":
            return Budget(self.text, self.amount, lambda candidate: candidate.mean_keep)
        if self.kind == "flops":
            return Budget(self.text, self.amount, _flops(facts, workload))
        if table is None:
            raise ValueError("a latency is measured before it is a budget")
        whole = table.unpruned_ms
        target = self.amount / whole if self.is_ms else self.amount
        if target > 1:
            raise InputError(
                f"{self.text}, but the unpruned prefill takes {whole:.4g} ms",
                hint=f"nothing need be dropped; ask for less than {whole:.4g}ms",
            )
        return Budget(self.text, target, lambda candidate: table.predict_ms(candidate) / whole)


def parse_budget(text: str) -> BudgetOption:
    """Read ``--budget``; InputError says what is wrong and shows how it is written."""
    kind, equals, rest = text.partition("=")
    if not equals or kind not in KINDS:
        raise _error(f"--budget {text!r} does not say what is limited")
    if kind == "latency":
        return _parse_latency(text, rest)
    if "@" in rest or rest.endswith("ms"):
        raise _error(f"--budget {text!r}: only a latency has a unit and a backend")
    return BudgetOption(text, "tokens" if kind == "tokens" else "flops", _fraction(text, rest))


def _parse_latency(text: str, rest: str) -> BudgetOption:
    amount, at, backend = rest.partition("@")
    if not at or backend not in BACKENDS:
        named = f"{backend!r} is not known" if backend else "none is named"
        raise InputError(
            f"--budget {text!r}: a latency is measured on a backend, and {named}",
            hint=f"choose one of {', '.join(BACKENDS)}: latency=0.5@{BACKENDS[0]}",
        )
    if not amount.endswith("ms"):
        return BudgetOption(text, "latency", _fraction(text, amount), False, backend)
    number = _number(text, amount.removesuffix("ms"))
    if number <= 0:
        raise _error(f"--budget {text!r} leaves no time")
    return BudgetOption(text, "latency", number, True, backend)


def _fraction(text: str, written: str) -> float:
    number = _number(text, written)
    if not 0 < number <= 1:
        raise _error(f"--budget {text!r} is no fraction of the unpruned model: above 0, at most 1")
    return number


def _number(text: str, written: str) -> float:
    if not _NUMBER.fullmatch(written):
        raise _error(f"--budget {text!r}: {written!r} is no number")
    return float(written)


def _error(message: str) -> InputError:
    return InputError(message, hint=f"write {EXAMPLES}")


def _flops(facts: ModelFacts, workload: Workload) -> Callable[[Candidate], float]:
    """Exact prefill FLOPs, cuts and logits included, by the unpruned model's."""

    def count(candidate: Candidate) -> int:
        resolved = candidate.resolve(facts)
        return prefill_cost(facts, resolved, workload.vision_tokens, workload.text_tokens, "exact")

    whole = count(Candidate((1,) * facts.layers, Score(), 1))
    return lambda candidate: count(candidate) / whole
