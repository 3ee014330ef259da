"""Schedules: how many vision tokens survive at each decoder layer, and which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import yaml

from vtr_export import generators
from vtr_export.errors import ScheduleError
from vtr_export.generators import Ratio
from vtr_export.resolved import Cut, Keep, Resolved, Rounding
from vtr_export.schedule_beside import check_beside, check_protected
from vtr_export.schedule_document import (
    Document,
    Drop,
    Prefill,
    check,
    first_layer_error,
    growth_error,
    keep_values,
    plain,
    validate,
)
from vtr_export.schedule_vision import fit_vision
from vtr_export.schedule_yaml import Key, Source, read_text, read_yaml, scalar

__all__ = ["Cut", "Keep", "Model", "Resolved", "Rounding", "Schedule"]


class Model(Protocol):
    """What a schedule must know of a model (``families.ModelFacts`` has it)."""

    @property
    def layers(self) -> int:
        """Decoder layers."""
        ...

    @property
    def tokens_per_image(self) -> int | None:
        """Vision tokens of one image; None where it depends on the image."""
        ...

    @property
    def mrope(self) -> bool:
        """Whether positions have three components."""
        ...


@dataclass(frozen=True)
class Schedule:
    """A valid document of the schedule language; two are equal when they say the same."""

    document: Document
    source: Source = field(default_factory=Source, compare=False, repr=False)

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Read a file. Every mistake is a ScheduleError with file, line, value and remedy."""
        path = Path(path)
        return cls.parse(read_text(path), str(path))

    @classmethod
    def parse(cls, text: str, where: str = "<text>") -> "Schedule":
        """Read YAML text; ``where`` names it in errors, and relative ``model:`` starts there."""
        return cls.from_data(*read_yaml(text, where))

    @classmethod
    def from_data(cls, data: object, source: Source | None = None) -> "Schedule":
        """From dicts, tuples and scalars as the language spells them."""
        source = source or Source("Schedule.from_data")
        document = validate(data, source)
        check(document, source)
        return cls(document, source)

    @classmethod
    def fastv(cls, k: int = 2, r: Ratio = "50%", *, tokens: int | None = None) -> "Schedule":
        """FastV: before layer ``k`` drop the share ``r``; ``tokens`` rounds as FastV does."""
        return cls.from_data(generators.fastv(k, r, tokens), Source("Schedule.fastv"))

    @classmethod
    def pyramid(
        cls,
        ratio: Ratio = "50%",
        *,
        layers: int = 32,
        parts: int = 4,
        tokens: int | None = None,
        positions: str = "original",
    ) -> "Schedule":
        """PyramidDrop: ``parts`` equal runs of layers, each keeping ``ratio`` of the one before.

        Its code has ``positions="repacked"``, which mRoPE cannot.
        """
        data = generators.pyramid(ratio, layers, parts, tokens, positions)
        return cls.from_data(data, Source("Schedule.pyramid"))

    @classmethod
    def sparsevlm(cls, tokens: int = 192, *, plus: bool = False) -> "Schedule":
        """SparseVLM's published keep list for 192, 128, 96 or 64 tokens, or SparseVLM+'s."""
        return cls.from_data(generators.sparsevlm(tokens, plus), Source("Schedule.sparsevlm"))

    @classmethod
    def mustdrop(cls, tokens: int = 192, *, windows: int | None = None) -> "Schedule":
        """MustDrop's published thresholds for 192, 128 or 64 tokens, in all three phases.

        ``windows`` is how many of an image are merged in its tower; None: as many as are alike.
        """
        return cls.from_data(generators.mustdrop(tokens, windows), Source("Schedule.mustdrop"))

    @classmethod
    def fitprune(cls, reduction: Ratio = "60%") -> "Schedule":
        """FitPrune's published recipe for LLaVA-1.5-7B: 50%, 60% or 90% fewer FLOPs."""
        return cls.from_data(generators.fitprune(reduction), Source("Schedule.fitprune"))

    @classmethod
    def ficoco(
        cls,
        vision: int | None = None,
        prefill: int | None = None,
        *,
        layers: int = 32,
        tokens: int = 576,
    ) -> "Schedule":
        """FiCoCo: ``vision`` tokens leave each later layer of the tower, ``prefill`` the decoder's.

        Its code has 42 and 14. ``tokens`` of an image enter the decoder, with ``vision`` too.
        """
        data = generators.ficoco(vision, prefill, layers, tokens)
        return cls.from_data(data, Source("Schedule.ficoco"))

    @classmethod
    def vtw(cls, k: int = 16) -> "Schedule":
        """VTW: drop all vision tokens before layer ``k``."""
        return cls.from_data(generators.vtw(k), Source("Schedule.vtw"))

    @classmethod
    def from_keeps(
        cls,
        keeps: Sequence[int | str | Fraction],
        *,
        origin: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "Schedule":
        """One keep per decoder layer; ``options``: score, rank, positions, drop_point, rounding."""
        data = generators.from_keeps(keeps, options, dict(origin or {"method": "list"}))
        return cls.from_data(data, Source("Schedule.from_keeps"))

    @classmethod
    def from_deletions(cls, deletions: Sequence[int], *, tokens: int = 576) -> "Schedule":
        """FitPrune's lists: tokens deleted inside each layer (``drop_point: inside``)."""
        return cls.from_data(
            generators.from_deletions(deletions, tokens), Source("Schedule.from_deletions")
        )

    @classmethod
    def unpruned(cls) -> "Schedule":
        """No cut at all."""
        return cls.from_data({"version": 1, "prefill": {"stages": ()}}, Source("Schedule.unpruned"))

    @property
    def model(self) -> str | None:
        """``model:`` as written; ``model_location`` says what it means."""
        return self.document.model

    @property
    def prefill(self) -> Prefill:
        """The decoder's part."""
        return self.document.prefill

    @property
    def origin(self) -> Mapping[str, str | int | float | bool | None]:
        """Provenance."""
        return self.document.origin

    def model_location(self) -> str | None:
        """The folder ``model:`` names, taken from the schedule's own, or else its hub id."""
        if self.model is None:
            return None
        folder = Path(self.source.name).parent / Path(self.model).expanduser()
        is_path = self.model.startswith((".", "/", "~")) or folder.is_dir()
        return str(folder) if is_path else self.model

    def dump(self) -> str:
        """YAML with every default written out; ``parse`` reads an equal schedule from it."""
        return str(
            yaml.dump(
                plain(self.document),
                Dumper=_Dumper,
                sort_keys=False,
                default_flow_style=None,
                width=100,
            )
        )

    def resolve(self, model: Model) -> Resolved:
        """Fit the schedule to a model; a ScheduleError says what does not fit, and where."""
        prefill = self.prefill
        tower, model = fit_vision(self.document.vision, model, self._error)
        self._check_model(model)
        keeps = [(key, _keep(value, prefill.rounding, model)) for key, value in self._values(model)]
        firsts = [stage.before_layer for stage in prefill.stages or ()]
        if prefill.keep is not None:
            firsts = _changes([keep for _, keep in keeps])
            keeps = [keeps[layer] for layer in firsts]
        crosses: tuple[int, ...] = getattr(model, "crosses", ())  # who is no ModelFacts has none
        if crosses:
            self._check_crosses(crosses, [key for key, _ in keeps], firsts)
        if firsts[:1] == [0] and prefill.score.source == "previous":
            raise first_layer_error(self.source.at(keeps[0][0]))
        cuts = tuple(Cut(layer, keep) for layer, (_, keep) in zip(firsts, keeps, strict=True))
        if prefill.protect == "keys":
            check_protected(self.document, tower, dict(keeps), self._error)
        return Resolved(
            layers=model.layers,
            tokens_per_image=model.tokens_per_image,
            cuts=cuts,
            source=prefill.score.source,
            query=prefill.score.query,
            heads=prefill.score.heads,
            rank=prefill.rank,
            positions=prefill.positions,
            drop_point=prefill.drop_point,
            crosses=crosses,
            rule=prefill.score.rule,
            threshold=prefill.threshold,
            protect=prefill.protect == "keys",
            merge=None if isinstance(prefill.merge, Drop) else prefill.merge,
            vision=self.document.vision,
            decode=self.document.decode,
            tower=tower,
        )

    def place_of(self, before_layer: int) -> str:
        """Where the cut before a layer is written."""
        for i, stage in enumerate(self.prefill.stages or ()):
            if stage.before_layer == before_layer:
                return self.source.at(("prefill", "stages", i, "keep"))
        return self.source.at(("prefill", "keep", before_layer))

    def _check_model(self, model: Model) -> None:
        """What this kind of model cannot do, whatever the numbers."""
        why, values = getattr(model, "uncut", ""), keep_values(self.prefill)
        if why and values:
            key = values[0][0]
            raise self._error(key, f"nothing can be cut: {why}", "leave the prefill part out")
        if self.prefill.rank == "per_image" and model.tokens_per_image is None:
            raise self._error(
                ("prefill", "rank"),
                "rank per_image needs a model with a fixed number of tokens per image",
                "rank: joint",
            )
        if self.prefill.positions == "repacked" and model.mrope:
            raise self._error(
                ("prefill", "positions"),
                "positions with three components (mRoPE) cannot be repacked",
                "positions: original",
            )
        if self.prefill.positions == "repacked" and getattr(model, "learned_positions", False):
            raise self._error(
                ("prefill", "positions"),
                "learned positions are added to tokens before layer 0 and cannot be repacked",
                "positions: original",
            )
        check_beside(self.document, model, self._error)
        self._check_layers(model.layers)

    def _check_layers(self, layers: int) -> None:
        keep = self.prefill.keep
        if keep is not None and len(keep) != layers:
            raise self._error(
                ("prefill", "keep"),
                f"keep lists {len(keep)} layers, but the model has {layers}",
                f"one number for each of the {layers} decoder layers, or stages",
            )
        for i, stage in enumerate(self.prefill.stages or ()):
            if stage.before_layer >= layers:
                raise self._error(
                    ("prefill", "stages", i, "before_layer"),
                    f"before_layer {stage.before_layer}, but the model has {layers} layers",
                    f"the last cut possible is before layer {layers - 1}",
                )

    def _values(self, model: Model) -> list[tuple[Key, int | Fraction]]:
        """Every keep, checked against the model's tokens and its predecessor."""
        values, tokens = keep_values(self.prefill), model.tokens_per_image
        most = Fraction(tokens or 1)
        for i, (key, value) in enumerate(values):
            if isinstance(value, int) and value and tokens is None:
                raise self._error(
                    key,
                    f"keep is {value}, but this model's tokens per image vary",
                    "write a share, 25% or 1/4",
                )
            if isinstance(value, int) and tokens is not None and value > tokens:
                raise self._error(
                    key,
                    f"keep is {value}, but an image has only {tokens} tokens",
                    f"keep at most {tokens}, or a share (50%)",
                )
            amount = _amount(value, self.prefill.rounding, tokens)
            if amount > most:
                raise growth_error(values[i - 1][1], value, self.source.at(key))
            most = amount
        return values

    def _check_crosses(
        self, crosses: Sequence[int], keys: Sequence[Key], firsts: Sequence[int]
    ) -> None:
        """Cuts of vision keys that cross layers attend to, which are no tokens."""
        prefill = self.prefill
        if self.document.decode:
            message = "decode narrows caches of tokens, but images are keys of cross-attention here"
            raise self._error(("decode",), message, "leave it out: no stage holds other tokens")
        asked: tuple[tuple[tuple[str, ...], str, str], ...] = (
            (("score", "from"), prefill.score.source, "previous"),
            (("score", "query"), prefill.score.query, "last"),
            (("positions",), prefill.positions, "original"),
            (("merge",), prefill.merge.by, "drop"),
            (("drop_point",), prefill.drop_point, "between"),
        )
        for place, said, wanted in asked:
            if firsts and said != wanted:
                raise self._error(
                    ("prefill", *place),
                    f"{'.'.join(place)} is {said}, but images are keys of cross-attention here",
                    f"{wanted}: the last row of the cross layer before a cut ranks them",
                )
        layers = ", ".join(map(str, crosses))
        for key, before, first in zip(keys, (-1, *firsts), firsts, strict=False):
            if not any(before <= layer < first for layer in crosses):
                found = "no cross layer stands" + f" between {before} and" * (before >= 0)
                raise self._error(
                    key,
                    f"a cut before layer {first}: {found} before it, so nothing ranks the keys",
                    f"cross layers are {layers}; cut behind one of them",
                )
            if first > crosses[-1]:
                raise self._error(
                    key,
                    f"a cut before layer {first}: no cross layer follows, it would drop nothing",
                    f"cross layers are {layers}; cut before one of them",
                )

    def _error(self, key: Key, message: str, hint: str) -> ScheduleError:
        return ScheduleError(message, where=self.source.at(key), hint=hint)


def _amount(value: int | Fraction, rounding: Rounding, tokens: int | None) -> Fraction:
    """Tokens of one image that survive, or the share of them where that is all we know."""
    if tokens is None or isinstance(value, int):
        return Fraction(value)
    return Fraction(Keep(value.numerator, value.denominator, rounding).of(tokens))


def _keep(value: int | Fraction, rounding: Rounding, model: Model) -> Keep:
    tokens = model.tokens_per_image
    amount = _amount(value, rounding, tokens)
    if tokens is None:
        return Keep(amount.numerator, amount.denominator, rounding)
    return Keep(int(amount), tokens)


def _changes(keeps: Sequence[Keep]) -> list[int]:
    """Layers before which the keep differs from the one before; it starts with everything."""
    shares = [Fraction(1), *(Fraction(keep.numerator, keep.denominator) for keep in keeps)]
    return [i for i, keep in enumerate(shares[1:]) if keep != shares[i]]


class _Dumper(yaml.SafeDumper):
    """Quotes every string that our reader would not take for itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        is_plain = data.isascii() and data.isprintable() and scalar(data) == data
        style = None if is_plain else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.text)
