"""An artifact for each method and share, all of one trace."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vtr_export.errors import GateError, InputError, VtrError
from vtr_export.families import ModelFacts
from vtr_export.pareto.measured import Refusal
from vtr_export.pareto.methods import METHODS, Method
from vtr_export.schedule import Schedule

if TYPE_CHECKING:
    from vtr_export.frontends.transformers import Graphs

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """An exported method; ``asked`` is the share."""

    method: Method
    asked: float | None
    schedule: Schedule
    artifact: Path

    def __str__(self) -> str:
        return named(self.method, self.asked)


def chosen(names: Sequence[str]) -> list[Method]:
    """The methods of these names, or all. InputError."""
    if missing := [name for name in names if name not in METHODS]:
        raise InputError(f"no method {missing[0]!r}", hint=f"one of: {', '.join(METHODS)}")
    return [METHODS[name] for name in names] if names else list(METHODS.values())


def export_all(
    model: Path,
    facts: ModelFacts,
    work: Path,
    methods: Sequence[Method],
    schedules: Sequence[Path],
    shares: Sequence[float],
    say: Progress,
) -> tuple[list[Entry], list[Refusal]]:
    """An artifact for each method and share, of one trace; and what was refused."""
    from vtr_export.exporter import export

    load, entries, refusals = TracedOnce(), list[Entry](), list[Refusal]()
    for method, share, make in _wanted(facts, methods, schedules, shares):
        out = work / str(len(entries))
        say(f"export {named(method, share)}")
        try:
            schedule = make()
            export(schedule, model, out, verify="none", force=True, load=load)
        except GateError:
            raise
        except VtrError as error:
            if not entries:
                raise
            refusals.append(Refusal(method.name, share, error.message))
        else:
            entries.append(Entry(method, share, schedule, out))
    return entries, refusals


def named(method: Method, share: float | None) -> str:
    """For who watches."""
    return method.name if share is None else f"{method.name} at {share:.1%}"


def _wanted(
    facts: ModelFacts,
    methods: Sequence[Method],
    schedules: Sequence[Path],
    shares: Sequence[float],
) -> Iterator[tuple[Method, float | None, Callable[[], Schedule]]]:
    """The unpruned model, what has a share of its own, then share by share."""
    yield Method("unpruned"), None, Schedule.unpruned
    for path in schedules:
        yield Method(path.name, own=True), None, partial(Schedule.load, path)
    for method in methods:
        if method.own:
            yield method, None, partial(method.schedule, 1.0, facts)
    for share in shares:
        for method in methods:
            if not method.own:
                yield method, share, partial(method.schedule, share, facts)


class TracedOnce:
    """``frontends.transformers.load``, which traces a checkpoint once and gives copies."""

    def __init__(self) -> None:
        self.known: dict[bool, Graphs] = {}

    def __call__(self, *given: object, whole: bool = False) -> "Graphs":
        """One trace with all layers of the tower, one with those that feed the projector."""
        from vtr_export.frontends.transformers import load

        if whole not in self.known:
            self.known[whole] = load(*given, whole=whole)  # type: ignore[arg-type]
        graphs = self.known[whole]
        return replace(
            graphs,
            vision_encoder=graphs.vision_encoder.clone(),
            embed_tokens=graphs.embed_tokens.clone(),
            decoder=graphs.decoder.clone(),
        )
