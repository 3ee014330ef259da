"""An artifact or an engine, loaded: images and a prompt in, an answer out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vtr_export.errors import ArtifactError, InputError
from vtr_export.manifest import Manifest
from vtr_export.published import kind_of
from vtr_export.runtime.batch import Ints
from vtr_export.runtime.decoder import Cache, Decoder
from vtr_export.runtime.encoder import Encoded, origins
from vtr_export.runtime.encoder import left as tokens_left
from vtr_export.runtime.generation import Finish, Generated, generate, left_to_say
from vtr_export.runtime.images import ImageInputs, Picture, Seen, Video
from vtr_export.runtime.model import Model
from vtr_export.runtime.opening import open_engine, open_graphs, read_keeps
from vtr_export.runtime.processor import Form, Processor
from vtr_export.runtime.sampling import Options
from vtr_export.runtime.show_kept import Grid, Panel, draw
from vtr_export.runtime.text import Detokenizer

if TYPE_CHECKING:
    pass

Stream = Callable[[str], None]


@dataclass(frozen=True)
class Timings:
    """Seconds of one call; a batch's answers share them."""

    preprocess: float
    vision: float
    prefill: float
    decode: float
    steps: int  # decoder calls after the prefill

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding, for one row; 0 when the prefill gave the whole answer."""
        return self.steps / self.decode if self.steps else 0.0


@dataclass(frozen=True)
class Answer:
    """What the model said. ``kept[J]``: numbers of the call's vision tokens left after cut J."""

    text: str
    token_ids: tuple[int, ...]  # without the token that ended it
    finish: Finish
    kept: tuple[Ints, ...]
    prompt_tokens: int  # vision tokens included
    vision_tokens: int
    timings: Timings


@dataclass(frozen=True)
class Request:
    """One row: a prompt and its images, in the order of their places."""

    prompt: str
    images: Sequence[Picture] = ()


@dataclass(frozen=True)
class Row:
    """A prompt as the model takes it."""

    ids: tuple[int, ...]
    images: int


@dataclass(frozen=True)
class Prepared:
    """One call: rows, and all their images; None without any."""

    rows: tuple[Row, ...]
    images: ImageInputs | None
    seconds: float
    encoded: Encoded | None = None  # where the prompt's length depends on it
    encoding: float = 0.0  # seconds

    @property
    def seen(self) -> tuple[Seen, ...]:
        """The images, in reading order of the rows."""
        return () if self.images is None else self.images.seen


@dataclass(frozen=True)
class Artifact:
    """A published model with its schedule, on one device; ``device`` is where it runs."""

    folder: Path
    manifest: Manifest  # of an engine: that of the artifact it was built from
    processor: Processor
    model: Model
    device: str = "cpu"
    holds: int | None = None  # tokens that an engine's cache was built for

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        threads: int | None = None,
        keep: Sequence[int] | None = None,
    ) -> "Artifact":
        """Check the folder of an artifact or an engine against its manifest, and open its graphs.

        ``device`` cpu or cuda, that one or not at all (None: the CPU; an engine runs on a GPU
        only); ``threads`` are ONNX Runtime's; ``keep``: what a tunable one keeps at each cut, per
        image. Raises ArtifactError, EngineError, UnavailableError, InputError.
        """
        folder = Path(path)
        if kind_of(folder) == "engine":
            engine, sessions = open_engine(folder, device, threads)
            manifest, holds, device = engine.artifact, engine.request.ranges.max_tokens, "cuda"
        else:
            device = device or "cpu"
            manifest, sessions = open_graphs(folder, device, threads)
            holds = None
        vision, embedding, *decoders = sessions
        keeps, facts = read_keeps(manifest, keep), manifest.model
        model = Model(
            vision,
            embedding,
            Decoder(*decoders, keep=keeps, first_position=facts.first_position),
            facts.image_token_id,
            facts.pad_token_id or 0,
            facts.mrope,
            facts.attends,
            facts.sight if facts.crosses else None,
            marked=facts.marked,
        )
        return cls(folder, manifest, Processor(folder), model, device, holds)

    def generate(
        self,
        images: Sequence[Picture] | Picture | None,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> Answer:
        """Answer a prompt about images.

        A prompt that places its images itself (``<image>``), or a model without a chat template,
        is taken as written; any other becomes the user's turn of a chat. ``temperature`` 0 takes
        the best token each time. ``stream`` gets the text piece by piece. Raises InputError.
        """
        options = Options(max_new_tokens, temperature, top_p, top_k, seed)
        prepared = self.prepare([Request(prompt, as_list(images))])
        return self.answer(self.model.decoder.empty(1), prepared, options, stream)[0][0]

    def generate_batch(
        self, requests: Sequence[Request], options: Options | None = None
    ) -> list[Answer]:
        """Answer several prompts in one batch; each may have its own number of images."""
        if not requests:
            return []
        cache = self.model.decoder.empty(len(requests))
        return self.answer(cache, self.prepare(requests), options or Options())[0]

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Images and token ids of a first call."""
        start = time.perf_counter()
        texts = [self.written(request.prompt, request.images) for request in requests]
        images = [image for request in requests for image in request.images]
        counts = [len(request.images) for request in requests]
        inputs = self.image_inputs(images, counts, [text for text, _ in texts])
        inputs, encoded, encoding = self.counted(inputs)
        seen = () if inputs is None else inputs.seen
        rows = []
        for (text, form), request in zip(texts, requests, strict=True):
            own, seen = seen[: len(request.images)], seen[len(request.images) :]
            rows.append(Row(tuple(self.processor.token_ids(text, own, form)), len(own)))
        seconds = time.perf_counter() - start - encoding
        return Prepared(tuple(rows), inputs, seconds, encoded, encoding)

    def counted(
        self, inputs: ImageInputs | None
    ) -> tuple[ImageInputs | None, Encoded | None, float]:
        """Images with as many tokens as reductions leave; encoded where they decide how many."""
        reduced = self.manifest.model.reduced
        if inputs is None or reduced is None or reduced.is_static:
            return inputs and tokens_left(inputs, reduced), None, 0.0
        start = time.perf_counter()
        encoded = self.model.encode(inputs.feeds)
        return tokens_left(inputs, reduced, encoded.counts), encoded, time.perf_counter() - start

    def written(self, prompt: str, images: Sequence[Picture]) -> tuple[str, Form]:
        """A first prompt as text, and how to encode it."""
        if self.processor.is_written_out(prompt):
            return prompt, "plain"
        return self.processor.render(self.processor.messages(prompt, *count(images))), "chat"

    def image_inputs(
        self,
        images: Sequence[Picture],
        counts: Sequence[int] | None = None,
        texts: Sequence[str] = ("",),
    ) -> ImageInputs | None:
        """What the vision encoder is fed; None without images.

        ``counts`` are the images of each prompt (None: all are one prompt's), ``texts`` what the
        prompts say, for an encoder that reads them.
        """
        if not images:
            return None
        if self.manifest.schedule.rank == "per_image" and count(images)[1]:
            raise InputError(
                "this artifact ranks the tokens of each image apart, and a video has more",
                hint="export it again with rank: joint",
            )
        counts = counts or [len(images)]
        inputs = self.processor.image_inputs(images, counts)
        own = [text for text, each in zip(texts, counts, strict=True) for _ in range(each)]
        inputs = self.processor.reading(inputs, own)
        if misfits := self.model.misfits(inputs.feeds):
            raise ArtifactError(
                f"images are prepared for another model: {misfits[0]}",
                where=self.processor.images.where,
                hint="the preprocessor's file belongs to another checkpoint",
            )
        return inputs

    def answer(
        self, cache: Cache, prepared: Prepared, options: Options, stream: Stream | None = None
    ) -> tuple[list[Answer], Generated]:
        """Run the call and what follows; ``cache`` holds what came before."""
        start = time.perf_counter()
        limit = min(options.max_new_tokens, self._room(cache, prepared.rows))
        encoded = prepared.encoded
        if encoded is None and prepared.images is not None:
            encoded = self.model.encode(prepared.images.feeds)
        encoding = prepared.encoding + time.perf_counter() - start
        written = None if stream is None else Detokenizer(self.processor.tokenizer, stream)
        generated = generate(
            self.model,
            cache,
            [row.ids for row in prepared.rows],
            None if encoded is None else encoded.features,
            prepared.seen,
            options,
            protected=None if encoded is None else encoded.protected,
            ends=self.manifest.model.eos_token_ids,
            limit=limit,
            on_token=None if written is None else written.push,
        )
        if written is not None:
            written.flush()
        timings = Timings(
            prepared.seconds,
            encoding,
            generated.prefill_seconds,
            generated.decode_seconds,
            generated.steps,
        )
        ends = np.cumsum([row.images for row in prepared.rows]).tolist()
        return [
            self._answer(row, generated, number, timings, prepared.seen[end - row.images : end])
            for number, (row, end) in enumerate(zip(prepared.rows, ends, strict=True))
        ], generated

    def show_kept(self, images: Sequence[Picture] | Picture, answer: Answer) -> Image.Image:
        """The images of ``answer``'s call, one panel a stage, dropped patches darkened."""
        inputs = self.image_inputs(as_list(images))
        left, encoded, _ = self.counted(inputs)
        if inputs is None or left is None or left.tokens != answer.vision_tokens:
            raise InputError(
                "the images are not those of this answer's call", hint="give those of that call"
            )
        kind, numbers = self.processor.images, range(len(inputs.seen))
        views = [kind.view(inputs, number) for number in numbers]
        grids = [Grid.of(*pair) for pair in zip(views, inputs.seen, strict=True)]
        starts = np.cumsum([0, *(image.tokens for image in inputs.seen)]).tolist()
        own = np.arange(answer.vision_tokens)
        if (reduced := self.manifest.model.reduced) is not None:
            own = origins(encoded or self.model.encode(inputs.feeds), reduced)
        kept = tuple(own[left] for left in (np.arange(len(own)), *answer.kept))
        stages = [
            (layers, left)
            for layers, left in zip(self.stage_layers(), kept, strict=True)
            if layers[0] <= layers[1]
        ]
        panels = [
            [_panel(layers, left, start, image.tokens) for layers, left in stages]
            for start, image in zip(starts, inputs.seen, strict=False)
        ]
        return draw(views, grids, panels)

    def stage_layers(self) -> list[tuple[int, int]]:
        """First and last decoder layer of each stage; a stage without layers ends before it."""
        firsts = [stage.first_layer for stage in self.manifest.model.stages]
        nexts = [*firsts[1:], self.manifest.model.layers]
        return [(first, after - 1) for first, after in zip(firsts, nexts, strict=True)]

    def _room(self, cache: Cache, rows: Sequence[Row]) -> int:
        """Tokens that fit after the longest row. InputError when none does."""
        for row in rows:
            if row.ids and row.ids[-1] == self.model.image_token_id:
                raise InputError(
                    "the prompt ends with an image",
                    hint="put the question behind it: both belong into one call",
                )
            if not row.ids:
                raise InputError("the prompt is empty", hint="ask something")
        past = cache.lengths
        longest = max(int(length) + len(row.ids) for length, row in zip(past, rows, strict=True))
        context = self.manifest.model.context
        if longest >= context:
            raise InputError(
                f"the prompt takes {longest} tokens, the model's context is {context}",
                hint="ask less, or give fewer images",
            )
        if self.holds is not None and longest >= self.holds:
            raise InputError(
                f"the prompt takes {longest} tokens, the engine was built for {self.holds}",
                hint="ask less, or build for more: vtr build ARTIFACT with a larger "
                "--max-text-tokens or --max-new-tokens",
            )
        answer = left_to_say(self.manifest.model.answer, past) or context
        return min(min(context, self.holds or context) - longest, answer)

    def _answer(
        self, row: Row, generated: Generated, number: int, timings: Timings, seen: Sequence[Seen]
    ) -> Answer:
        tokens = generated.tokens[number]
        return Answer(
            self.processor.tokenizer.decode(tokens),
            tokens,
            generated.finish[number],
            generated.kept[number],
            len(row.ids),
            sum(image.tokens for image in seen),
            timings,
        )


def count(images: Sequence[Picture]) -> tuple[int, int]:
    """How many images, and how many videos."""
    videos = sum(isinstance(image, Video) for image in images)
    return len(images) - videos, videos


def as_list(images: Sequence[Picture] | Picture | None) -> Sequence[Picture]:
    """One image, several or none as a sequence."""
    if images is None:
        return ()
    return [images] if isinstance(images, str | Path | bytes | Image.Image | Video) else images


def _panel(layers: tuple[int, int], left: Ints, start: int, tokens: int) -> Panel:
    own = left[(left >= start) & (left < start + tokens)] - start
    first, last = layers
    name = f"layers {first}-{last}" if last > first else f"layer {first}"
    return Panel(f"{name}: {len(own)} of {tokens} tokens", own.tolist())
