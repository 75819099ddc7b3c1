"""For which devices the runtime's dependencies have wheels, so that pip compiles nothing.

    python benchmarks/wheels.py

Asks pip for the newest wheel of every compiled package that the runtime needs, directly or not, on
each device and Python; nothing is installed. A Markdown table on stdout; docs/edge.md holds one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution

PYTHONS = ("3.11", "3.12", "3.13")
# glibc 2.28: Raspberry Pi OS and Debian from 10 on, Ubuntu from 20.04 on
GLIBC = [f"manylinux_2_{minor}" for minor in range(17, 29)] + ["manylinux2014"]
DEVICES = {
    "Linux ARM64": [f"{name}_aarch64" for name in GLIBC],
    "macOS 14 ARM64": ["macosx_14_0_arm64"],
    "Windows x86-64": ["win_amd64"],
    "Windows ARM64": ["win_arm64"],
}


def main() -> None:
    packages = sorted(compiled(runtime_packages()))
    print("| |", " | ".join(DEVICES), "|")
    print("|---" * (1 + len(DEVICES)) + "|")
    for package in packages:
        cells = [cell(package, platforms) for platforms in DEVICES.values()]
        print(f"| {package} |", " | ".join(cells), "|", flush=True)


def runtime_packages() -> set[str]:
    """What `pip install tinyalign` brings, without extras, by the packages installed here."""
    found: set[str] = set()
    waiting = ["tinyalign"]
    while waiting:
        for need in distribution(waiting.pop()).requires or []:
            name = re.split(r"[^A-Za-z0-9._-]", need)[0].lower().replace("_", "-")
            if "extra ==" not in need and name not in found and is_installed(name):
                found.add(name)
                waiting.append(name)
    return found


def is_installed(name: str) -> bool:
    """Requirements of other systems or Pythons are not."""
    try:
        return distribution(name) is not None
    except ModuleNotFoundError:
        return False


def compiled(packages: set[str]) -> Iterator[str]:
    """Those whose wheels fit one kind of machine only."""
    for name in packages:
        if "Root-Is-Purelib: false" in (distribution(name).read_text("WHEEL") or ""):
            yield name


def cell(package: str, platforms: list[str]) -> str:
    """The newest version with a wheel, and for which Pythons if not for all."""
    newest = {python: newest_wheel(package, platforms, python) for python in PYTHONS}
    if len(set(newest.values())) == 1:
        return newest[PYTHONS[0]]
    return ", ".join(f"{python}: {version}" for python, version in newest.items())


def newest_wheel(package: str, platforms: list[str], python: str) -> str:
    """Its version, and the glibc that it needs where that is Linux's; "none" if there is none."""
    command = [sys.executable, "-m", "pip", "install", package, "--only-binary=:all:"]
    command += ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report=-"]
    command += ["--python-version", python, "--implementation", "cp", "--target=unused"]
    command += [f"--platform={platform}" for platform in platforms]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr:
        return "**none**"
    if done.returncode != 0:
        raise SystemExit(done.stderr.strip())
    (found,) = json.loads(done.stdout)["install"]
    name = found["download_info"]["url"].rpartition("/")[2]
    version: str = found["metadata"]["version"]
    glibc = re.findall(r"manylinux_2_(\d+)", name)
    return f"{version} (glibc 2.{min(map(int, glibc))})" if glibc else version


if __name__ == "__main__":
    main()
