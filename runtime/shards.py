"""Many pictures into a bank with Ray: workers look at them and write shards, which are merged.

items ─► parts of 64 ─► workers, one thread each ─► shard banks ─► merge, in order ─► bank

The result is the same as without Ray, bit for bit: what a picture becomes does not depend on its
neighbours, and shards are merged in the order of the items.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tinyalign.bank import Bank
from tinyalign.bank.bank import MemoryBank
from tinyalign.bank.opening import open_bank
from tinyalign.runtime.errors import InputError, TinyAlignError
from tinyalign.runtime.items import Item
from tinyalign.runtime.model import TinyAlign
from tinyalign.runtime.teach import (
    Failure,
    Taught,
    check_items,
    create_bank,
    encode_items,
    tally,
)

SHARD = 64  # items; what workers have not finished is done again after an interruption
AHEAD = 3  # shards a worker that are begun or wait for their turn to be merged
OBJECT_STORE = 80 << 20  # bytes, about the least Ray takes: only lists of items pass through it
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns that this will change
}
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: listen on 127.0.0.1 only
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # for this process and its workers; else ~ keeps one
}


@dataclass(frozen=True)
class Shard:
    """What became of a part of the items; its new memories are in the bank at ``path``."""

    path: Path
    hashes: tuple[str, ...]  # content hash of every item whose picture could be read, in order
    failed: tuple[Failure, ...]


def teach_with_ray(
    model: TinyAlign,
    items: Sequence[Item],
    bank: MemoryBank,
    workers: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Taught:
    """Like ``teach``, with ``workers`` processes.

    They are started on this machine, or belong to the Ray cluster at $RAY_ADDRESS, where pictures,
    model and bank must have the same paths. InputError if Ray is not installed.
    """
    check_items(model, items)
    done, finished = Taught((), (), ()), 0
    target = bank.path
    beside = target.absolute() if isinstance(target, Path) else None
    with (
        tempfile.TemporaryDirectory(
            prefix=f"{beside.name if beside else 'tinyalign'}.shards-",
            dir=beside.parent if beside else None,
        ) as folder,
        _started(workers) as ray,
    ):
        task = ray.remote(num_cpus=1)(write_shard)
        place = (model.parts.directory.absolute(), target, Path.cwd())
        parts = deque(items[i : i + SHARD] for i in range(0, len(items), SHARD))
        pending: deque[Any] = deque()
        begun = 0
        while parts or pending:
            while parts and len(pending) < AHEAD * workers:
                path = Path(folder, f"{begun:06}.sqlite")
                pending.append(task.remote(parts.popleft(), path, *place))
                begun += 1
            shard = _result(ray, pending.popleft())
            before = {content: bank.find(content) for content in shard.hashes}
            with Bank.open(shard.path, read_only=True) as written:
                bank.merge(written)
            shard.path.unlink()
            now = {content: bank.find(content) for content in shard.hashes}
            done = tally(done, shard.hashes, before, now, shard.failed)
            finished = min(finished + SHARD, len(items))
            progress(finished)
    return done


def write_shard(
    items: Sequence[Item], path: Path, model: Path, target: Path | str, folder: Path
) -> Shard:
    """A worker's task: look at the pictures that ``target`` does not know, write them to ``path``.

    ``folder`` is the directory that the items' paths start from.
    """
    os.chdir(folder)
    loaded = _model(model)
    with open_bank(target, read_only=True) as known:
        batch = encode_items(loaded, items, known.find)
    with create_bank(loaded, path) as shard:
        shard.add(batch.new)
    return Shard(path, batch.hashes, batch.failed)


@cache
def _model(directory: Path) -> TinyAlign:
    """A worker's model, loaded at its first task."""
    return TinyAlign.load(directory, threads=1, banks=[], lm=False)


@contextmanager
def _started(workers: int) -> Iterator[Any]:
    """Ray's module with Ray running: on 127.0.0.1 only (or a cluster), nothing printed."""
    ray = import_ray()
    if ray.is_initialized():  # by the program that this is part of
        yield ray
        return
    cluster = os.environ.get("RAY_ADDRESS")
    # A short path, since sockets lie below it, and one that goes away with the logs in it.
    short = "/tmp" if Path("/tmp").is_dir() else None
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir=short, ignore_cleanup_errors=True
    ) as folder:
        local = {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_temp_dir": folder,
        }
        try:
            _init(ray, address=cluster or "local", **({} if cluster else local))
            yield ray
        finally:
            ray.shutdown()


def _init(ray: Any, **options: Any) -> None:
    try:
        ray.init(log_to_driver=False, logging_level="error", **options)
    except Exception as error:  # it raises whatever its processes' trouble leads to
        raise TinyAlignError(f"Ray cannot be started: {error}") from None


def import_ray() -> Any:
    """Ray's module; InputError if it is not installed."""
    settings = QUIET if os.environ.get("RAY_ADDRESS") else QUIET | LOCAL
    for name, value in settings.items():  # it reads some of them when it is imported
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--ray needs Ray: pip install 'tinyalign[ray]'") from None
    return ray


def _result(ray: Any, future: Any) -> Shard:
    """What a task returned; what it raised, as one line."""
    try:
        shard: Shard = ray.get(future)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TinyAlignError):
            raise error.cause from None
        raise TinyAlignError(f"a Ray worker failed: {error.cause!r}") from None
    except ray.exceptions.RayError as error:
        first = str(error).strip().partition("\n")[0]
        raise TinyAlignError(f"a Ray worker died ({first}): run the command again") from None
    return shard
