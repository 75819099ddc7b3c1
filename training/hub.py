"""Models by their name on a Hugging Face hub. No torch in here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyalign.runtime.errors import InputError, TinyAlignError

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of a repository; no code
REFUSED = {401, 403, 404}


def model_place(name: str) -> Path:
    """Where a model lies: the directory or file of that name, or what "owner/name" or
    "owner/name@revision" names on a hub, downloaded into its client's cache the first time.

    Raises InputError where there is neither; TinyAlignError where the hub cannot be reached.
    """
    path = Path(name)
    named = NAME.fullmatch(name)
    if path.exists() or named is None or path.parent.is_dir():
        return path
    api = hub()
    repo = named["repo"]
    with hub_errors(repo):
        info = api.model_info(repo, revision=named["revision"])
        if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or ()):
            raise InputError(
                f"{repo} holds no safetensors: weights in other formats are not downloaded"
            )
        return Path(api.snapshot_download(repo, revision=info.sha, allow_patterns=list(READ)))


def model_name(name: str) -> str:
    """What a model is called, by where it lies or its name on a hub."""
    last = name.partition("@")[0].rstrip("/").rpartition("/")[2]
    return last.removesuffix(".gguf") or "model"


def hub() -> Any:
    """The hub that HF_ENDPOINT names, or the public one; InputError if its client is missing."""
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        raise InputError(
            "huggingface_hub is not installed: pip install 'tinyalign[share]' brings it"
        ) from None
    return HfApi(library_name="tinyalign")


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """What the hub's client raises as one line: InputError when what was asked for is at fault,
    TinyAlignError when the network or the hub is."""
    try:
        yield
    except TinyAlignError:
        raise
    except Exception as error:  # it passes on those of whichever HTTP library it uses
        said = " ".join(str(error).split())[:200] or type(error).__name__
        kind = type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if kind == "RevisionNotFoundError":
            raise InputError(f"{repo} has no such revision") from None
        if status in REFUSED:
            raise InputError(
                f"{repo} is not there, or not for you (HTTP {status}; `hf auth login` says who you "
                "are)"
            ) from None
        if kind == "HFValidationError":
            raise InputError(f"{repo} is no name of a repository: {said}") from None
        raise TinyAlignError(f"{repo}: {kind}: {said}") from error
