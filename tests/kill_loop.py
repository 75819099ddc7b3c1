"""SIGKILL a process amid changes to a bank, again and again, and check the bank after each.

    python tests/kill_loop.py --kills 3000

A child adds, removes, updates, merges, compacts and builds the index cache, and says before and
after each step through a pipe what it does. It is killed at a random moment. Then
the bank must hold exactly what all finished steps left, with the unfinished one done or not done;
every memory must be sound, and what is searched for must be found. Children are forked, so that a
kill costs milliseconds. Half of the kills are on a bank in WAL mode, half on a sealed one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tinyalign.bank import Bank, NewMemory, index

WIDTH, LATENT = 16, 8
FINGERPRINT = "ab" * 32
OTHERS = 60  # memories of the bank that is merged
GRAPH_FROM = 40  # memories, so that the index cache is written and killed too
BATCHES = 30  # of added memories, at most
LONGEST = 8  # steps of a child before it is killed
State = dict[str, int]  # text -> the number in its metadata


def new_memory(text: str, number: int) -> NewMemory:
    """A memory that is all made from its text."""
    random = np.random.default_rng(list(text.encode()))
    key = random.standard_normal(WIDTH)
    latents = random.standard_normal((2, LATENT)).astype(np.float32)
    key = (key / np.linalg.norm(key)).astype(np.float32)
    return NewMemory(key, latents, text, metadata={"n": number}, thumbnail=text.encode() * 9)


def next_step(state: State, number: int, random: Random) -> dict[str, Any]:
    """What to do next: the verb, the texts it is about, and a number that is new."""
    batches = sorted({text.split()[1] for text in state if text.startswith("own")})
    merged = any(text.startswith("other") for text in state)
    verbs = ["add", "add", "compact", "reindex", "drop" if merged else "merge"]
    if batches:
        verbs += ["remove", "update"] if len(batches) < BATCHES else ["remove"] * 5
    verb = random.choice(verbs)
    if verb == "add":
        texts = [f"own {number} {part}" for part in range(random.randint(1, 6))]
    elif verb in ("remove", "update"):
        batch = random.choice(batches)
        texts = [text for text in state if text.startswith(f"own {batch} ")]
        texts = texts if verb == "remove" else texts[:1]
    elif verb == "drop":
        texts = [text for text in state if text.startswith("other")]
    else:
        texts = [f"other {part}" for part in range(OTHERS)] if verb == "merge" else []
    return {"verb": verb, "texts": texts, "number": number}


def after(state: State, step: dict[str, Any]) -> State:
    """The state when a step is done."""
    if step["verb"] in ("remove", "drop"):
        return {text: number for text, number in state.items() if text not in step["texts"]}
    if step["verb"] == "merge":
        return dict.fromkeys(step["texts"], 0) | state
    return state | dict.fromkeys(step["texts"], step["number"])


def take(step: dict[str, Any], bank: Bank, other: Path) -> None:
    """Do a step."""
    verb, texts, number = step["verb"], step["texts"], step["number"]
    if verb == "add":
        bank.add(new_memory(text, number) for text in texts)
    elif verb == "compact":
        bank.compact()
    elif verb == "reindex":
        bank.reindex()
    elif verb == "merge":
        with Bank.open(other, read_only=True) as more:
            bank.merge(more)
    else:
        ids = {memory.text: memory.id for memory in bank.list()}
        if verb == "update":
            bank.update(ids[texts[0]], metadata={"n": number})
        else:
            bank.remove(ids[text] for text in texts)


def work(path: Path, other: Path, state: State, number: int, random: Random, pipe: int) -> None:
    """The child: step after step, each told before and after it is done."""
    with Bank.open(path) as bank:
        while True:
            step = next_step(state, number, random)
            os.write(pipe, json.dumps(step).encode() + b"\n")
            take(step, bank, other)
            os.write(pipe, b"done\n")
            state, number = after(state, step), number + 1


def killed(path: Path, other: Path, state: State, number: int, random: Random) -> list[str]:
    """Start a child, kill it at a random moment; the lines it wrote."""
    reading, writing = os.pipe()
    steps = random.randint(0, LONGEST)
    delay = random.uniform(0, 0.004)
    child = os.fork()
    if child == 0:
        try:
            work(path, other, state, number, random, writing)
        except BaseException as error:
            os.write(writing, f"failed: {error!r}\n".encode())
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = b""
        while data.count(b"\n") <= 2 * steps and (more := os.read(pipe.fileno(), 4096)):
            data += more
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        data += pipe.read()
    return data.decode().splitlines()


def check(path: Path, allowed: list[State], random: Random) -> State:
    """Open the bank; it must be sound and in one of the allowed states, which is returned."""
    with Bank.open(path) as bank:
        assert bank.verify().sound, bank.verify().problems
        memories = bank.list()
        state = {memory.text: memory.metadata["n"] for memory in memories}
        assert state in allowed, f"{sorted(state.items())} is not in {allowed}"
        assert len(memories) == len(state), "a memory is there twice"
        if memories:
            for wanted in random.choices(memories, k=3):
                new = new_memory(wanted.text, 0)
                assert np.array_equal(wanted.key, new.key.astype(np.float16).astype(np.float32))
                assert wanted.thumbnail == new.thumbnail
                assert bank.search(new.key, 1)[0].id == wanted.id, "a memory is not found"
    return state


def run(folder: Path, kills: int, sealed: bool, seed: int) -> Counter[str]:
    """Kill a process so many times on one bank; in which verbs it was killed."""
    random = Random(seed)
    path, other = folder / f"bank-{sealed}.sqlite", folder / f"other-{sealed}.sqlite"
    with Bank.create(other, FINGERPRINT, WIDTH, LATENT) as bank:
        bank.add(new_memory(f"other {number}", 0) for number in range(OTHERS))
    with Bank.create(path, FINGERPRINT, WIDTH, LATENT) as bank:
        if sealed:
            bank.seal()
    state: State = {}
    amid: Counter[str] = Counter()
    number = 0
    for _ in range(kills):
        lines = killed(path, other, state, number, random)
        assert not any(line.startswith("failed") for line in lines), lines[-1]
        steps = [json.loads(line) for line in lines if line.startswith("{")]
        unfinished = steps.pop() if lines[-1:] != ["done"] and steps else None
        for step in steps:
            state = after(state, step)
        amid[unfinished["verb"] if unfinished else "none"] += 1
        allowed = [state, after(state, unfinished)] if unfinished else [state]
        state = check(path, allowed, random)
        number += LONGEST * 3
        random.seed(random.getrandbits(64))  # the child drew from a copy of it
    return amid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    index.EXACT_LIMIT = GRAPH_FROM
    started = time.monotonic()
    amid: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for sealed in (False, True):
            half = (options.kills + (not sealed)) // 2
            amid += run(Path(folder), half, sealed, options.seed)
    verbs = ", ".join(f"{verb} {count}" for verb, count in sorted(amid.items()))
    print(f"{amid.total()} kills in {time.monotonic() - started:.0f} s, amid: {verbs}")
    print("nothing lost, nothing half there")


if __name__ == "__main__":
    main()
