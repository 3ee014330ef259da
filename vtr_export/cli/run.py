"""``vtr run``: image and prompt to answer, without torch."""

import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vtr_export.cli.output import Json, Verbose, columns, report
from vtr_export.errors import InputError

if TYPE_CHECKING:
    from vtr_export.runtime.artifact import Answer


PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")


class Device(StrEnum):
    """Where it runs; never anywhere else."""

    CPU = "cpu"
    CUDA = "cuda"


def run(
    artifact: Annotated[
        Path, typer.Argument(help="Folder that vtr export or vtr build published.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Image file; repeat for several.")
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", help="Folder of a video's frames, by name; repeat for several."),
    ] = None,
    no_image: Annotated[
        bool, typer.Option("--no-image", help="The prompt needs none: ask about the text alone.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the best token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the best tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[
        Device | None,
        typer.Option(help="This one or not at all; default: cpu, of an engine cuda."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of ONNX Runtime; default: all cores.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="What a tunable artifact keeps at each cut, per image: 72,36."),
    ] = None,
    show_kept: Annotated[
        Path | None, typer.Option(help="Draw the surviving tokens of each stage there (PNG).")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print the answer as it comes.")
    ] = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Answer a prompt; the answer alone goes to stdout."""
    _check_images([*(image or ()), *(video or ())], no_image)
    if show_kept is not None:
        _check_picture(show_kept, list(image or ()))
    keeps = None if keep is None else _numbers(keep)
    from vtr_export.runtime.artifact import Artifact
    from vtr_export.runtime.images import Video

    images = [*(image or ()), *(Video.of_folder(folder) for folder in video or ())]
    loaded = Artifact.load(artifact, device=device, threads=threads, keep=keeps)
    live = stream and not as_json
    answer = loaded.generate(
        images,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stream=_say if live else None,
    )
    if live:
        typer.echo()
    elif not as_json:
        typer.echo(answer.text)
    if show_kept is not None:
        _draw(loaded.show_kept(images, answer), show_kept)
    if verbose:
        for line in _lines(answer):
            typer.echo(line, err=True)
    if as_json:
        report(_plain(answer), (), as_json=True)


def _check_images(images: list[Path], no_image: bool) -> None:
    if not images and not no_image:
        raise InputError(
            "no image is given, and the model answers about images",
            hint="add --image FILE, or --no-image for a prompt that needs none",
        )
    if images and no_image:
        raise InputError("--image and --no-image exclude each other", hint="give one of them")


def _check_picture(file: Path, images: list[Path]) -> None:
    """Refuse before the model runs what could not be drawn, or not be written there."""
    if not images:
        raise InputError("--show-kept draws on an image, and none is given", hint="add --image")
    if file.suffix.lower() not in PICTURES:
        raise InputError(
            f"--show-kept does not write {file.suffix or 'a file without a suffix'}",
            where=str(file),
            hint=f"give a path ending in {', '.join(PICTURES)}",
        )
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise InputError(
            "--show-kept cannot be written there",
            where=str(file),
            hint="give a path in a folder that exists and that you may write to",
        )


def _say(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--keep is {text!r}", hint="give one integer per cut: 72,36") from None


def _draw(picture: Any, file: Path) -> None:
    try:
        picture.save(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write the picture: {error}", where=str(file), hint="choose another place"
        ) from None
    typer.echo(f"drew {file}", err=True)


def _plain(answer: "Answer") -> dict[str, Any]:
    return {
        "answer": answer.text,
        "finish": answer.finish,
        "token_ids": list(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
        "vision_tokens": answer.vision_tokens,
        "kept": [tokens.tolist() for tokens in answer.kept],
        "seconds": asdict(answer.timings) | {"tokens_per_second": answer.timings.tokens_per_second},
    }


def _lines(answer: "Answer") -> list[str]:
    kept = [answer.vision_tokens, *(len(tokens) for tokens in answer.kept)]
    times = answer.timings
    return columns(
        [
            ("vision tokens by stage", ", ".join(map(str, kept))),
            ("prompt tokens", str(answer.prompt_tokens)),
            ("images", f"{times.preprocess:.3f} s prepared, {times.vision:.3f} s encoded"),
            ("prefill", f"{times.prefill:.3f} s"),
            ("decode", f"{times.decode:.3f} s, {times.tokens_per_second:.1f} tokens/s"),
        ]
    )
