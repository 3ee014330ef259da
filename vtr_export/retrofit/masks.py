"""Whether the masks of a foreign decoder say what ours says: tried, on calls that tell."""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from vtr_export.analysis.forms import Form, Mask
from vtr_export.errors import AnalysisError
from vtr_export.retrofit.probe import Array, Lengths, Part, visible

CALLS = (
    Lengths.drawn(2, 0, 7),
    Lengths.drawn(2, 0, 6, (2, 0)),
    Lengths.drawn(2, 5, 1),
    Lengths.drawn(2, 4, 3, (0, 3)),
)
LOW = -1000.0  # what is added to hide a key
SHORT = 3  # windows that the calls above show
LONGEST = 1 << 17  # windows beyond this are no windows


def check_masks(model: ir.Model, forms: Sequence[Form]) -> None:
    """AnalysisError unless every attention is causal, blind to padding, and sees all the rest."""
    seen: set[tuple[object, bool]] = set()
    for form in forms:
        key = tuple((mask.value, mask.says) for mask in form.masks), form.is_causal
        if key not in seen:
            seen.add(key)
            _check(model, form)


def _check(model: ir.Model, form: Form) -> None:
    if not form.masks:
        if not form.is_causal:
            raise _refusal(form, "has neither a mask nor is it causal")
        return
    part = Part(model, [mask.value for mask in form.masks])
    knows_padding = any(value.name == "attention_mask" for value in part.inputs)
    for lengths in (*CALLS, *_long(part)):
        if not knows_padding and not lengths.padding.all():
            continue
        found = _together(form, part(lengths), lengths)
        expected = visible(lengths)
        real = lengths.padding[:, lengths.past :] != 0
        shown = np.broadcast_to(found, (len(expected), found.shape[1], *expected.shape[1:]))
        for head in range(shown.shape[1]):
            wrong = (shown[:, head] != expected) & real[:, :, None]
            if wrong.any():
                row, at, key = (int(axis[0]) for axis in wrong.nonzero())
                does = "sees" if shown[row, head, at, key] else "does not see"
                raise _refusal(
                    form,
                    f"has a mask of its own: after {lengths.past} tokens, token "
                    f"{lengths.past + at} {does} token {key}",
                )


def _long(part: Part) -> Iterator[Lengths]:
    """Calls behind a past longer than any number the mask knows: a window shows there."""
    for number in part.constants():
        if SHORT < number <= LONGEST:
            yield Lengths.drawn(1, number + 3, 2)
    for number in part.tables():
        if SHORT < number <= LONGEST:
            yield Lengths.drawn(1, number - 2, 2)


def _together(form: Form, values: Sequence[Array], lengths: Lengths) -> Array:
    """[B,heads,S,T]: what a row sees under all of an attention's masks."""
    total, new = lengths.padding.shape[1], lengths.new
    seen: Array = np.ones((1, 1, new, total), bool)
    if form.is_causal:
        rows, keys = np.arange(lengths.past, total)[:, None], np.arange(total)[None]
        seen = seen & (keys <= rows)
    for mask, value in zip(form.masks, values, strict=True):
        if value.ndim > 4 or (value.ndim and value.shape[-1] not in (1, total)):
            raise _refusal(form, f"has a mask of shape {list(value.shape)}")
        wide = value.reshape((1,) * (4 - value.ndim) + value.shape)
        seen = seen & _seen(form, mask, wide)
    return seen


def _seen(form: Form, mask: Mask, value: Array) -> Array:
    if value.dtype == np.bool_ or mask.says != "added":
        return np.asarray(value == 0 if mask.says == "hidden" else value != 0)
    values = value.astype(np.float64)
    between = (values != 0) & ~(values <= LOW)
    if between.any():
        raise _refusal(form, f"adds {values[between].flat[0]:g} to a key that it shows (a bias)")
    return np.asarray(values == 0)


def _refusal(form: Form, why: str) -> AnalysisError:
    names = ", ".join(repr(mask.value.name) for mask in form.masks)
    return AnalysisError(
        f"the attention {form.node.name!r} {why}",
        where=f"mask {names}" if names else f"value {form.output.name!r}",
        hint="only causal attention over all real tokens can be cut",
    )
