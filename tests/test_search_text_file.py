"""Text files that a search leaves."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from vtr_export.errors import InputError
from vtr_export.search.text_file import write_text


def test_it_replaces_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("old, and longer")
    write_text(file, "neu: ü\n", "the schedule")
    assert file.read_bytes() == "neu: ü\n".encode()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_stopped_before_it_is_on_the_disk_it_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("old")

    def fails(_: int) -> NoReturn:
        raise stop

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises((InputError, KeyboardInterrupt)):
        write_text(file, "new", "the schedule")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "s", tmp_path / "folder", tmp_path / "none" / "s"):
        with pytest.raises(InputError, match="the schedule cannot be written") as caught:
            write_text(target, "", "the schedule")
        assert caught.value.where == str(target)
        assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
