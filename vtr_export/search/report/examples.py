"""Example questions under a candidate: the answers, and which tokens of the image are left."""

from collections.abc import Sequence

import torch

from vtr_export.reference import Generation
from vtr_export.runtime.show_kept import Grid
from vtr_export.search.candidate import Candidate, Space
from vtr_export.search.evaluators.torch_model import Batch, TorchModel
from vtr_export.search.questions.calibration import Question
from vtr_export.search.report.page import KeptImage


def examples(
    model: TorchModel,
    candidate: Candidate,
    questions: Sequence[Question],
    count: int = 4,
    max_new_tokens: int = 16,
) -> tuple[KeptImage, ...]:
    """The first ``count`` questions about different images; of several images the first."""
    first = {question.images[0]: question for question in reversed(questions) if question.images}
    chosen = [question for question in questions if first.get(question.images[0]) is question]
    return tuple(_example(model, candidate, each, max_new_tokens) for each in chosen[:count])


def _example(
    model: TorchModel, candidate: Candidate, question: Question, max_new_tokens: int
) -> KeptImage:
    batch = model.batch([question])
    pruned, whole = (
        _answer(model, batch, each, max_new_tokens)
        for each in (candidate, Space(model.facts).unpruned())
    )
    inputs = model.prompts.image(question.images[0])
    view, tokens = model.prompts.processor.images.view(inputs, 0), inputs.tokens
    left = left_after(batch, pruned)
    return KeptImage(
        view=view,
        grid=Grid.of(view, inputs.seen[0]),
        stages={
            layer: tuple(number for number in numbers if number < tokens)
            for layer, numbers in zip(candidate.cut_layers(), left, strict=True)
        },
        question=question.text,
        answer=_text(model, pruned),
        unpruned_answer=_text(model, whole),
    )


def left_after(batch: Batch, said: Generation) -> list[list[int]]:
    """For each cut of a batch of one, the numbers of its vision tokens that are left."""
    columns, numbers = batch.vision[0], torch.arange(batch.vision.shape[1])
    left = []
    for kept, vision in zip(said.prefill.kept, said.prefill.kept_vision, strict=True):
        survivors = kept[0][vision[0]]  # in the columns of the stage before
        numbers = numbers[torch.isin(columns, survivors).cpu()]
        columns = vision[0]
        left.append(numbers.tolist())
    return left


def _answer(
    model: TorchModel, batch: Batch, candidate: Candidate, max_new_tokens: int
) -> Generation:
    runs = model.reference(candidate.resolve(model.facts))
    return runs.generate(
        model.embed_tokens,
        batch.embeds,
        batch.mask,
        batch.vision,
        groups=batch.groups,
        max_new_tokens=max_new_tokens,
        eos=model.ends,
        positions=(batch.positions, batch.ahead),
    )


def _text(model: TorchModel, said: Generation) -> str:
    """Decoding leaves out what ended the answer, and its repetitions."""
    return model.prompts.text(said.tokens[0].tolist())
