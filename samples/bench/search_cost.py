"""What sharing, early verdicts and hard questions first save a G-Search on the digits sample.

python samples/bench/search_cost.py

The naive search bisects in the middle, and answers every question under each candidate, from layer
0 on, greedily. Where fewer tokens sometimes do better, the two may part ways: both schedules are
shown. Seconds are of the search alone: the model is loaded and the unpruned answers are known.
Tolerance one question per layer, so that sets of any size find something. Exit 1 when the bar is
missed.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from measure import HERE, head, in_turns, parser, table, verdict, work

from vtr_export.search.candidate import Candidate, Score
from vtr_export.search.evaluators.prompts import SHARD
from vtr_export.search.evaluators.torch_evaluator import TorchEvaluator
from vtr_export.search.gsearch import SPLIT, floors, gsearch, levels_of
from vtr_export.search.session import Session, Setup
from vtr_export.search.workers.pool import Inline

SAMPLE = HERE.parent / "digits"
SCORE = Score("previous", "text", "mean")
QUESTIONS, STEP, BAR = 2048, 4, 1 / 3


@dataclass(frozen=True)
class Side:
    """One way to search: what it found and took."""

    keeps: tuple[int, ...]
    candidates: int
    seconds: float
    flops: int


@dataclass(frozen=True)
class Verdict:
    """What a candidate scored."""

    candidate: Candidate
    metric: float


class Naive:
    """Answers every question under every candidate, from the beginning."""

    def __init__(self, evaluator: TorchEvaluator) -> None:
        self.evaluator, self.asked, self.flops = evaluator, 0, 0

    def judge(self, candidate: Candidate, floor: float, ahead: Sequence[Candidate] = ()) -> Verdict:
        """All of them, whatever the floor."""
        self.asked += 1
        scores = list[float]()
        for block in self.evaluator.blocks:
            for start in range(0, len(block), SHARD):
                questions = block[start : start + SHARD]
                metric, flops = self.evaluator.answer(candidate, questions)
                scores, self.flops = [*scores, *metric], self.flops + flops
        return Verdict(candidate, sum(scores) / len(scores))

    def settle(self, candidate: Candidate, layer: int) -> None:
        """Nothing is shared."""


def search(session: Session, judge: object, split: float) -> tuple[int, ...]:
    """The schedule that ``judge`` leads to."""
    tolerance = (session.space.layers - 1) / len(session.calibration)
    floor = floors(session.unpruned.metric or 0, tolerance, range(1, session.space.layers), "even")
    levels = levels_of(session.space.parts, STEP)
    found = gsearch(
        judge,  # type: ignore[arg-type]  # both judge
        session.space,
        SCORE,
        floor=floor,
        levels=levels,
        checks=0,
        split=split,
    )
    return found.candidate.keeps


def ours(setup: Setup) -> Side:
    """A whole search with an empty ledger."""
    setup.ledger.unlink(missing_ok=True)
    with Session(setup) as session:
        runner = session.runner
        before, start = runner.decoder_flops_spent, time.perf_counter()
        keeps = search(session, runner, SPLIT)
        seconds = time.perf_counter() - start
        return Side(keeps, runner.evaluations, seconds, runner.decoder_flops_spent - before)


def naive(setup: Setup) -> Side:
    """The same without sharing anything."""
    other = replace(setup, ledger=setup.ledger.with_suffix(".naive"))
    other.ledger.unlink(missing_ok=True)
    with Session(other) as session:
        pool = session.runner.pool
        assert isinstance(pool, Inline)
        assert isinstance(pool.evaluator, TorchEvaluator)
        judge, start = Naive(pool.evaluator), time.perf_counter()
        keeps = search(session, judge, 0.5)
        return Side(keeps, judge.asked, time.perf_counter() - start, judge.flops)


def calibration(folder: Path, questions: int) -> Path:
    """The sample's own set, written."""
    sys.path.insert(0, str(SAMPLE))
    from calibration import CALIBRATION, write
    from questions import KINDS

    out = folder / f"calibration-{questions}"
    with redirect_stdout(sys.stderr):
        write(out, questions, CALIBRATION, len(KINDS))
    return out


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(runs=1)
    made.add_argument("--questions", type=int, default=QUESTIONS)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    questions = 96 if args.tiny else args.questions
    with work(args.work) as folder:
        setup = Setup(
            str(SAMPLE / "model"),
            calibration(folder, questions),
            folder / "search.ledger",
            device=args.device,
            max_new_tokens=4,
        )
        sides = {"ours": lambda: ours(setup), "naive": lambda: naive(setup)}
        found = in_turns(sides, args.runs, warmup=False)
    first, plain = found["ours"][0], found["naive"][0]
    flops = first.flops / plain.flops
    seconds = median(
        a.seconds / b.seconds for a, b in zip(found["ours"], found["naive"], strict=True)
    )
    rows = [("", "candidates", "decoder FLOPs", "seconds", "found")]
    rows += [
        (name, str(side.candidates), f"{side.flops:.3g}", f"{side.seconds:.1f}", _keeps(side))
        for name, side in (("naive", plain), ("ours", first))
    ]
    bar = f"{flops:.3f} (bar 1/3: {verdict(flops <= BAR)})"
    rows.append(("ours of naive", "", bar, f"{seconds:.3f}", ""))
    print(
        head(
            f"{args.device}, {args.threads} threads", f"{questions} questions, step {STEP}, {SCORE}"
        )
    )
    print(table(rows))
    raise SystemExit(flops > BAR)


def _keeps(side: Side) -> str:
    return " ".join(map(str, side.keeps))


if __name__ == "__main__":
    main()
