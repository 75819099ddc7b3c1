"""A model directory pushed to, and pulled from, a repository of a Hugging Face hub.

A push is one commit of exactly the files that the manifest lists, the manifest and a model card. A
pull names that commit by its 40 digits, so it gives the same bytes for ever, and still checks every
one of them. Nothing here is needed to run a model, and there is no torch in it: a device that has
only the runtime can pull (`pip install 'tinyalign[share]'`).
"""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyalign.export.share_card import model_card
from tinyalign.export.target import check_target, replacing
from tinyalign.runtime.errors import InputError, ModelError
from tinyalign.runtime.files import file_sha256, verify_files
from tinyalign.runtime.manifest import MANIFEST_NAME, Manifest, read_manifest
from tinyalign.training.hub import hub, hub_errors

CARD_NAME = "README.md"
GRAPHS = (".onnx", ".onnx.data", ".ort")  # nothing of the kind may lie in a repository unlisted
FULL_COMMIT = re.compile("[0-9a-f]{40}")


def push(directory: Path, repo: str, private: bool = False) -> str:
    """Push a model directory to `repo` ("owner/name"), which is made if it is not there.

    Every file is checked first. Other graphs that lie in the repository are removed in the same
    commit; what else is there, stays. Returns the commit, by which the model can be pulled.

    Raises InputError for a directory that is no whole model, and for a repository that cannot be
    written to or is public although `private`; TinyAlignError where the hub cannot be reached.
    """
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    api = hub()
    with hub_errors(repo):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api.create_repo(repo, private=private or None, exist_ok=True)
        there = api.model_info(repo)
        if private and not there.private:
            raise InputError(f"{repo} is there already, and public")
        operations: list[Any] = [
            CommitOperationAdd(name, directory / name) for name in model_files(manifest)
        ]
        if CARD_NAME not in model_files(manifest):
            card = model_card(manifest, repo)
            operations.append(CommitOperationAdd(CARD_NAME, card.encode()))
        operations += map(CommitOperationDelete, unlisted_graphs(manifest, file_names(there)))
        message = f"Model {manifest.name}"
        return str(api.create_commit(repo, operations, commit_message=message).oid)


def pull(repo: str, target: Path, revision: str, force: bool = False) -> Manifest:
    """Pull the model of commit `revision` (40 hex digits) of `repo` to the directory `target`.

    It is written beside `target` and takes its place when every file is there and is what the
    manifest says; until then, and whatever happens, `target` stays as it is. `force` replaces
    something that is no model.

    Raises InputError for a branch or a tag (and says which commit it is), for a repository that is
    not there or holds no whole model, and for changed bytes; TinyAlignError where the hub cannot be
    reached.
    """
    check_target(target, force)
    api = hub()
    with hub_errors(repo):
        check_pinned(api, repo, revision)
        info = api.model_info(repo, revision=revision, files_metadata=True)
        if info.sha != revision:
            raise InputError(f"{repo}: asked for commit {revision}, the hub gave {info.sha}")
    where, names = f"{repo} at {revision[:12]}", file_names(info)
    if MANIFEST_NAME not in names:
        raise InputError(f"{where} has no {MANIFEST_NAME}: not a model of tinyalign")
    with replacing(target) as draft:
        download(api, repo, revision, [MANIFEST_NAME], draft)
        check_blob(where, info, draft / MANIFEST_NAME)
        try:
            manifest = read_manifest(draft)
        except ModelError as error:
            raise ModelError(str(error).replace(str(draft), where)) from None
        check_names(where, manifest, names)
        check_disk(target, manifest)
        wanted = [*model_files(manifest), *({CARD_NAME} & set(names))]
        download(api, repo, revision, wanted, draft)
        for entry in manifest.files:
            path = draft / entry.path
            if not path.is_file():
                raise ModelError(f"{where} is incomplete: {entry.path} did not arrive")
            if path.stat().st_size != entry.bytes or file_sha256(path) != entry.sha256:
                raise ModelError(f"{where} is damaged: {entry.path} is not what its SHA-256 says")
    return manifest


def model_files(manifest: Manifest) -> list[str]:
    """The files that make up a model directory."""
    return [MANIFEST_NAME, *(entry.path for entry in manifest.files)]


def file_names(info: Any) -> list[str]:
    """The files of a repository."""
    return [file.rfilename for file in info.siblings or ()]


def unlisted_graphs(manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Graphs, or their weights, that the manifest does not know."""
    known = model_files(manifest)
    return [name for name in names if name.endswith(GRAPHS) and name not in known]


def check_pinned(api: Any, repo: str, revision: str) -> None:
    """Raises InputError for anything but a full commit, and says which one it would be now."""
    if not FULL_COMMIT.fullmatch(revision):
        commit = api.model_info(repo, revision=revision).sha
        raise InputError(
            f"{revision} can mean another model tomorrow: name the commit, which is now "
            f"--revision {commit}"
        )


def check_blob(where: str, info: Any, path: Path) -> None:
    """The manifest lists every other file's hash; its own is that of its object in git."""
    content = path.read_bytes()
    found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    for file in info.siblings:
        if file.rfilename == path.name and not file.lfs and file.blob_id not in (None, found):
            raise ModelError(f"{where} is damaged: {path.name} is not what the commit holds")


def check_names(where: str, manifest: Manifest, names: Sequence[str]) -> None:
    """Raises ModelError where the repository does not hold exactly the model."""
    if missing := [name for name in model_files(manifest) if name not in names]:
        raise ModelError(f"{where} is incomplete: {missing[0]} is missing")
    if extra := unlisted_graphs(manifest, names):
        raise ModelError(f"{where} holds {extra[0]}, which {MANIFEST_NAME} does not list")


def check_disk(target: Path, manifest: Manifest) -> None:
    """Raises InputError where the model does not fit."""
    needed = sum(entry.bytes for entry in manifest.files)
    free = shutil.disk_usage(target.resolve().parent).free
    if needed > free:
        raise InputError(
            f"{target} needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free"
        )


def download(api: Any, repo: str, commit: str, names: Sequence[str], folder: Path) -> None:
    """Download files of a commit into a folder, and remove what the client keeps beside them."""
    with hub_errors(repo):
        api.snapshot_download(
            repo, revision=commit, local_dir=folder, allow_patterns=list(map(glob.escape, names))
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
