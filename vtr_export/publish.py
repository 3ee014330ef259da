"""An artifact appears whole or not at all: staged beside its place, then put there in one step."""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from vtr_export.errors import ArtifactError
from vtr_export.published import MANIFEST

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def publish(target: Path, *, force: bool) -> Iterator[Path]:
    """A staging folder to fill, manifest last; it becomes ``target`` when the block ends well.

    Staged as ``<name>.tmp-<pid>-<id>`` beside the target, every file and folder fsynced, then one
    rename; an old artifact is exchanged for the new one with ``force`` and removed after. When the
    block fails, or the process dies anywhere, the target is as before or complete. Staging folders
    of dead processes are removed on the way. Raises ArtifactError when ``check_target`` would,
    when the disk is full and when the target may not be written; ValueError without a manifest.
    """
    target = target.expanduser().resolve()
    with _explained(target):
        check_target(target, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        staging, lock = _stage(target)
    try:
        with _explained(target, staging):
            yield staging
        if not (staging / MANIFEST).is_file():
            raise ValueError(f"{staging} was not finished: it has no {MANIFEST}")
        with _explained(target):
            _sync(staging)
            check_target(target, force)
            _put(staging, target, force)
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, force: bool, needed_bytes: int = 0) -> None:
    """ArtifactError when ``target`` could not be published now; touches nothing.

    It must be new, an empty folder, or with ``force`` an artifact; a folder that is neither is
    never replaced. ``needed_bytes`` must be free beside what is there.
    """
    target = target.expanduser().resolve()
    with _explained(target):
        if target.is_dir():
            _check_replaceable(target, force)
        elif target.exists():
            _fail("the target is a file", target, "give a folder that does not exist yet")
        _check_place(target, needed_bytes)


def _check_place(target: Path, needed_bytes: int) -> None:
    """The folder the target is made in, or its nearest ancestor that exists, takes it."""
    place = next(folder for folder in target.parents if folder.exists())
    if not place.is_dir():
        _fail(f"the target cannot be made: {place} is a file", target)
    if not os.access(place, os.W_OK | os.X_OK):
        _fail(f"the target cannot be made: no permission to write in {place}", target)
    disk = shutil.disk_usage(place)
    if disk.total and disk.free < needed_bytes:  # of 0 bytes: a file system that does not count
        message = f"the disk is too full: {needed_bytes:,} bytes are needed, {disk.free:,} free"
        _fail(message, target, "free some space, choose another disk, or use --weights link")


def _check_replaceable(target: Path, force: bool) -> None:
    if not any(target.iterdir()):
        return
    if not _is_artifact(target):
        hint = "choose another folder, or remove this one yourself"
        _fail("the target holds something else than an artifact: not replaced", target, hint)
    if not force:
        _fail("the target exists", target, "--force replaces it")


def _is_artifact(folder: Path) -> bool:
    """Whether the folder has a manifest of ours: other tools write a manifest.json too."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return "vtr_export" in manifest["versions"] and "format" in manifest
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def _stage(target: Path) -> tuple[Path, int]:
    """A new folder beside the target, and the descriptor whose lock says its owner lives."""
    while True:
        staging = _beside(target, "tmp")
        staging.mkdir()
        try:
            lock = _lock(staging)
        except OSError:  # no locks here: then nobody's staging folder is ever cleaned away
            return staging, os.open(staging, os.O_RDONLY)
        if lock is None:
            continue
        if staging.exists():
            return staging, lock
        os.close(lock)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None when the folder is held, or gone.

    OSError where the file system has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _clean(target: Path) -> None:
    """Remove what dead processes left; put an old artifact back that one of them had set aside."""
    pattern = re.compile(re.escape(target.name) + r"\.(tmp|old)-\d+-[0-9a-f]{8}")
    for folder in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(folder.name)
        if match and folder.is_dir() and not folder.is_symlink():
            with suppress(OSError):  # not ours to remove, or no locks here
                _clean_one(folder, target, was_target=match[1] == "old")


def _clean_one(folder: Path, target: Path, was_target: bool) -> None:
    lock = _lock(folder)
    if lock is None:
        return
    try:
        if was_target and not target.exists():
            folder.rename(target)
        else:
            shutil.rmtree(folder)
    finally:
        os.close(lock)


def _sync(folder: Path) -> None:
    """Everything below ``folder`` is on the disk; the folder's own entries last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(staging: Path, target: Path, force: bool) -> None:
    """Make ``staging`` the target; what was there is then at ``staging``, or gone."""
    try:
        staging.rename(target)
    except OSError as error:
        if not force or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(staging, target):
            _set_aside(staging, target)
    _sync_one(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    old, new = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _set_aside(staging: Path, target: Path) -> None:
    """Two renames where there is no exchange: killed between them, nothing is at the target.

    The old artifact then waits as ``<name>.old-…``, and the next publication puts it back.
    """
    aside = _beside(target, "old")
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # held, so that nobody puts it back meanwhile; or no locks here
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        target.rename(aside)
        try:
            staging.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(target: Path, staging: Path | None = None) -> Iterator[None]:
    """Turn a full disk, or a refusal to write the target, into an ArtifactError.

    A refusal inside the caller's block counts only when it concerns the staging folder.
    """
    try:
        yield
    except OSError as error:
        concerns_target = staging is None or str(error.filename or "").startswith(str(staging))
        if error.errno in _FULL:
            hint = "free some space, or choose another disk; the target is as it was"
            _fail(f"the disk is full: {error.strerror}", target, hint)
        if staging is None or (error.errno in _FORBIDDEN and concerns_target):
            _fail(f"the target cannot be written: {error.strerror}", target)
        raise


def _fail(message: str, where: Path, hint: str = "choose a folder you may write to") -> NoReturn:
    raise ArtifactError(message, where=str(where), hint=hint)
