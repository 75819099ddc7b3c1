"""``tinyalign-export``: trained torch weights -> a model directory for the runtime."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from tinyalign.export.precisions import CHOICES, Precisions
from tinyalign.runtime.cli import Parser, guarded

if TYPE_CHECKING:
    from tinyalign.export.report import Report
    from tinyalign.export.trials import Trials
    from tinyalign.training.parts import Parts

# torch and all that is imported when it is needed, so that --help is quick and Ctrl-C always quiet.

DESCRIPTION = """\
Write the model directory that tinyalign-infer reads: one ONNX graph for each component, the
tokenizer, the default memory bank, and a manifest with the SHA-256 of every file.

The vision encoder's and the language model's own weights are fetched (and checked) the first time;
what was trained is taken from the weights directory. The directory is written whole or not at all.
At the end a table says, for each component, its size, how far its output is from torch's (cosine,
greatest and mean difference), and the milliseconds of both; then how many answers are the same as
torch's. A model whose answers have too few tokens in common with torch's is not written, unless
--accept-quality-loss says so; its manifest then says that, too."""

EXAMPLES = """\
examples:
  tinyalign-export
  tinyalign-export --out my-model --lm-precision fp32
  tinyalign-export --weights runs/default/weights --out trial --json
  tinyalign-export --out trial --report quality --report-set mine.jsonl
  tinyalign-export --out small --lm-precision int4 --accept-quality-loss
  tinyalign-export --out smolvlm --from SmolVLM-256M-Instruct --weights runs/smolvlm/weights

exit codes: 0 written; 1 something failed; 2 an argument or an input cannot be used, the disk is too
small or too much quality was lost (one line on stderr says why); 130 interrupted with Ctrl-C. Only
0 changes what is at --out."""

NOTES = {
    "lm": "int4 is calibrated for minutes, answers noticeably worse and needs "
    "--accept-quality-loss",
    "vision": "int8 is of activations too, calibrated on the bank's pictures; see docs/export.md",
}
REPORT_DIR = "quality-report"


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
        "--from",
        dest="source",
        metavar="DIR",
        help="a vision-language model in a Hugging Face directory, or its name on the hub, "
        "owner/name or owner/name@revision (LLaVA, Idefics3, SmolVLM, "
        "nanoVLM) in place of the default one; with --weights it gets the memory that "
        "tinyalign-train --base has trained for it (docs/other-models.md)",
    )
    p.add_argument(
        "--force",
        action="store_true",
        help="replace DIR even if it holds something else than a model; all in it is deleted",
    )
    p.add_argument(
        "--minimal",
        action="store_true",
        help="write the graphs in ORT format in place of ONNX, with the list of operators for an "
        "onnxruntime built for them alone (docs/edge.md)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object in place of a table")
    group = p.add_argument_group(
        "precision of the weights", "fp16 is for the disk: in memory such weights are float32"
    )
    for field in fields(Precisions):
        note = NOTES.get(field.name)
        group.add_argument(
            f"--{field.name.replace('_', '-')}-precision",
            choices=CHOICES[field.name],
            default=field.default,
            help=f"default: {field.default}{'; ' + note if note else ''}",
        )
    group = p.add_argument_group("quality")
    group.add_argument(
        "--accept-quality-loss",
        action="store_true",
        help="write the model even if too few of its answers' tokens are the same as torch's",
    )
    group.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        nargs="?",
        const=Path(REPORT_DIR),
        help="also compare every precision of every component, one at a time (the language model's "
        "int4 only when it is the one exported), recommend one for each, and write table and plot "
        f"into DIR (default: {REPORT_DIR}); takes some minutes",
    )
    group.add_argument(
        "--report-set",
        metavar="FILE",
        type=Path,
        help='with --report: lines {"image": path, "question": text, "answer": text} to measure '
        "accuracy on; paths are looked for beside the file",
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


@dataclass(frozen=True)
class Written:
    """What an export wrote and measured."""

    measured: Report
    size: int  # bytes of the model directory
    trials: Trials | None
    files: Sequence[Path]  # of the report


def export(arguments: argparse.Namespace) -> str:
    """Write the model directory; what to print at the end."""
    from tinyalign.export.target import check_target  # no torch yet
    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.paths import default_model_dir

    target = arguments.out or default_model_dir()
    check_target(target, arguments.force)
    if arguments.weights is not None and not arguments.weights.is_dir():
        raise InputError(f"no weights directory at {arguments.weights}")
    if arguments.report is not None and arguments.report.exists() and not arguments.report.is_dir():
        raise InputError(f"{arguments.report} is a file, not a directory for the report")
    if arguments.report_set is not None and arguments.report is None:
        raise InputError("--report-set needs --report")
    with Progress() as progress:
        written = write(arguments, target, progress)
    from tinyalign.export.quality import loss

    measured, trials = written.measured, written.trials
    if arguments.json:
        found = {"directory": str(target), "bytes": written.size, **measured.to_dict()}
        return json.dumps(found | ({"report": trials.to_dict()} if trials else {}), indent=1)
    lines = [measured.to_table()]
    if measured.answers.below_floor:
        lines.append(f"accepted: {loss(measured.answers)}")
    if trials is not None:
        lines += ["", trials.to_table(), *map(str, written.files), ""]
    return "\n".join([*lines, f"{target}: {written.size / 1e6:.0f} MB"])


def load(arguments: argparse.Namespace, progress: Progress) -> tuple[Parts, Path]:
    """The model in torch, and where its bank lies (it need not be there).

    Raises InputError for what cannot be read.
    """
    from tinyalign.export.model_dir import BANK_NAME
    from tinyalign.runtime.errors import InputError
    from tinyalign.training.parts import DEFAULT_WEIGHTS, load_parts

    if arguments.source is None:
        weights = arguments.weights or DEFAULT_WEIGHTS
        parts = load_parts(weights)
        if not parts.remembers:
            raise InputError(f"{weights} holds no key recipe (key.npz): nothing can be retrieved")
        return parts, weights / BANK_NAME
    from tinyalign.training.base import load_base, without_memory
    from tinyalign.training.hub import model_name, model_place
    from tinyalign.training.models.vlm import load_vlm

    place = model_place(arguments.source)
    vlm = load_vlm(place, model_name(arguments.source))
    if vlm.chat is None:
        progress(f"without its chat template, for {vlm.no_chat}")
    if arguments.weights is None:
        return without_memory(vlm), place / BANK_NAME
    return load_base(vlm, arguments.weights), arguments.weights / BANK_NAME


def write(arguments: argparse.Namespace, target: Path, progress: Progress) -> Written:
    """Write and measure."""
    progress("loading torch and the weights")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads wait asleep

    import torch

    from tinyalign.bank import Bank
    from tinyalign.export import minimal, model_dir, quality, report, size, trials
    from tinyalign.export.target import replacing
    from tinyalign.export.task import read_tasks
    from tinyalign.runtime.threads import default_threads

    tasks = read_tasks(arguments.report_set) if arguments.report_set else []
    torch.set_num_threads(default_threads())
    parts, bank = load(arguments, progress)
    precisions = Precisions(**{n: getattr(arguments, f"{n}_precision") for n in CHOICES})
    needed = size.model_bytes(parts, precisions, bank)
    if arguments.minimal:  # one graph at a time is there in both formats
        needed += size.component_bytes(parts, "lm", precisions.lm)
    size.check_disk(target, needed)
    if arguments.report:
        size.check_disk(arguments.report, trials.report_bytes(parts, bank))
    tried, files = None, []
    with replacing(target) as draft:
        model_dir.write_bank(parts, bank, draft / model_dir.BANK_NAME)
        checks = quality.check_questions(bank)
        calibrating = quality.calibration_pictures(bank)
        model_dir.write_components(parts, draft, precisions, calibrating, progress)
        progress("manifest")
        model_dir.write_manifest(parts, draft, precisions, {})
        with ExitStack() as stack:
            banks = []
            if parts.remembers:
                opened = Bank.open(draft / model_dir.BANK_NAME, read_only=True)
                banks.append(stack.enter_context(opened))
            side = quality.TorchSide(parts, banks)
            measured = report.measure(side, draft, precisions, checks, progress)
            if arguments.report:
                tried = trials.try_all(
                    side, draft, precisions, checks, calibrating, tasks, arguments.report, progress
                )
                files = trials.write_report(tried, arguments.report)
        quality.check_floor(measured.answers, arguments.accept_quality_loss)
        if arguments.minimal:
            minimal.write_minimal(draft, progress)
        found = measured.to_dict()
        if measured.answers.below_floor:
            found["accepted_loss"] = {"floor": quality.FLOOR, **measured.answers.to_dict()}
        manifest = model_dir.write_manifest(parts, draft, precisions, found)
        progress("syncing to the disk")
    return Written(measured, sum(entry.bytes for entry in manifest.files), tried, files)


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
