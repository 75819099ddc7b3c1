"""Where models and caches lie when nobody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The directory of caches: $TINYALIGN_CACHE, else ~/.cache/tinyalign."""
    return Path(os.environ.get("TINYALIGN_CACHE") or Path.home() / ".cache" / "tinyalign")


def default_model_dir() -> Path:
    """The model directory used when none is named: $TINYALIGN_MODEL, else one in the cache."""
    return Path(os.environ.get("TINYALIGN_MODEL") or cache_dir() / "default-model")
