"""A model directory goes to a hub and comes back, byte for byte or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hub_stand_in import Hub, serve
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from tiny_model import FILES, picture

from tinyalign.export.share import pull, push
from tinyalign.export.share_card import model_card
from tinyalign.export.share_cli import main
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.errors import InputError, ModelError, TinyAlignError
from tinyalign.runtime.manifest import MANIFEST_NAME, Licence, read_manifest

REPO = "ada/pumps"
MODEL = {MANIFEST_NAME, *FILES}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        # the client reads the environment when it is imported
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        disable_progress_bars()
        yield hub
        enable_progress_bars()


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def put(hub: Hub, model: Path, **changes: bytes | None) -> str:
    """A model as a commit of the hub, with other, more or (None) fewer files."""
    files = contents(model) | {name.replace("__", "."): new for name, new in changes.items()}
    repository = hub.repositories.get(REPO) or hub.new(REPO)
    return repository.commit({name: data for name, data in files.items() if data is not None})


def test_what_is_pushed_comes_back(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    commit = push(tiny, REPO)
    assert commit == hub.repositories[REPO].main
    assert set(hub.repositories[REPO].commits[commit]) == {*MODEL, "README.md", ".gitattributes"}
    manifest = pull(REPO, tmp_path / "new" / "model", commit)
    assert manifest == read_manifest(tiny)
    pulled = contents(tmp_path / "new" / "model")
    assert pulled.pop("README.md").decode() == model_card(manifest, REPO)
    assert pulled == contents(tiny)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    with TinyAlign.load(tmp_path / "new" / "model") as model, TinyAlign.load(tiny) as original:
        assert model.ask(picture(0), "What?").text == original.ask(picture(0), "What?").text


def test_push_again(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    """The same model is the same commit; a graph of an older one goes, other files stay."""
    first = push(tiny, REPO)
    assert push(tiny, REPO) == first
    repository = hub.repositories[REPO]
    repository.commit({**repository.commits[first], "old.onnx": b"old", "photo.jpg": b"a photo"})
    second = push(tiny, REPO)
    assert set(repository.commits[second]) - set(repository.commits[first]) == {"photo.jpg"}
    assert "photo.jpg" not in contents(pull_to(tmp_path / "model", second))


def pull_to(target: Path, commit: str) -> Path:
    pull(REPO, target, commit)
    return target


def test_push_refuses_a_damaged_model_before_it_asks_the_hub(
    hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    data = bytearray((model / "key.npz").read_bytes())
    data[-1] ^= 1
    (model / "key.npz").write_bytes(data)
    with pytest.raises(ModelError, match=r"key\.npz is not what its SHA-256 says"):
        push(model, REPO)
    assert hub.requests == []


def test_private(hub: Hub, tiny: Path) -> None:
    push(tiny, REPO, private=True)
    assert hub.repositories[REPO].private
    push(tiny, REPO, private=True)
    hub.new("ada/public")
    with pytest.raises(InputError, match="ada/public is there already, and public"):
        push(tiny, "ada/public", private=True)
    assert len(hub.repositories["ada/public"].commits) == 1


def test_a_model_of_the_target_is_replaced_and_other_things_are_not(
    hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    commit, target = put(hub, tiny), tmp_path / "model"
    pull(REPO, target, commit)
    (target / "stray").write_text("x")
    pull(REPO, target, commit)
    assert set(contents(target)) == MODEL
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="--force"):
        pull(REPO, other, commit)
    assert contents(other) == {"letter.txt": b"dear"}
    pull(REPO, other, commit, force=True)
    assert set(contents(other)) == MODEL


@pytest.mark.parametrize("revision", ["main", "0123abc", "A" * 40])
def test_only_a_full_commit_is_pulled(hub: Hub, tiny: Path, tmp_path: Path, revision: str) -> None:
    commit = put(hub, tiny)
    reason = f"--revision {commit}" if revision == "main" else "no such revision"
    with pytest.raises(InputError, match=reason):
        pull(REPO, tmp_path / "model", revision)
    assert not (tmp_path / "model").exists()


CHANGES = {
    "is incomplete: lm.onnx.data is missing": {"lm__onnx__data": None},
    "holds extra.onnx, which tinyalign.json does not list": {"extra__onnx": b"bad"},
    "holds lm.ort, which tinyalign.json does not list": {"lm__ort": b"bad"},
    "is damaged: key.npz is not what its SHA-256 says": {"key__npz": b"bad"},
    "is damaged: lm.onnx is not what its SHA-256 says": {"lm__onnx": b""},
    "has no tinyalign.json: not a model": {"tinyalign__json": None},
    "tinyalign.json is not valid JSON": {"tinyalign__json": b"{"},
    "missing key chat": {"tinyalign__json": b'{"format": 4}'},
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_repository_that_is_no_whole_model(
    hub: Hub, tiny: Path, tmp_path: Path, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = put(hub, tiny, **CHANGES[reason])
    target = tmp_path / "models" / "model"
    shutil.copytree(tiny, target)
    before = contents(target)
    assert main(["pull", REPO, str(target), "--revision", commit]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("tinyalign-share: ") and reason in line and commit[:12] in line
    assert ".partial" not in line
    assert contents(target) == before
    assert list(target.parent.iterdir()) == [target]


def test_every_byte_counts(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    data = bytearray((tiny / "embeddings.bin").read_bytes())
    data[len(data) // 2] ^= 1
    commit = put(hub, tiny, embeddings__bin=bytes(data))
    with pytest.raises(ModelError, match=r"embeddings\.bin is not what its SHA-256 says"):
        pull(REPO, tmp_path / "model", commit)
    assert not any(tmp_path.glob("*model*"))


def test_the_manifest_is_that_of_the_commit(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = put(hub, tiny)
    monkeypatch.setattr("hub_stand_in.git_id", lambda _content: "0" * 40)
    with pytest.raises(ModelError, match=r"tinyalign\.json is not what the commit holds"):
        pull(REPO, tmp_path / "model", commit)


def test_another_commit_than_asked_for(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = put(hub, tiny)
    monkeypatch.setattr("hub_stand_in.Repository.at", lambda self, revision: self.main)
    with pytest.raises(InputError, match=f"the hub gave {commit}"):
        pull(REPO, tmp_path / "model", "0" * 40)


def test_files_in_folders(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "a [1]").mkdir()
    (model / "key.npz").rename(model / "a [1]" / "key.npz")
    text = (model / MANIFEST_NAME).read_text().replace('"key.npz"', '"a [1]/key.npz"')
    (model / MANIFEST_NAME).write_text(text)
    pull(REPO, tmp_path / "pulled", push(model, REPO))
    assert set(contents(tmp_path / "pulled")) == {*contents(model), "README.md"}


def test_a_connection_that_breaks(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, hub.cut = put(hub, tiny), "lm.onnx.data"
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # the client's, before it tries again
    with pytest.raises(TinyAlignError, match=REPO):
        pull(REPO, tmp_path / "model", commit)
    assert not any(tmp_path.glob("*model*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_pull_leaves_the_old_model(
    hub: Hub, tiny: Path, tmp_path: Path, number: int
) -> None:
    target = tmp_path / "models" / "model"
    shutil.copytree(tiny, target)
    before, commit, hub.slow = contents(target), put(hub, tiny), 0.05
    command = [sys.executable, "-m", "tinyalign.export.share_cli", "pull", REPO, str(target)]
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    child = subprocess.Popen([*command, "--revision", commit], env=environment)
    deadline = time.monotonic() + 30
    while not any(r.startswith("GET") and r.endswith("lm.onnx.data") for r in hub.requests):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(number)
    hub.slow = 0.0
    assert child.wait(30) == (130 if number == signal.SIGINT else -number)
    assert contents(target) == before
    pull(REPO, target, commit)
    assert list(target.parent.iterdir()) == [target]


def test_nobody_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for work in (
        lambda: push(tiny, REPO),
        lambda: pull(REPO, tmp_path / "model", "0" * 40),
    ):
        with pytest.raises(TinyAlignError, match=REPO) as caught:
            work()
        assert not isinstance(caught.value, InputError)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_command_line(
    hub: Hub, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tiny), REPO]) == 0
    commit = capsys.readouterr().out.strip()
    assert commit == hub.repositories[REPO].main
    target = str(tmp_path / "model")
    assert main(["pull", REPO, target, "--revision", commit]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: ")
    for arguments, reason in (
        (["pull", REPO, target], f"is now --revision {commit}"),
        (["pull", "ada/none", target, "--revision", commit], "ada/none is not there, or not for"),
        (["pull", "a/b/c", target, "--revision", commit], "a/b/c is no name of a repository"),
        (["push", str(tmp_path / "none"), REPO], "no model directory"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert reason in error and len(error.splitlines()) == 1


def test_without_huggingface_hub(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["push", str(tiny), REPO]) == 2
    assert "pip install 'tinyalign[share]'" in capsys.readouterr().err


def test_a_device_needs_no_torch_to_pull(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from tinyalign.export.share import pull; "
        f"pull({REPO!r}, __import__('pathlib').Path({str(tmp_path / 'm')!r}), sys.argv[1]); "
        "assert not {'torch', 'transformers', 'onnx', 'optimum'} & set(sys.modules)"
    )
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, put(hub, tiny)]
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0


def test_the_card_says_what_the_manifest_says(tiny: Path) -> None:
    manifest = read_manifest(tiny)
    components = [{"component": "vision", "precision": "fp32", "cosine": 1.0}]
    answers = {"prompts": 8, "equal": 7, "tokens": 55, "same_choice": 54, "share": 0.98}
    measured = replace(
        manifest,
        name="a <b>|c",
        quality={"components": components, "answers": answers, "accepted_loss": {}, "more": 1},
    )
    card = model_card(measured, REPO)
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "cc0-1.0",
        "library_name": "tinyalign",
        "pipeline_tag": "image-text-to-text",
        "tags": ["onnx", "on-device", "memory"],
    }
    for line in (
        "# a &lt;b>\\|c",
        f"tinyalign-share pull {REPO} my-model --revision COMMIT",
        "| vision | fp32 | 1.0 |",
        "Of 8 greedy answers 7 are those of the torch model, and 54 of 55 tokens are its choice.",
        "**It was exported although it lost more than the export allows.**",
        "| all | CC0-1.0 | random numbers |",
        f"`{manifest.fingerprint}`",
        json.dumps({"more": 1}, indent=1),
    ):
        assert line in card
    several = (*manifest.licences, Licence("names", "My Own: 1.0", "me"))
    fields = yaml.safe_load(model_card(replace(manifest, licences=several), REPO).split("---\n")[1])
    assert (fields["license"], fields["license_name"]) == ("other", "several")
    own = replace(manifest, licences=several[-1:], compressor=None)
    fields = yaml.safe_load(model_card(own, REPO).split("---\n")[1])
    assert (fields["license"], fields["license_name"]) == ("other", "my-own-1.0")
    assert "It has no memory bank." in model_card(own, REPO)
