"""Turns that share a cache: a second question sees what the first one's cuts left."""

import time
from collections.abc import Sequence
from typing import Any

from vtr_export.errors import InputError
from vtr_export.runtime.artifact import Answer, Artifact, Prepared, Row, Stream, as_list, count
from vtr_export.runtime.images import Picture
from vtr_export.runtime.processor import Form
from vtr_export.runtime.sampling import Options

_ANSWER = "\ue000\ue001\ue000"  # stands for the last answer: private-use characters


class Conversation:
    """Owns the cache of one conversation; a turn that fails leaves it as it was.

    The first prompt decides the form: written out (it places its images itself, or there is no
    chat template), then every later prompt is appended as it is; or a chat, where the template
    writes what stands between two turns.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.turns: list[tuple[str, str]] = []  # question, answer
        self._messages: list[Any] = []
        self._cache = artifact.model.decoder.empty(1)
        self._unfed: list[int] = []  # the last answer's last token, when no end token followed it
        self._written_out = False

    @property
    def tokens(self) -> int:
        """Tokens the cache has been given so far, vision tokens included."""
        return int(self._cache.lengths[0])

    def ask(
        self,
        prompt: str,
        images: Sequence[Picture] | Picture | None = None,
        *,
        stream: Stream | None = None,
        **options: Any,
    ) -> Answer:
        """Answer the next turn; ``images`` are this turn's own. Options as in ``generate``."""
        given = as_list(images)
        chosen = Options(**options)
        written_out = self._written_out if self.turns else self._takes_as_is(prompt)
        messages = [] if written_out else [*self._messages, *self._turn(prompt, given)]
        prepared = self._prepare(prompt, given, messages)
        (answer,), generated = self.artifact.answer(self._cache, prepared, chosen, stream)
        self._written_out, self._cache = written_out, generated.cache
        self._unfed = list(answer.token_ids[-1:]) if answer.finish == "length" else []
        self.turns.append((prompt, answer.text))
        self._messages = messages and [*messages, self._said(answer.text)]
        return answer

    def _takes_as_is(self, prompt: str) -> bool:
        return self.artifact.processor.is_written_out(prompt)

    def _turn(self, prompt: str, images: Sequence[Picture]) -> list[Any]:
        processor = self.artifact.processor
        given = () if processor.placeholder.places(prompt) else images
        return list(processor.messages(prompt, *count(given)))

    def _prepare(self, prompt: str, images: Sequence[Picture], messages: Sequence[Any]) -> Prepared:
        start = time.perf_counter()
        text, form = self._text(prompt, messages)
        inputs = self.artifact.image_inputs(images, texts=[text])
        inputs, encoded, encoding = self.artifact.counted(inputs)
        seen = () if inputs is None else inputs.seen
        ids = [*self._unfed, *self.artifact.processor.token_ids(text, seen, form)]
        rows = (Row(tuple(ids), len(images)),)
        seconds = time.perf_counter() - start - encoding
        return Prepared(rows, inputs, seconds, encoded, encoding)

    def _text(self, prompt: str, messages: Sequence[Any]) -> tuple[str, Form]:
        """What is new in this turn."""
        if not messages:
            return prompt, "continued" if self.turns else "plain"
        render = self.artifact.processor.render
        if not self.turns:
            return render(messages), "chat"
        *before, _, question = messages
        text = render([*before, self._said(_ANSWER), question])
        if text.count(_ANSWER) != 1:
            raise InputError(
                "the chat template does not write out earlier answers: no turn can follow",
                hint="write the prompts out yourself, with the image's place in them",
            )
        return text.partition(_ANSWER)[2], "continued"

    def _said(self, text: str) -> dict[str, Any]:
        template = self.artifact.processor.template
        lists = template is None or template.lists
        return {"role": "assistant", "content": [{"type": "text", "text": text}] if lists else text}
