"""What a model takes: images as pixel values, and a prompt as token ids with room for them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vtr_export.errors import ArtifactError, CheckpointError, InputError
from vtr_export.families import ModelFacts, read_facts
from vtr_export.runtime.chat import ChatTemplate, Message
from vtr_export.runtime.images import (
    PROCESSOR,
    ByPrompt,
    ImageInputs,
    ImageKind,
    Picture,
    Seen,
    read_kind,
)
from vtr_export.runtime.json_files import read_json
from vtr_export.runtime.placeholders import Placeholder, read_placeholder
from vtr_export.runtime.processor_class import processor_class
from vtr_export.runtime.reader import Reader
from vtr_export.runtime.text import Tokenizer

Form: TypeAlias = Literal["plain", "chat", "continued"]


class Processor:
    """The checkpoint's processor, from the JSON files in ``folder`` alone.

    Each file is read when it is first needed, and what is missing is named then.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def images(self) -> ImageKind:
        """How images are prepared."""
        return read_kind(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with all its special tokens."""
        return Tokenizer.load(self.folder)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, if the checkpoint has one."""
        return ChatTemplate.load(self.folder)

    @cached_property
    def placeholder(self) -> Placeholder:
        """What an image becomes in a prompt."""
        kind = processor_class(self.folder)
        return read_placeholder(kind, self.tokenizer.special, self._config)

    @property
    def image_token(self) -> str:
        """What stands for an image in a prompt."""
        return self.placeholder.place

    @cached_property
    def image_token_id(self) -> int:
        """The id of a vision token; ArtifactError when tokenizer and model mean different ones."""
        token, wanted = self.placeholder.token, self.facts.image_token_id
        ids = self.tokenizer.encode(token, special=False)
        if wanted is not None and ids[:1] != [wanted]:
            raise ArtifactError(
                f"the model's image token is {wanted}, but {token!r} becomes {ids}",
                where=str(self.folder),
                hint="the tokenizer belongs to another checkpoint",
            )
        return ids[0]

    def image_inputs(
        self, images: Sequence[Picture], counts: Sequence[int] | None = None
    ) -> ImageInputs:
        """What the vision encoder is fed, as the checkpoint's own image processor prepares it.

        ``counts`` are the images of each prompt; None takes each for its prompt's only one.
        ArtifactError when the processor's file promises other tokens than the model gives.
        """
        kind = self.images
        if counts is not None and isinstance(kind, ByPrompt):
            kind = kind.of_prompts(counts)
        inputs = kind.inputs(images, self.facts)
        anyres = self.facts.anyres
        tokens = self.facts.tokens_per_image if anyres is None else anyres.side**2
        if tokens is not None:
            self._check_promise(tokens, *inputs.feeds["pixel_values"].shape[-2:])
        return inputs

    def reading(self, inputs: ImageInputs, texts: Sequence[str]) -> ImageInputs:
        """Images with what their encoder reads of the prompt; ``texts``: each image's, as encoded.

        As they are, where a model's features of an image are its own.
        """
        if self.reader is None:
            return inputs
        read = self.reader.feeds([text.removeprefix(self.image_token) for text in texts])
        return ImageInputs({**inputs.feeds, **read}, {**inputs.given, **read}, inputs.seen)

    @cached_property
    def reader(self) -> Reader | None:
        """What reads prompts for the vision encoder, where one does."""
        most = self.facts.reads
        return Reader.load(self.folder, most) if most else None

    def _check_promise(self, tokens: int, height: int, width: int) -> None:
        """The file's own count of the tokens of an image, or a tile, where there is one."""
        count, patch = self._config.get("num_image_tokens"), self._config.get("patch_size")
        if isinstance(patch, int):
            count = (height // patch) * (width // patch)
            count += int(self._config.get("num_additional_image_tokens") or 0)
        if not isinstance(count, int):
            return
        count -= self._config.get("vision_feature_select_strategy") == "default"
        if count != tokens:
            raise self._broken(f"it counts {count} tokens for an image, the model {tokens}")

    def messages(self, question: str, images: int, videos: int = 0) -> list[Message]:
        """One user turn: the images, the videos, then the question."""
        if self.template is not None and not self.template.lists:
            places = self.image_token * images + (self.placeholder.video or "") * videos
            return [{"role": "user", "content": places + question}]
        parts = [{"type": "image"}] * images + [{"type": "video"}] * videos
        return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]

    def render(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        """The text of a conversation by the checkpoint's chat template."""
        if self.template is None:
            raise ArtifactError(
                "there is no chat template",
                where=str(self.folder),
                hint=f"write the prompt as the model expects it, with {self.image_token} in it, "
                "or put the checkpoint's chat_template.jinja there",
            )
        return self.template.render(messages, self.tokenizer.special, ask=ask)

    def is_written_out(self, prompt: str) -> bool:
        """Whether a prompt is to be taken as it is: it places its images itself."""
        return self.template is None or bool(self.placeholder.places(prompt))

    def token_ids(self, text: str, images: Sequence[Seen], form: Form = "plain") -> list[int]:
        """Ids of a text whose n-th placeholder stands for ``images[n]``.

        ``form``: ``chat`` came from the template, which may write ``<s>`` itself; ``continued``
        follows what a cache holds already. InputError when placeholders and images differ in
        number.
        """
        if self.placeholder.leads:
            return self._led(text, images, form)
        whole = self.placeholder.prompt if form == "plain" else None
        if whole is not None:
            text = whole(text, len(images))
        places = self.placeholder.places(text)
        if len(places) != len(images):
            raise self._miscounted(len(places), len(images))
        spread, rest = "", text
        for image, place in zip(images, places, strict=True):
            self._check_place(image, place)
            before, _, rest = rest.partition(place)
            spread += before + self.placeholder.written(image)
        spread += rest
        spread = self.placeholder.joined(spread)
        if form == "continued":
            return self.tokenizer.encode_continued(spread)
        return self.tokenizer.encode(spread, special=whole is None and not self._begins(text, form))

    def _led(self, text: str, images: Sequence[Seen], form: Form) -> list[int]:
        """The one image's tokens, then all that the tokenizer makes of the text."""
        place = self.image_token
        text = text.removeprefix(place * len(images))
        if len(images) > (form != "continued") or place in text:
            raise InputError(
                "this model's one image stands before all text",
                hint=f"ask about one image, in the first turn, and write no {place} behind a word",
            )
        written = "".join(self.placeholder.written(image) for image in images)
        before = self.tokenizer.encode(written, special=False)
        if form == "continued":
            return self.tokenizer.encode_continued(text)
        return before + self.tokenizer.encode(text, special=not self._begins(text, form))

    def _begins(self, text: str, form: Form) -> bool:
        """Whether a template wrote the token that begins a text."""
        bos = self.tokenizer.special.get("bos_token")
        return form == "chat" and bos is not None and text.startswith(bos)

    def with_places(self, text: str, images: int) -> str:
        """A text that is taken as it is; images come before it where it places none."""
        if self.placeholder.leads or self.image_token in text:
            return text
        return f"{self.image_token * images}\n{text}"

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return read_json(self.folder / PROCESSOR)

    @cached_property
    def facts(self) -> ModelFacts:
        """What the model's own config.json says."""
        where = self.folder / "config.json"
        try:
            return read_facts(read_json(where), str(where))
        except CheckpointError as error:
            raise ArtifactError(error.message, where=str(where), hint=error.hint) from error

    def _broken(self, message: str) -> ArtifactError:
        return ArtifactError(
            f"the processor does not fit the model: {message}",
            where=str(self.folder / PROCESSOR),
            hint="see patch_size, num_additional_image_tokens, vision_feature_select_strategy",
        )

    def _check_place(self, image: Seen, place: str) -> None:
        """An image at an image's place, a video at a video's."""
        if image.is_video != (place == self.placeholder.video):
            given = "a video" if image.is_video else "an image"
            raise InputError(
                f"the prompt has {place} where {given} is given",
                hint="give images and videos in the order of their places; images come first",
            )

    def _miscounted(self, placeholders: int, images: int) -> InputError:
        if not placeholders:
            hint = f"write {self.image_token} where the image belongs"
            return InputError(f"{images} images are given, but the prompt has no place", hint=hint)
        return InputError(
            f"the prompt has places for {placeholders} images, {images} are given",
            hint=f"give one image for each {self.image_token}",
        )
