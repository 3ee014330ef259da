"""Which shapes an engine takes: ranges from flags, and from them the bounds of every input."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from vtr_export.engine_manifest import Bounds, Profile, Ranges
from vtr_export.errors import EngineError, InputError
from vtr_export.manifest import DecoderFacts
from vtr_export.schedule import Keep

MAX_TEXT_TOKENS: Final = 512  # unless a flag, or the model's context, says otherwise
MAX_NEW_TOKENS: Final = 512
OPT_TEXT_TOKENS: Final = 64
OPT_NEW_TOKENS: Final = 128
# A product with one row, known when building, wants its matrix in another layout, and the plan then
# holds all weights twice. Where two rows are possible both profiles share them.
ONE_LAYOUT: Final = 2
Range = tuple[int, int, int]  # least, best, most
Ports = Mapping[str, Sequence[int | str | None]]  # inputs and their shapes; varying ones have names
_LENGTH = re.compile(r"(past|sequence|vision|total)(?:_(\d+))?")  # of stage N


def choose_ranges(facts: DecoderFacts, flags: Mapping[str, int | None]) -> Ranges:
    """Fill in what no flag says; InputError for flags that do not fit the model or each other."""
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        if value < (0 if "vision" in name else 1):
            raise InputError(f"{_flag(name)} is {value}", hint="give a positive number")
    most = {"max_batch": 1, "max_vision_tokens": _vision_tokens(facts, given)} | given
    room = facts.context - most["max_vision_tokens"]
    text = most.setdefault("max_text_tokens", max(1, min(MAX_TEXT_TOKENS, room // 2)))
    most.setdefault("max_new_tokens", max(1, min(MAX_NEW_TOKENS, room - text)))
    chosen = {
        "opt_batch": 1,
        "opt_vision_tokens": min(facts.tokens_per_image or 2**62, most["max_vision_tokens"]),
        "opt_text_tokens": min(OPT_TEXT_TOKENS, text),
        "opt_new_tokens": min(OPT_NEW_TOKENS, most["max_new_tokens"]),
    } | most
    for name in ("batch", "vision_tokens", "text_tokens", "new_tokens"):
        if chosen[f"opt_{name}"] > chosen[f"max_{name}"]:
            raise InputError(
                f"{_flag(f'opt_{name}')} {chosen[f'opt_{name}']} is more than "
                f"{_flag(f'max_{name}')} {chosen[f'max_{name}']}",
                hint="kernels are chosen for a shape inside the profile",
            )
    ranges = Ranges(**chosen)
    if ranges.max_tokens > facts.context:
        raise InputError(
            f"{ranges.max_vision_tokens} vision, {ranges.max_text_tokens} text and "
            f"{ranges.max_new_tokens} new tokens exceed the model's context of {facts.context}",
            hint="lower --max-vision-tokens, --max-text-tokens or --max-new-tokens",
        )
    return ranges


def decoder_profiles(
    ports: Ports, ranges: Ranges, keeps: Sequence[Keep]
) -> tuple[Profile, Profile]:
    """Context (a prompt, or a later turn of any length) and generation (one token, no image)."""
    text, new = ranges.opt_text_tokens, ranges.opt_new_tokens
    vision = [ranges.opt_vision_tokens, *(keep.of(ranges.opt_vision_tokens) for keep in keeps)]
    prompt = ranges.max_vision_tokens + ranges.max_text_tokens
    context = {
        "batch": (1, ranges.opt_batch, ranges.max_batch),
        "sequence": (1, ranges.opt_vision_tokens + text, prompt),
        "vision": (0, ranges.opt_vision_tokens, ranges.max_vision_tokens),
    }
    rows = (1, ranges.opt_batch, max(ONE_LAYOUT, ranges.max_batch))
    generation = context | {"batch": rows, "sequence": (1, 1, 1), "vision": (0, 0, 0)}
    before = [(0, 0, ranges.max_tokens)] * len(vision)
    after = [(1, left + text + new // 2, ranges.max_tokens) for left in vision]
    return (
        _profile("context", ports, context, before, keeps),
        _profile("generation", ports, generation, after, keeps),
    )


def compaction_profile(ports: Ports, ranges: Ranges, keeps: Sequence[Keep]) -> Profile:
    """Behind a prompt, or a later turn: every stage from the first token to a whole cache."""
    text = ranges.opt_text_tokens
    prompt = ranges.max_vision_tokens + ranges.max_text_tokens
    lengths: dict[str, Range] = {"batch": (1, ranges.opt_batch, ranges.max_batch)}
    for stage, keep in enumerate(keeps, start=1):
        new = keep.of(ranges.opt_vision_tokens) + text
        lengths[f"sequence_{stage}"] = (1, new, prompt)
        lengths[f"total_{stage}"] = (1, new, ranges.max_tokens)
    return _profile("compaction", ports, lengths, (), ())


def vision_profile(ports: Ports, ranges: Ranges, tokens_per_image: int) -> Profile:
    """From one image to all of a batch; where images keep their size, one image a row."""
    each = max(1, -(-ranges.max_vision_tokens // tokens_per_image))
    best = max(1, -(-ranges.opt_vision_tokens // tokens_per_image))
    images = {"images": (1, best * ranges.opt_batch, each * ranges.max_batch)}
    question = {"question": (1, ranges.opt_text_tokens, ranges.max_text_tokens)}
    return _profile("images", ports, images | question | _packed(ports, ranges), [], ())


def _packed(ports: Ports, ranges: Ranges) -> dict[str, Range]:
    """Lengths of patches that lie in one row; a window may hold as little as one token."""
    if "frame_places" not in ports:
        return {}
    own = max(1, ranges.opt_vision_tokens), max(1, ranges.max_vision_tokens)
    best, most = own[0] * ranges.opt_batch, own[1] * ranges.max_batch
    unit, windowed = ports["frame_places"][1], ports.get("windows", (None, 1))[1]
    assert isinstance(unit, int), "patches of a token"
    assert isinstance(windowed, int), "patches of a window"
    return {
        "tokens": (1, best, most),
        "frames": (1, ranges.opt_batch, ranges.max_batch),
        "longest": (unit, own[0] * unit, own[1] * unit),
        "windows": (1, -(-best * unit // windowed), most),
    }


def _profile(
    name: str,
    ports: Ports,
    lengths: Mapping[str, Range],
    pasts: Sequence[Range],
    keeps: Sequence[Keep],
) -> Profile:
    inputs = {}
    for port, shape in ports.items():
        if port == "keep":
            values = [(0, keep.numerator, keep.denominator) for keep in keeps]
        else:
            values = [_bounds(port, dim, lengths, pasts) for dim in shape]
        least, best, most = zip(*values, strict=True)
        inputs[port] = Bounds(least=least, best=best, most=most)
    return Profile(name=name, inputs=inputs)  # type: ignore[arg-type]  # checked by pydantic


def _bounds(
    port: str, dim: int | str | None, lengths: Mapping[str, Range], pasts: Sequence[Range]
) -> Range:
    """Those of one dimension of an input."""
    if isinstance(dim, int):
        return dim, dim, dim
    name = dim or ""
    if name in lengths:
        return lengths[name]
    found = _LENGTH.fullmatch(name)
    if found is None or int(found[2] or 0) >= len(pasts):
        raise EngineError(
            f"input {port} has a dimension {dim!r}, which no flag bounds",
            hint="only graphs written by vtr export can be built",
        )
    past = pasts[int(found[2] or 0)]
    if found[1] == "past":
        return past
    new = lengths["sequence"]
    return past[0] + new[0], past[1] + new[1], past[2] + new[2]


def _vision_tokens(facts: DecoderFacts, given: Mapping[str, int]) -> int:
    if "max_vision_tokens" in given:
        return given["max_vision_tokens"]
    if facts.tokens_per_image is None:
        raise InputError(
            "the tokens of an image vary with this model",
            hint="say how many a prompt may have: --max-vision-tokens",
        )
    return facts.tokens_per_image


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
