"""Six kinds of question about a scene, and their answers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scenes import COLOURS, EXTREMES, GRID, MOST, Scenes

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
NAMES = tuple(COLOURS)
PHRASES = {
    "digit": ("which digit is {}?", "what number is in {}?"),
    "colour": ("what colour is the {}?", "which colour has the {}?"),
    "count": ("how many digits are there?", "how many digits do you see?"),
    "extreme": ("which digit is {}?", "what is the {} digit?"),
    "place": ("where is the {}?", "find the {}."),
    "exists": ("is there a {}?", "do you see a {}?"),
}


@dataclass(frozen=True)
class Question:
    """One question about one scene, with its only right answer."""

    kind: str
    text: str
    answer: str
    about: str  # the word in it that says which; none when it counts


@dataclass(frozen=True)
class _View:
    """One scene's digits as plain lists, absent ones left out."""

    digits: list[int]
    colours: list[int]
    cells: list[int]
    extremes: list[int]


def _digit(view: _View, rng: np.random.Generator) -> tuple[str, str]:
    slot = int(rng.integers(len(view.digits)))
    return NAMES[view.colours[slot]], str(view.digits[slot])


def _colour(view: _View, rng: np.random.Generator) -> tuple[str, str]:
    slot = int(rng.integers(len(view.digits)))
    return str(view.digits[slot]), NAMES[view.colours[slot]]


def _count(view: _View, rng: np.random.Generator) -> tuple[str, str]:
    return "", str(len(view.digits))


def _extreme(view: _View, rng: np.random.Generator) -> tuple[str, str]:
    sides = [side for side in range(4) if view.extremes[side] >= 0]
    side = sides[int(rng.integers(len(sides)))]
    return EXTREMES[side], str(view.digits[view.extremes[side]])


def _place(view: _View, rng: np.random.Generator) -> tuple[str, str]:
    slot = int(rng.integers(len(view.digits)))
    row, column = divmod(view.cells[slot], GRID)
    return str(view.digits[slot]), f"{ROWS[row]} {COLUMNS[column]}"


def _exists(view: _View, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.5:
        return str(view.digits[int(rng.integers(len(view.digits)))]), "yes"
    absent = [digit for digit in range(10) if digit not in view.digits]
    return str(absent[int(rng.integers(len(absent)))]), "no"


KINDS: dict[str, Callable[[_View, np.random.Generator], tuple[str, str]]] = {
    "digit": _digit,
    "colour": _colour,
    "count": _count,
    "extreme": _extreme,
    "place": _place,
    "exists": _exists,
}


def ask(scenes: Scenes, seed: int, step: int, each: int = 1) -> list[list[Question]]:
    """For each scene ``each`` questions of every kind, a function of the arguments alone."""
    rng = np.random.default_rng([seed, step, 7])
    asked = []
    for row in range(len(scenes.digits)):
        number = int((scenes.digits[row] >= 0).sum())
        slots = (scenes.digits[row], scenes.colours[row], scenes.cells[row])
        view = _View(*(values[:number].tolist() for values in slots), scenes.extremes[row].tolist())
        asked.append([_question(kind, view, rng) for kind in KINDS for _ in range(each)])
    return asked


def _question(kind: str, view: _View, rng: np.random.Generator) -> Question:
    about, answer = KINDS[kind](view, rng)
    phrase = PHRASES[kind][int(rng.integers(len(PHRASES[kind])))]
    return Question(kind, phrase.format(about), answer, about)


def corpus() -> list[str]:
    """Every word that a question or an answer can hold."""
    phrases = [phrase.replace("{}", "") for kind in PHRASES.values() for phrase in kind]
    digits = [str(value) for value in range(max(10, MOST + 1))]
    return [*phrases, *digits, *NAMES, *EXTREMES, *ROWS, *COLUMNS, "yes no"]
