"""Fixtures for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads


@pytest.fixture(scope="session", autouse=True)
def verified_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checks of model directories are remembered here, not in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyalign.runtime.files.cache_dir", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny complete model directory; nobody may change it (copy it first)."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
