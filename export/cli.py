"""``tinyalign-export``: trained torch weights -> a model directory for the runtime."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyalign.runtime.cli import Parser, guarded

if TYPE_CHECKING:
    from tinyalign.export.report import Report

# torch and all that is imported when it is needed, so that --help is quick and Ctrl-C always quiet.

DESCRIPTION = """\
Write the model directory that tinyalign-infer reads: one ONNX graph for each component, the
tokenizer, the default memory bank, and a manifest with the SHA-256 of every file.

The vision encoder's and the language model's own weights are fetched (and checked) the first time;
what was trained is taken from the weights directory. The directory is written whole or not at all.
At the end a table says, for each component, its size, how far its output is from torch's (max and
mean), and the milliseconds of both; then how many answers are the same as torch's."""

EXAMPLES = """\
examples:
  tinyalign-export
  tinyalign-export --out my-model --lm-precision fp32
  tinyalign-export --weights runs/default/weights --out trial --json

exit codes: 0 written; 1 something failed; 2 an argument or an input cannot be used (one line on
stderr says why); 130 interrupted with Ctrl-C. Only 0 changes what is at --out."""

COMPONENTS = {
    "lm": ("int8", "int4 halves the size once more but answers noticeably worse"),
    "vision": ("fp32", "int8 is smaller and a little faster, but see docs/export.md"),
    "connector": ("int8", ""),
    "compressor": ("fp32", ""),
    "rag-connector": ("int8", ""),
}


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        prog="tinyalign-export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="the model directory to write; an older one there is replaced (default: "
        "$TINYALIGN_MODEL, else default-model in ~/.cache/tinyalign)",
    )
    p.add_argument(
        "--weights",
        metavar="DIR",
        type=Path,
        help="trained weights, as tinyalign-train writes them (default: those that came with "
        "tinyalign)",
    )
    p.add_argument(
        "--force",
        action="store_true",
        help="replace DIR even if it holds something else than a model; all in it is deleted",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object in place of a table")
    group = p.add_argument_group("precision of the weights")
    for name, (default, note) in COMPONENTS.items():
        choices = ["fp32", "int8"] if name == "vision" else ["fp32", "int8", "int4"]
        group.add_argument(
            f"--{name}-precision",
            choices=choices,
            default=default,
            help=f"default: {default}{'; ' + note if note else ''}",
        )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        return run(parser().parse_args(argv))
    except KeyboardInterrupt:
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Export, or say in one line why not."""
    return guarded("tinyalign-export", lambda: print(export(arguments)))


def export(arguments: argparse.Namespace) -> str:
    """Write the model directory; what to print at the end."""
    from tinyalign.export.target import check_target
    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.paths import default_model_dir

    target = arguments.out or default_model_dir()
    check_target(target, arguments.force)
    if arguments.weights is not None and not arguments.weights.is_dir():
        raise InputError(f"no weights directory at {arguments.weights}")
    with Progress() as progress:
        measured, size = write(arguments, target, progress)
    if arguments.json:
        return json.dumps({"directory": str(target), "bytes": size, **measured.to_dict()}, indent=1)
    return f"{measured.to_table()}\n{target}: {size / 1e6:.0f} MB"


def write(arguments: argparse.Namespace, target: Path, progress: Progress) -> tuple[Report, int]:
    """Write and measure; the report and the model's size in bytes."""
    progress("loading torch and the weights")

    import torch

    from tinyalign.export import model_dir, report
    from tinyalign.export.target import replacing
    from tinyalign.runtime.threads import default_threads
    from tinyalign.training.parts import DEFAULT_WEIGHTS, load_parts

    torch.set_num_threads(default_threads())
    weights = arguments.weights or DEFAULT_WEIGHTS
    parts = load_parts(weights)
    names = [name.replace("-", "_") for name in COMPONENTS]
    precisions = model_dir.Precisions(**{n: getattr(arguments, f"{n}_precision") for n in names})
    with replacing(target) as draft:
        model_dir.write_bank(parts, weights / model_dir.BANK_NAME, draft / model_dir.BANK_NAME)
        pictures = report.check_pictures(draft / model_dir.BANK_NAME)
        model_dir.write_components(parts, draft, precisions, pictures, progress)
        progress("manifest")
        model_dir.write_manifest(parts, draft, precisions, {})
        measured = report.measure(parts, draft, precisions, pictures, progress)
        manifest = model_dir.write_manifest(parts, draft, precisions, measured.to_dict())
        progress("syncing to the disk")
    return measured, sum(entry.bytes for entry in manifest.files)


class Progress:
    """Says on stderr what is being done, and how long the last thing took."""

    def __init__(self) -> None:
        self._started: float | None = None

    def __call__(self, what: str) -> None:
        """Something new begins."""
        self._end(done=True)
        self._started = time.perf_counter()
        print(f"{what} ...", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._end(done=kind is None)

    def _end(self, done: bool) -> None:
        if self._started is not None:
            took = f" {time.perf_counter() - self._started:.1f} s" if done else ""
            print(took, file=sys.stderr, flush=True)
            self._started = None


if __name__ == "__main__":
    sys.exit(main())
