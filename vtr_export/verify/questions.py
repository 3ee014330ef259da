"""What the verification asks: an image file and a prompt, prepared by us and by transformers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np

from vtr_export.errors import ArtifactError, InputError
from vtr_export.families import ModelFacts
from vtr_export.manifest import Gate
from vtr_export.runtime.batch import Batch, pad_batch, positions, token_groups
from vtr_export.runtime.crossing import lay_out
from vtr_export.runtime.images import ImageInputs, Seen
from vtr_export.runtime.images.inputs import repeated
from vtr_export.runtime.positions import Places, mrope
from vtr_export.runtime.processor import Form, Processor
from vtr_export.runtime.reader import READ
from vtr_export.verify.case import Array, Question
from vtr_export.verify.gates import at_most, differing
from vtr_export.verify.pictures import draw_odd_pictures

PROMPTS = (
    "What is shown in this picture?",
    "Look at the colours first and then tell me, in one word, what the largest shape is.",
)
Ids: TypeAlias = list[list[int]]  # of the prompt; of what the vision encoder reads of it


@dataclass(frozen=True)
class Asked:
    """Rows of token ids, each about the same image; and whether we prepare them as we should."""

    rows: tuple[tuple[int, ...], ...]
    images: Mapping[int, ImageInputs]  # so many times the same image
    read: Callable[[ImageInputs, Sequence[int]], ImageInputs]  # with what is read of the rows
    gates: tuple[Gate, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def ask(
    folder: Path,
    checkpoint: Path,
    facts: ModelFacts,
    image: Path,
    prompt: str | None,
    reduce: Callable[[ImageInputs], ImageInputs] | None = None,
) -> Asked:
    """Prepare ``image`` and two prompts from the files in ``folder``, and compare.

    ``reduce`` gives images the tokens that reductions leave; None: all of them.

    Where the checkpoint has no processor or tokenizer, random values take their place.
    """
    processor, warnings = Processor(folder), list[str]()
    images, image_gates = _images(processor, checkpoint, facts, image, warnings)
    if reduce is not None:
        images = {count: reduce(each) for count, each in images.items()}
    prompts = (prompt, PROMPTS[1]) if prompt is not None else PROMPTS
    asked = facts, images[1], image, prompts, warnings
    rows, id_gates = _rows(processor, checkpoint, *asked, is_reduced=reduce is not None)

    def read(images: ImageInputs, rows: Sequence[int]) -> ImageInputs:
        if processor.reader is None:
            return images
        return processor.reading(images, [_text(processor, prompts[row])[0] for row in rows])

    return Asked(rows, images, read, (*image_gates, *id_gates), tuple(warnings))


def question(name: str, asked: Asked, rows: Sequence[int], facts: ModelFacts, pad: int) -> Question:
    """The prompts ``rows`` of ``asked`` as one call."""
    chosen = [asked.rows[row] for row in rows]
    spread = None if facts.crosses else facts.image_token_id
    batch = pad_batch(chosen, pad, spread)
    images = asked.read(asked.images[len(chosen)], rows)
    lengths = batch.attention_mask.sum(axis=1)
    first = facts.first_position
    counted = positions(batch.attention_mask, batch.input_ids.shape[1])
    places = Places(counted + first, lengths + first)
    if facts.mrope:
        places = mrope(batch, facts.image_token_id, images.seen, np.zeros_like(lengths))
    return Question(
        name=name,
        images=images.feeds,
        given=images.given,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=places.ids,
        following=places.following,
        vision_index=batch.vision_index,
        groups=token_groups(batch, facts.image_token_id, facts.attends, facts.marked),
        crossing=_crossing(batch, images, facts) if facts.crosses else {},
    )


def _crossing(batch: Batch, images: ImageInputs, facts: ModelFacts) -> dict[str, Array]:
    """Where the images' features stand among the keys of cross-attention."""
    assert facts.vision is not None, "it has a tower"
    each = facts.vision.keys_per_image
    keys = lay_out(batch, facts.image_token_id, images.seen, each, facts.sight)
    return {"features": keys.features, "seen": keys.seen, "rows": keys.rows}


def _images(
    processor: Processor, checkpoint: Path, facts: ModelFacts, image: Path, warnings: list[str]
) -> tuple[dict[int, ImageInputs], list[Gate]]:
    from vtr_export.verify.processors import load_image_processor

    try:
        images = {count: processor.image_inputs([image] * count) for count in (1, 2)}
    except ArtifactError as error:
        if facts.tokens_per_image is None:
            raise
        warnings.append(f"pixel values were not checked: {error.message}")
        drawn = _random_images(facts)
        return {1: drawn, 2: repeated(drawn, 2)}, []
    theirs = load_image_processor(checkpoint)
    counts = {str(image): _differing_pixels(processor, theirs, image)}
    with TemporaryDirectory() as folder:
        for name, file in draw_odd_pictures(Path(folder)):
            counts[name] = _differing_pixels(processor, theirs, file)
    wrong = [name for name, count in counts.items() if count]
    detail = f"{len(wrong)} of {len(counts)} pictures, first {wrong[0]}" if wrong else ""
    return images, [at_most("pixel_values", sum(counts.values()), 0, detail)]


def _differing_pixels(processor: Processor, theirs: Any, image: Path) -> float:
    """Values that differ, to the bit; 0 also where both refuse."""
    from transformers.image_utils import load_image

    ours: Mapping[str, Array] | None
    expected: Mapping[str, Array] | None
    try:
        ours = processor.image_inputs([image]).given
    except InputError:
        ours = None
    try:
        expected = theirs(images=load_image(str(image)), return_tensors="np")
    except (ValueError, ZeroDivisionError):  # the second for quarters of an image without a middle
        expected = None
    if ours is None or expected is None:
        return float(ours is not expected)
    return sum(differing(values, np.asarray(expected[name])) for name, values in ours.items())


def _random_images(facts: ModelFacts) -> ImageInputs:
    """One image of noise, of the one size that the model takes."""
    vision, tokens = facts.vision, facts.tokens_per_image
    assert vision is not None
    assert vision.image_size is not None
    assert tokens is not None
    shape = (1, vision.channels, vision.image_size, vision.image_size)
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return ImageInputs({"pixel_values": pixels}, {"pixel_values": pixels}, (Seen(tokens),))


def _rows(
    processor: Processor,
    checkpoint: Path,
    facts: ModelFacts,
    images: ImageInputs,
    image: Path,
    prompts: Sequence[str],
    warnings: list[str],
    *,
    is_reduced: bool,
) -> tuple[tuple[tuple[int, ...], ...], list[Gate]]:
    try:
        ours = [_our_ids(processor, prompt, images.seen) for prompt in prompts]
    except ArtifactError as error:
        warnings.append(f"token ids were not checked: {error.message}")
        return _random_rows(facts, images.tokens), []
    rows = tuple(tuple(ids) for ids, *_ in ours)
    if facts.features != "tokens":
        warnings.append("token ids were not checked: transformers has no such processor")
        return rows, []
    try:
        theirs = [_their_ids(processor, checkpoint, prompt, image) for prompt in prompts]
    except (ImportError, OSError, ValueError, TypeError) as error:
        warnings.append(f"token ids were not checked: transformers: {error}")
        return rows, []
    if is_reduced:
        theirs = [_with_lengths(ids, facts.image_token_id, images.seen) for ids in theirs]
    wrong = [p for p, mine, other in zip(prompts, ours, theirs, strict=True) if mine != other]
    detail = f"the ids of {wrong[0]!r} are not those of transformers" if wrong else ""
    return rows, [at_most("token_ids", len(wrong), 0, detail)]


def _with_lengths(said: Ids, image: int | None, seen: Sequence[Seen]) -> Ids:
    """``said`` of a prompt with one image, which has as many tokens as were left of it."""
    ids, *read = said
    if image not in ids:
        return said
    first, tokens = ids.index(image), sum(each.tokens for each in seen)
    before = [token for token in ids[:first] if token != image]
    behind = [token for token in ids[first:] if token != image]
    whole = ids.count(image)
    if whole == tokens or ids[first : first + whole] != [image] * whole:
        return said  # as it is; or not in one run, and nothing was left out
    return [[*before, *[image] * tokens, *behind], *read]


def _random_rows(facts: ModelFacts, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Two prompts of random words with an image each, the second one longer."""
    random, image = np.random.default_rng(0), facts.image_token_id
    assert image is not None
    words = [int(i) for i in random.integers(0, facts.vocab - 1, 24)]
    words = [word + (word >= image) for word in words]
    place = [image] * tokens
    return (*words[:3], *place, *words[3:9]), (*words[9:11], *place, *words[11:24])


def _our_ids(processor: Processor, prompt: str, seen: Sequence[Seen]) -> Ids:
    text, form = _text(processor, prompt)
    found = [processor.token_ids(text, seen, form)]
    if processor.reader is not None:
        found += [ids[0].tolist() for ids in processor.reader.feeds([text]).values()]
    return found


def _text(processor: Processor, prompt: str) -> tuple[str, Form]:
    """A prompt about an image, and how to encode it."""
    if processor.is_written_out(prompt):
        return processor.with_places(prompt, 1), "plain"
    return processor.render(processor.messages(prompt, 1)), "chat"


def _their_ids(processor: Processor, checkpoint: Path, prompt: str, image: Path) -> Ids:
    """By transformers' own processor; a template of the tokenizer alone is rendered by that."""
    from transformers.image_utils import load_image

    from vtr_export.verify.processors import load_processor

    theirs = load_processor(checkpoint)
    picture, options = load_image(str(image)), dict[str, Any]()
    if processor.is_written_out(prompt):
        text = processor.with_places(prompt, 1)
    else:
        messages = [_with_image(message, image) for message in processor.messages(prompt, 1)]
        renderer = theirs if theirs.chat_template is not None else theirs.tokenizer
        text = renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        bos = theirs.tokenizer.bos_token
        if bos is not None and text.startswith(bos):
            options = {"add_special_tokens": False}
    said = theirs(text=text, images=[picture], **options)
    return [list(said[name][0]) for name in ("input_ids", *READ) if name in said]


def _with_image(message: Mapping[str, Any], image: Path) -> dict[str, Any]:
    """Transformers wants to know the image of each place."""
    content = message["content"]
    if not isinstance(content, str):
        content = [
            part | {"path": str(image)} if part["type"] == "image" else part for part in content
        ]
    return {**message, "content": content}
