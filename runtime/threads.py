"""How many threads this process may keep busy."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def default_threads(cgroup: Path = CGROUP) -> int:
    """CPUs in the process's affinity, or fewer where a container's CPU quota is smaller."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        cpus = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return max(1, cpus if quota is None else min(cpus, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """CPUs a cgroup (v2, else v1) may use, None without a limit."""
    try:
        words = (cgroup / "cpu.max").read_text().split()
    except OSError:
        words = []
    try:
        if not words:
            folder = cgroup / "cpu"
            words = [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
        quota, period = int(words[0]), int(words[1])
    except (OSError, ValueError, IndexError):  # no cgroup, or "max"
        return None
    return quota / period if quota > 0 and period > 0 else None
