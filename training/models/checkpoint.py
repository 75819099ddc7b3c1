"""A model as Hugging Face directories hold it: config.json beside safetensors files, checked.

What cannot be read as it was meant is refused with one line: pickled weights, missing shards, a
config that contradicts itself.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyalign.runtime.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = (
    "load it with transformers where you trust it and save it again with "
    "model.save_pretrained(DIR, safe_serialization=True)"
)
LONGEST_HEADER = 100 << 20  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose config can be read and whose weights are all there."""

    directory: Path
    config: dict[str, Any]
    files: tuple[Path, ...]  # safetensors
    names: frozenset[str]  # of the tensors
    bytes: int  # of all weights

    @property
    def model_type(self) -> str:
        """The architecture, as transformers names it."""
        return str(self.config["model_type"])


def open_checkpoint(directory: Path) -> Checkpoint:
    """Check a model directory; raises InputError with what is wrong and what to do."""
    if not directory.is_dir():
        raise InputError(f"no model directory at {directory}")
    config = read_json(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{directory / 'config.json'} has no model_type")
    files = weight_files(directory)
    names: set[str] = set()
    for file in files:
        names |= tensor_names(file)
    if (directory / INDEX).exists():
        listed = set(read_json(directory / INDEX).get("weight_map", {}))
        if missing := sorted(listed - names):
            raise InputError(f"{directory} is incomplete: no file holds the tensor {missing[0]}")
    size = sum(file.stat().st_size for file in files)
    return Checkpoint(directory, config, files, frozenset(names), size)


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a directory, all that its index names."""
    if (directory / INDEX).exists():
        shards = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
        if not shards:
            raise InputError(f"{directory / INDEX} lists no weights")
        for shard in shards:
            if Path(shard).name != shard:
                raise InputError(f"{directory / INDEX} names a file elsewhere: {shard}")
            if not (directory / shard).is_file():
                raise InputError(
                    f"{directory} is incomplete: {shard} is missing ({len(shards)} files hold "
                    "the weights)"
                )
        return tuple(directory / shard for shard in shards)
    if (directory / WEIGHTS).is_file():
        return (directory / WEIGHTS,)
    pickles = sorted(path.name for kind in PICKLES for path in directory.glob(kind))
    if pickles:
        raise InputError(
            f"{directory} holds its weights as a pickle ({pickles[0]}), which can run any code "
            f"when it is read: {CONVERT}"
        )
    raise InputError(f"{directory} holds no weights: {WEIGHTS} is missing")


def tensor_names(file: Path) -> set[str]:
    """The names in a safetensors file, whose size must be what its header says."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(LONGEST_HEADER, file.stat().st_size):
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{file} is not a safetensors file: {error}") from None
    if 8 + length + end != file.stat().st_size:
        raise InputError(f"{file} is damaged: it ends before or after its last tensor")
    return set(header)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises InputError."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}: not a model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return data


def rope_theta(config: dict[str, Any], default: float | None = None) -> float:
    """The rotary base of a config as transformers 4 (``rope_theta``) or 5 (``rope_parameters``)
    writes it. Refused where both disagree, or where neither stands and there is no ``default``."""
    parameters = config.get("rope_parameters") or {}
    found = [
        float(place["rope_theta"])
        for place in (config, parameters)
        if isinstance(place.get("rope_theta"), (int, float))
    ]
    if len(set(found)) > 1:
        raise InputError(
            f"config.json contradicts itself: rope_theta is {found[0]:g}, but in rope_parameters "
            f"{found[1]:g}"
        )
    if not found and default is None:
        raise InputError(
            "config.json names no rope_theta (nor rope_parameters.rope_theta): a guess would give "
            "wrong answers; add the value that the model was trained with"
        )
    return found[0] if found else float(default or 0.0)


@contextmanager
def in_one_line(place: Path) -> Iterator[None]:
    """Let transformers work without its warnings, and make what it raises an InputError: it checks
    few of a config's values before it computes with them."""
    logging.disable(logging.WARNING)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{place} cannot be used: {type(error).__name__}: {said}") from error
    finally:
        logging.disable(logging.NOTSET)
