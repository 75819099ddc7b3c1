"""The loss curve of a training run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_losses(log: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a stage: bits per token of every step, and their running mean, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(entry["stage"] for entry in log))
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), squeeze=False)
    for name, panel in zip(names, panels[0], strict=True):
        bits = np.array([entry["bits"] for entry in log if entry["stage"] == name])
        window = max(1, len(bits) // 20)
        smooth = np.convolve(bits, np.ones(window) / window, "valid")
        panel.plot(range(1, len(bits) + 1), bits, color="#c8d4e8", linewidth=0.8)
        panel.plot(range(window, len(bits) + 1), smooth, color="#1f4e9c", linewidth=1.6)
        panel.set(
            title=name, xlabel="step", ylabel="bits per token" if panel is panels[0][0] else ""
        )
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
