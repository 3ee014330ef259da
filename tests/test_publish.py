"""Published is whole: old, new or nothing, whatever happens in the middle."""

import errno
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import in_child
from test_manifest import GRAPHS, manifest

from vtr_export import publish as module
from vtr_export.errors import ArtifactError
from vtr_export.manifest import Manifest
from vtr_export.publish import check_target, publish
from vtr_export.published import MANIFEST, hash_files

FILES = [
    *GRAPHS.values(),
    "onnx/decoder.onnx.data",
    "config.json",
    "schedule.yaml",
    "golden/a.npz",
    "golden/b.npz",
]
CALLS = ("mkdir", "open", "fsync", "close", "rename", "replace", "unlink", "rmdir", "scandir")


def fill(folder: Path, mark: str, size_bytes: int = 3000) -> None:
    """Write an artifact every file of which says ``mark``."""
    for path in FILES:
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(mark * (size_bytes // len(mark)))
    files = {name: file.model_dump() for name, file in hash_files(folder).items()}
    manifest(files=files).save(folder)


def export(target: Path, mark: str, *, force: bool = False, size_bytes: int = 3000) -> None:
    with publish(target, force=force) as staging:
        fill(staging, mark, size_bytes)


def mark_of(target: Path) -> str | None:
    """What a whole artifact says; None when there is none. Anything in between fails."""
    if not target.exists():
        return None
    Manifest.load(target).check_hashes(target, full=True)
    marks = {(target / path).read_text()[:3] for path in FILES}
    assert len(marks) == 1
    return marks.pop()


def strays(target: Path) -> list[str]:
    return sorted(file.name for file in target.parent.iterdir() if file != target)


def refused(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        act()
    text = str(caught.value)
    assert all(word in text for word in ("VTR201", "help:", *words)), text


def kill_before(number: int) -> Callable[[], int]:
    """Make the ``number``-th call into the system from here on the last; counts them."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def before(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return before

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    module._exchange = counted(module._exchange)  # type: ignore[assignment]
    return lambda: count


def count_calls(act: Callable[[], Any]) -> int:
    """How many calls ``act`` makes, found in a child."""
    read, write = os.pipe()

    def child() -> None:
        total = kill_before(0)
        act()
        os.write(write, str(total()).encode())

    assert in_child(child) == 0
    counted = int(os.read(read, 100))
    os.close(read)
    os.close(write)
    return counted


def no_exchange(one: Path, other: Path) -> bool:
    return False


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: there every fsync is instant."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.parametrize("start", ["nothing", "old", "old, no exchange"])
def test_killed_anywhere_it_is_old_or_new_or_nothing(
    quick_disk: Path, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of the step that publishes, at least 50, is the last one once."""
    target = quick_disk / "case" / "artifact"
    target.parent.mkdir()
    if start == "old, no exchange":
        monkeypatch.setattr(module, "_exchange", no_exchange)

    def prepare() -> None:
        shutil.rmtree(target.parent)
        target.parent.mkdir()
        if start != "nothing":
            export(target, "old")

    def act() -> None:
        export(target, "new", force=start != "nothing")

    prepare()
    points = count_calls(act)
    assert points >= 50
    seen = set()
    for number in range(1, points + 1):
        prepare()
        status = in_child(lambda number=number: (kill_before(number), act()))
        assert os.WIFSIGNALED(status), number
        seen.add(mark_of(target))
        assert len(strays(target)) <= 2
        export(target, "two", force=True)
        assert mark_of(target) == "two"
        assert strays(target) == []
    last_resort = {None} if start != "old" else set()
    assert seen <= {"new", "old"} | last_resort
    assert "new" in seen


def test_an_old_artifact_set_aside_by_a_dead_process_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_exchange", no_exchange)
    target = tmp_path / "artifact"
    export(target, "old")
    target.rename(tmp_path / "artifact.old-1-00000000")
    with pytest.raises(RuntimeError), publish(target, force=True):
        raise RuntimeError
    assert mark_of(target) == "old"
    export(target, "new", force=True)
    assert mark_of(target) == "new"
    assert strays(target) == []


def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "artifact"

    def fail(error: BaseException) -> None:
        with publish(target, force=False) as staging:
            fill(staging, "new")
            raise error

    for error in (RuntimeError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
        assert strays(target) == []
        assert not target.exists()
    export(target, "old")
    with pytest.raises(ValueError, match="manifest"), publish(target, force=True) as staging:
        (staging / "config.json").write_text("{}")
    assert mark_of(target) == "old"
    assert strays(target) == []


def test_missing_parents_are_made_and_permissions_are_the_usual(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "artifact"
    export(target, "new")
    usual = tmp_path / "usual"
    usual.mkdir()
    assert target.stat().st_mode == usual.stat().st_mode
    check_target(target, force=True)


def test_an_empty_folder_is_a_place(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    export(target, "new")
    assert mark_of(target) == "new"


def test_an_existing_artifact_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    export(target, "old")
    refused(lambda: check_target(target, force=False), "exists", "--force")
    refused(lambda: export(target, "new"), "--force")
    assert mark_of(target) == "old"
    check_target(target, force=True)
    export(target, "new", force=True)
    assert mark_of(target) == "new"
    assert strays(target) == []


OTHERS = {
    "photo.jpg": "x",
    MANIFEST: '{"name": "a web app", "version": "1"}',
    "subfolder/manifest.json": "{}",
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_something_else_is_never_replaced(
    tmp_path: Path, name: str, force: bool
) -> None:
    file = tmp_path / "precious" / name
    file.parent.mkdir(parents=True)
    file.write_text(OTHERS[name])
    refused(lambda: export(tmp_path / "precious", "new", force=force), "something else")
    assert file.read_text() == OTHERS[name]
    assert strays(tmp_path / "precious") == []


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "artifact"

    def act() -> None:
        with publish(target, force=force) as staging:
            fill(staging, "new")
            target.mkdir()
            (target / "photo.jpg").write_text("x")

    refused(act, "something else")
    assert (target / "photo.jpg").read_text() == "x"
    assert strays(target) == []


def test_a_folder_that_appears_in_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "artifact"
    monkeypatch.setattr(module, "_sync", lambda _: (target.mkdir(), (target / "x").write_text("x")))
    monkeypatch.setattr(module, "check_target", lambda *_: None)
    refused(lambda: export(target, "new"), "cannot be written")
    assert (target / "x").read_text() == "x"


def test_a_target_that_is_a_file_or_below_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    refused(lambda: check_target(file, force=True), "is a file")
    refused(lambda: check_target(file / "below" / "it", force=True), "file")
    assert file.read_text() == "x"


def test_a_symlinked_target_is_replaced_where_it_points(tmp_path: Path) -> None:
    export(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    export(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert mark_of(tmp_path / "real") == "new"


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    check_target(tmp_path / "artifact", force=False, needed_bytes=1)
    refused(lambda: check_target(tmp_path / "a" / "b", False, 1 << 60), "too full", f"{1 << 60:,}")


def test_an_unwritable_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.mkdir(0o500)
    if os.getuid() == 0:  # root may write everywhere: ask as another user would be answered
        monkeypatch.setattr(os, "access", lambda *_: False)
    refused(lambda: check_target(place / "artifact", force=False), "permission")
    refused(lambda: export(place / "artifact", "new"), "permission")


FAILURES = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EACCES: "written",
    errno.EROFS: "written",
}


@pytest.mark.parametrize("number", FAILURES)
@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync"])
def test_refused_system_calls_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    target = tmp_path / "artifact"

    def fail(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), None if isinstance(path, int) else str(path))

    with monkeypatch.context() as patch:
        original = os.fsync
        patch.setattr(os, call, fail)
        if call == "fsync":  # the manifest's own fsync is the caller's
            patch.setattr(
                Manifest,
                "save",
                lambda self, folder: (folder / MANIFEST).write_text(self.to_json()),
            )
        refused(lambda: export(target, "new"), FAILURES[number])
        assert original is not os.fsync or call != "fsync"
    assert not target.exists()
    assert strays(target) == []


def test_errors_of_the_block_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), publish(tmp_path / "artifact", force=False):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/tokenizer.json")


def test_a_full_disk_never_harms_the_old_artifact(small_disk: Path) -> None:
    """20 fill levels, from no room at all to enough."""
    target, ballast = small_disk / "artifact", small_disk / "ballast"
    export(target, "old", size_bytes=30_000)
    free_bytes = shutil.disk_usage(small_disk).free
    outcomes: list[str] = []
    messages: list[str] = []
    for level in range(20):
        room = level * 400_000 // 19
        ballast.write_bytes(bytes(free_bytes - room))
        outcomes.append("new")
        try:
            export(target, "new", force=True, size_bytes=30_000)
        except ArtifactError as error:
            messages.append(str(error))
            outcomes[-1] = "old"
        assert mark_of(target) == outcomes[-1]
        assert strays(target) == ["ballast"]
        if outcomes[-1] == "new":
            ballast.unlink()
            export(target, "old", force=True, size_bytes=30_000)
    assert all("full" in message for message in messages)
    assert outcomes == sorted(outcomes, reverse=True)
    assert set(outcomes) == {"old", "new"}


def test_a_file_size_limit_is_explained(tmp_path: Path) -> None:
    """The same on a machine where nothing can be mounted."""
    target = tmp_path / "artifact"
    export(target, "old")

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        refused(lambda: export(target, "new", force=True), "full")

    assert in_child(act) == 0
    assert mark_of(target) == "old"
    assert strays(target) == []


def test_only_what_the_dead_left_is_cleaned_away(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    (tmp_path / "artifact.tmp-1-00000000").mkdir()
    kept = ["artifact.tmp-mine", "artifact.tmp-1-0000000", "other.tmp-1-00000000", "artifact.tmp"]
    for name in kept:
        (tmp_path / name).mkdir()
    with publish(target, force=False) as alive:
        fill(alive, "one")
        assert in_child(lambda: export(target, "two")) == 0
        assert alive.exists()
        assert "artifact.tmp-1-00000000" not in strays(target)
        shutil.rmtree(target)
    assert mark_of(target) == "one"
    assert strays(target) == sorted(kept)


def test_a_file_system_without_locks_still_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    debris = tmp_path / "artifact.tmp-1-00000000"
    debris.mkdir()
    export(tmp_path / "artifact", "old")
    export(tmp_path / "artifact", "new", force=True)
    assert mark_of(tmp_path / "artifact") == "new"
    assert debris.exists()


def test_several_processes_publish_to_one_target(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    export(target, "old")
    children = []
    for mark in ("aaa", "bbb", "ccc", "ddd"):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(10):
                    export(target, mark, force=True)
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert mark_of(target) in ("aaa", "bbb", "ccc", "ddd")
    assert strays(target) == []
