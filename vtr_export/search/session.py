"""A search set up: questions, a model and where it runs, and what is already known."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vtr_export import __version__
from vtr_export.checkpoint import find_folder, made_files, read_model_facts
from vtr_export.errors import InputError
from vtr_export.families import ModelFacts
from vtr_export.published import MANIFEST
from vtr_export.search.budget import Workload, parse_budget
from vtr_export.search.candidate import Candidate, Space
from vtr_export.search.evaluator import Evaluator
from vtr_export.search.evaluators import onnx_evaluator
from vtr_export.search.evaluators.onnx_evaluator import space_of
from vtr_export.search.evaluators.prompts import Prompts, blocks_of
from vtr_export.search.evaluators.work import Naive
from vtr_export.search.ledger.ledger import Ledger
from vtr_export.search.questions.calibration import CalibrationSet, Question, refuse_overlap
from vtr_export.search.questions.metrics import Metric, get_metric
from vtr_export.search.questions.statistics import at_chance
from vtr_export.search.runner import Progress, Runner
from vtr_export.search.workers.pool import Inline, Part, Pool

if TYPE_CHECKING:
    from vtr_export.search.evaluators.torch_model import TorchModel

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What a search is given; see the options of ``vtr search``."""

    model: str
    calibration: Path
    ledger: Path
    metric: str = "exact"
    limit: int | None = None
    seed: int = 0
    evaluation: Path | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    max_new_tokens: int = 16
    on_ray: bool = False
    address: str | None = None  # of a Ray cluster; None starts one
    workers: int | None = None


class Session:
    """Opened with ``with``: reads the questions, loads the model, opens the ledger."""

    def __init__(
        self,
        setup: Setup,
        *,
        say: Say = lambda text: None,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.setup, self.metric = setup, get_metric(setup.metric)
        self.folder = find_folder(setup.model)
        self.is_checkpoint = not (self.folder / MANIFEST).exists()
        self.space = _space(self.folder) if self.is_checkpoint else space_of(self.folder)
        self.facts = self.space.facts
        check_family(self.folder, self.facts)
        self.calibration, self.evaluation = _sets(setup, self.metric)
        self.prompts = Prompts(self.folder)
        self.naive = Naive(self.facts, self.prompts, blocks_of(self.calibration.questions))
        self._say, self._progress, self._exit = say, progress, ExitStack()
        self.warnings: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    @property
    def workload(self) -> Workload:
        """The calibration set's mean prompt."""
        return Workload(*self.naive.mean)

    def flops_share(self, candidate: Candidate) -> float:
        """Decoder prefill FLOPs of the mean prompt, of the unpruned model's."""
        return parse_budget("flops=1").bind(self.facts, self.workload).cost(candidate)

    def model(self) -> "TorchModel | None":
        """The checkpoint, the evaluator's own or loaded now; None of an artifact."""
        from vtr_export.search.evaluators.torch_evaluator import TorchEvaluator
        from vtr_export.search.evaluators.torch_model import TorchModel

        pool = self.runner.pool
        if isinstance(pool, Inline) and isinstance(pool.evaluator, TorchEvaluator):
            return pool.evaluator.model
        if not self.is_checkpoint:
            return None
        return TorchModel(self.folder, self.setup.device, self.setup.dtype)

    def identity(self) -> Mapping[str, str]:
        """What results depend on."""
        return self.ledger.fingerprint

    def _open(self) -> None:
        questions = blocks_of(self.calibration.questions)
        others = blocks_of(self.evaluation.questions) if self.evaluation is not None else ()
        self._say("hashing the model")
        fingerprint = self._fingerprint()
        self.ledger = self._exit.enter_context(Ledger.open(self.setup.ledger, fingerprint))
        self.warnings += self.ledger.warnings
        self._say("loading the model")
        pool = self._pool((*questions, *others))
        self._exit.callback(pool.close)
        self.runner = self._runner(pool, questions, self.naive)
        self.held_out = self._held_out(Part(pool, len(questions)), others) if others else None
        self._say(f"answering {len(self.calibration)} questions unpruned")
        self.unpruned = self.runner.unpruned()
        assert self.unpruned.questions is not None, "whole"
        chance = at_chance(self.unpruned.questions, self.calibration.questions, self.metric)
        if chance is not None:
            self.warnings.append(chance)
            self._say(f"warning: {chance}")

    def _held_out(self, pool: Pool, blocks: Sequence[Sequence[Question]]) -> Runner:
        return self._runner(pool, blocks, Naive(self.facts, self.prompts, blocks))

    def _runner(self, pool: Pool, blocks: Sequence[Sequence[Question]], naive: Naive) -> Runner:
        hashes = [[question.sha256 for question in block] for block in blocks]
        return Runner(
            pool, self.space, naive, hashes, self.metric, self.ledger, progress=self._progress
        )

    def _fingerprint(self) -> dict[str, str]:
        return {
            **self._described,
            "metric": f"{self.metric.name} {self.metric.version}",
            "calibration": self.calibration.sha256,
            "vtr-export": __version__,
        }

    @cached_property
    def _described(self) -> Mapping[str, str]:
        """What answers depend on; the evaluator says the same once it is loaded."""
        setup = self.setup
        if not self.is_checkpoint:
            return onnx_evaluator.describe(self.folder, setup.device, setup.max_new_tokens)
        from vtr_export.search.evaluators.torch_model import describe

        return describe(self.folder, setup.device, setup.dtype, setup.max_new_tokens)

    def _maker(self, blocks: Sequence[Sequence[Question]]) -> Callable[[], Evaluator]:
        """What loads the model; pickled where it is called elsewhere."""
        setup = self.setup
        options: dict[str, Any] = {"device": setup.device, "max_new_tokens": setup.max_new_tokens}
        if not self.is_checkpoint:
            kind = onnx_evaluator.OnnxEvaluator
            return partial(kind, self.folder, blocks, self.metric, **options)
        from vtr_export.search.evaluators.torch_evaluator import TorchEvaluator

        options["dtype"] = setup.dtype
        return partial(TorchEvaluator, self.folder, blocks, self.metric, **options)

    def _pool(self, blocks: Sequence[Sequence[Question]]) -> Pool:
        setup, make = self.setup, self._maker(blocks)
        if not setup.on_ray:
            return Inline(make())
        from vtr_export.search.workers.ray_pool import RayPool

        gpus = 1.0 if setup.device.startswith("cuda") else 0.0
        return RayPool(
            make,
            address=setup.address,
            workers=setup.workers,
            blocks=len(blocks),
            gpus_per_worker=gpus,
            fingerprint=self._described,
        )


def check_family(folder: Path, facts: ModelFacts) -> None:
    """InputError for what evaluators do not know."""
    reason = ""
    if facts.attends != "causal":
        reason = "its image tokens see each other"
    elif not (folder / MANIFEST).exists() and made_files(folder):
        reason = "its checkpoint has a layout of its own"
    if reason:
        raise InputError(
            f"a search does not know this model yet: {reason}",
            where=str(folder),
            hint="write a schedule (vtr schedule --help) and verify it with vtr export",
        )


def _space(folder: Path) -> Space:
    return Space(read_model_facts(folder))


def _sets(setup: Setup, metric: Metric) -> tuple[CalibrationSet, CalibrationSet | None]:
    calibration = CalibrationSet.load(
        setup.calibration, limit=setup.limit, seed=setup.seed, labels=metric.needs_answers
    )
    if setup.evaluation is None:
        return calibration, None
    evaluation = CalibrationSet.load(setup.evaluation, labels=metric.needs_answers)
    refuse_overlap(calibration, evaluation)
    return calibration, evaluation


def check_tolerance(tolerance: float, questions: int, metric: Metric) -> None:
    """InputError for what no number of questions, or not this number, can tell."""
    finest = 1 / questions
    if not 0 < tolerance < 1:
        raise InputError(
            f"--tolerance {tolerance:g} is no share", hint="0.002 allows a loss of 0.2 points"
        )
    if metric.text is not None and tolerance < finest * (1 - 1e-9):
        raise InputError(
            f"--tolerance {tolerance:g} is finer than one of {questions} questions",
            hint=f"give {finest:.2g} or more, or at least {round(1 / tolerance)} questions",
        )
