"""Models by their name on a hub: a local stand-in of its file layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_stand_in import Hub
from test_share import contents, hub  # noqa: F401
from test_vlm import write_llava

from tinyalign.export.cli import main
from tinyalign.runtime.errors import InputError, TinyAlignError
from tinyalign.training.hub import model_place
from tinyalign.training.models.vlm import load_vlm

NAME = "ada/llava"


@pytest.fixture
def commits(hub: Hub, tmp_path: Path) -> list[str]:  # noqa: F811
    """Two commits of a model's repository: without its tokenizer, and whole, with code in it."""
    write_llava(tmp_path / "llava")
    files = contents(tmp_path / "llava") | {"code.py": b"raise SystemExit", "a.bin": b"pickle"}
    repository = hub.new(NAME)
    broken = {name: data for name, data in files.items() if name != "tokenizer.json"}
    return [repository.commit(broken), repository.commit(files)]


def test_a_model_is_downloaded_once_and_without_code(hub: Hub, commits: list[str]) -> None:  # noqa: F811
    place = model_place(NAME)
    assert load_vlm(place).model_type == "llava"
    assert {"config.json", "tokenizer.json"} <= set(contents(place))
    assert not {"code.py", "a.bin"} & set(contents(place))
    asked = len([path for path in hub.requests if "model.safetensors" in path])
    assert model_place(NAME) == place
    assert asked == len([path for path in hub.requests if "model.safetensors" in path])
    assert model_place(f"{NAME}@{commits[1]}") == place


def test_a_revision_can_be_named(commits: list[str], tmp_path: Path) -> None:
    arguments = ["--from", f"{NAME}@{commits[0]}", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    arguments[1] = f"{NAME}@{commits[1]}"
    fp32 = [f"--{part}-precision=fp32" for part in ("lm", "vision", "connector")]
    assert main([*arguments, *fp32]) == 0


@pytest.mark.usefixtures("commits")
def test_what_is_not_there_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="ada/other is not there"):
        model_place("ada/other")
    with pytest.raises(InputError, match="no such revision"):
        model_place(f"{NAME}@{'0' * 40}")
    hub.new("ada/pickled").commit({"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(InputError, match="ada/pickled holds no safetensors"):
        model_place("ada/pickled")


def test_a_place_on_the_disk_comes_first(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "models").mkdir()
    for name in (str(tmp_path), str(tmp_path / "models/none"), "one-word", "a/b/c"):
        assert model_place(name) == Path(name)
    assert not hub.requests


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TinyAlignError, match="ada/llava: "):
        model_place(NAME)
