"""Calibration sets: questions about images, read from JSON Lines, checked, drawn by a seed."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from PIL import Image, UnidentifiedImageError

from vtr_export.errors import CalibrationError, InputError
from vtr_export.runtime import images
from vtr_export.search.questions.file import SHOWN, Line, Problem, find_file, read_lines, refuse

_ADDRESSES: Final = ("http:", "https:", "ftp:", "s3:", "gs:", "hf:", "file:", "data:")


@dataclass(frozen=True)
class Question:
    """A question about images; ``answers`` are the right ones, none where labels are unknown."""

    images: tuple[Path, ...]
    text: str
    answers: tuple[str, ...]
    where: str  # "file.jsonl:12"
    sha256: str  # of the images' bytes, the text and the answers
    image_sha256: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """A hash of what is asked: the images' bytes and the text."""
        return _sha256(self.image_sha256, self.text)


@dataclass(frozen=True)
class CalibrationSet:
    """Questions in the order they are evaluated in."""

    questions: tuple[Question, ...]
    name: str  # of the file or folder

    @classmethod
    def load(
        cls, path: str | Path, *, limit: int | None = None, seed: int = 0, labels: bool = True
    ) -> "CalibrationSet":
        """Read a JSONL file, or the folder that holds exactly one ``*.jsonl``.

        A line is an object with ``image`` or ``images`` (paths, relative to the file's folder),
        ``question``, and ``answers`` or ``answer``; other keys are ignored. ``labels`` asks for
        answers. All lines are checked, whatever ``limit`` is: their text, that each image is
        there and of a known format, and that nothing is asked twice. What is chosen is decoded
        to the last pixel too.

        ``limit`` questions are drawn by ``seed`` (all, where there are fewer). The draw ranks
        questions by a hash of the seed, the images' bytes and the text: paths, the file's order
        and answers do not matter, and a smaller limit's questions are among a larger one's.
        Questions about the same images then stand together.

        Raises CalibrationError, which names the first few of all problems by line.
        """
        if limit is not None and limit < 1:
            raise CalibrationError(f"the limit is {limit}", hint="draw at least one question")
        file = find_file(Path(path))
        lines, problems = read_lines(file, labels)
        questions, found = _questions(lines, file)
        if problems := problems + found:
            refuse(problems, file)
        drawn = sorted(questions, key=lambda question: _sha256(seed, question.asked))[:limit]
        _decode(drawn, file)
        drawn.sort(key=lambda q: (_sha256(seed, q.image_sha256), _sha256(seed, q.asked)))
        return cls(tuple(drawn), Path(path).name or Path(path).resolve().name)

    def __len__(self) -> int:
        return len(self.questions)

    @cached_property
    def sha256(self) -> str:
        """Of the questions: images' bytes, texts, answers; neither paths nor order."""
        return _sha256(sorted(question.sha256 for question in self.questions))


def overlap(a: CalibrationSet, b: CalibrationSet) -> tuple[Question, ...]:
    """Questions of ``a`` that ``b`` asks too: the same images' bytes and the same text."""
    others = {question.asked for question in b.questions}
    return tuple(question for question in a.questions if question.asked in others)


def refuse_overlap(calibration: CalibrationSet, evaluation: CalibrationSet) -> None:
    """CalibrationError when a schedule would be judged by questions that it was chosen on."""
    if not (shared := overlap(evaluation, calibration)):
        return
    places = ", ".join(question.where for question in shared[:SHOWN])
    more = f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else ""
    raise CalibrationError(
        f"{len(shared)} of {len(evaluation)} evaluation questions are calibration questions: "
        f"{places}{more}",
        where=evaluation.name,
        hint="evaluate on questions that the search never saw",
    )


def _questions(lines: Iterable[Line], file: Path) -> tuple[list[Question], list[Problem]]:
    """Lines with their images' hashes, and what is wrong with the others."""
    files = _Files(file.parent)
    questions, problems, asked = [], list[Problem](), dict[str, tuple[int, Line]]()
    for line in lines:
        found = [files.hash(name) for name in line.images]
        if bad := [problem for _, problem in found if problem]:
            problems += [(line.number, problem) for problem in bad]
            continue
        question = _question(line, file, tuple(sha256 for sha256, _ in found))
        first, other = asked.setdefault(question.asked, (line.number, line))
        if other is line:
            questions.append(question)
        elif set(other.answers) == set(line.answers):
            problems.append((line.number, f"asks what line {first} asks"))
        else:
            problems.append((line.number, f"asks what line {first} asks, with other answers"))
    return questions, problems


def _question(line: Line, file: Path, image_sha256: tuple[str, ...]) -> Question:
    paths = tuple(file.parent / name for name in line.images)
    sha256 = _sha256(image_sha256, line.text, line.answers)
    where = f"{file}:{line.number}"
    return Question(paths, line.text, line.answers, where, sha256, image_sha256)


class _Files:
    """Images by name as lines write them; each is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, tuple[str, str]] = {}

    def hash(self, name: str) -> tuple[str, str]:
        """An image's sha256, or what is wrong with it."""
        if name not in self.known:
            problem = _misnamed(name) or _unreadable(self.folder / name)
            short = name if len(name) <= 100 else f"{name[:100]}…"
            self.known[name] = ("", f"{short}: {problem}") if problem else self._read(name)
        return self.known[name]

    def _read(self, name: str) -> tuple[str, str]:
        with (self.folder / name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), ""


def _misnamed(name: str) -> str:
    """Why ``name`` is no path to read from; a relative one stays in the file's folder."""
    if name.lower().startswith(_ADDRESSES):
        return "addresses are not fetched; download the image"
    if not name.strip() or "\0" in name:
        return "not a path"
    if not Path(name).is_absolute() and os.pardir in Path(name).parts:
        return "leaves the file's folder; write the whole path"
    return ""


def _unreadable(path: Path) -> str:
    """Why ``path`` is no image, as far as its header and checksums tell."""
    try:
        if not path.is_file():
            return "a folder, not an image" if path.is_dir() else "no such file"
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.verify()
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS}"
    except UnidentifiedImageError:
        return "not an image, or of a format Pillow does not know"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # a damaged file makes decoders raise anything
        return f"the image is damaged: {error}"
    return ""


def _decode(questions: Iterable[Question], file: Path) -> None:
    """Decode every image once: one that breaks off would stop a search in its midst."""
    problems: dict[Path, Problem] = {}
    seen: set[str] = set()
    for question in questions:
        for path, sha256 in zip(question.images, question.image_sha256, strict=True):
            if sha256 in seen:
                continue
            seen.add(sha256)
            try:
                images.load(path)
            except InputError as error:
                line = int(question.where.rpartition(":")[2])
                problems[path] = line, f"{path}: {error.message}"
    if problems:
        refuse(problems.values(), file)


def _sha256(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
