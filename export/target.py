"""How a new model directory takes the place of an older one.

Everything is written into a directory beside the target, synced to the disk, and then takes the
target's place in one step, so that whoever looks sees the old model or the new one, never a mix.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import MANIFEST_NAME


def check_target(target: Path, force: bool) -> None:
    """Raises InputError when `target` is something that an export must not replace."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is a file, not a directory")
    if Path.cwd().resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target} holds the working directory: it cannot be replaced")
    if force or not any(target.iterdir()) or (target / MANIFEST_NAME).is_file():
        return
    raise InputError(f"{target} is not empty and no model directory (--force replaces it)")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` at the end of the block.

    If the block raises, the new directory is removed and `target` stays as it was.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    draft = target.parent / f".{target.name}.{os.getpid()}.partial"
    draft.mkdir()
    try:
        yield draft
        sync_files(draft)
        swap(draft, target)
        sync_directory(target.parent)
    finally:
        # by now the old model, or what was written of a failed one
        shutil.rmtree(draft, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove what exports that were killed have left beside `target`."""
    for path in target.parent.glob(f".{target.name}.*.partial"):
        found = re.fullmatch(r".*\.(\d+)\.partial", path.name)
        if found and not is_running(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether a process of that number, other than this one, is there."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def swap(draft: Path, target: Path) -> None:
    """Put `draft` in the place of `target`; an older directory there ends up as `draft`."""
    if not target.exists():
        draft.rename(target)
    elif not exchange(draft, target):
        aside = draft.with_suffix(".old.partial")
        target.rename(aside)  # a moment without a model, where the system cannot exchange
        draft.rename(target)
        aside.rename(draft)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where the system cannot (it is Linux's call)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync_files(directory: Path) -> None:
    """Wait until the files of a directory, and the directory, are on the disk."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Wait until a directory's entries are on the disk (where directories can be opened)."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
