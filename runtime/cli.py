"""``tinyalign-infer``: ask a picture a question on the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# All else is imported when it is needed, so that --help is quick and Ctrl-C always quiet.

DESCRIPTION = """\
Answer a question about a picture. Everything runs on this machine's CPU; nothing is sent anywhere,
unless you name a bank on a server.

The model looks at the picture, looks up the most similar pictures in its memory bank, and answers
from both. The answer is printed word by word as it is made."""

EXAMPLES = """\
examples:
  tinyalign-infer cat.jpg "What is this?"
  tinyalign-infer - "What colour is it?" < photo.png
  tinyalign-infer part.jpg "Which part number is this?" --bank workshop.sqlite --bank default
  tinyalign-infer cat.jpg "What is this?" --json
  tinyalign-infer --jsonl questions.jsonl --output answers.jsonl

exit codes: 0 answered; 1 something failed; 2 the input cannot be used (one line on stderr says
why); 130 interrupted with Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        prog="tinyalign-infer",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "image", metavar="IMAGE", nargs="?", help="picture file, or - to read it from stdin"
    )
    p.add_argument("question", metavar="QUESTION", nargs="?", help="what you want to know about it")
    p.add_argument(
        "--model",
        metavar="DIR",
        help="model directory, as tinyalign-export writes it (default: $TINYALIGN_MODEL, "
        "else default-model in ~/.cache/tinyalign)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object when all is done")
    many = p.add_argument_group("many questions")
    many.add_argument(
        "--jsonl",
        metavar="FILE",
        help='answer every line {"image": path, "question": text} of a file, in place of IMAGE and '
        "QUESTION; each answer is a line of JSON",
    )
    many.add_argument(
        "--output",
        metavar="FILE",
        help="with --jsonl: write the answers here, and go on where an earlier run was stopped "
        "(default: standard output)",
    )
    memory = p.add_argument_group("memory bank")
    memory.add_argument(
        "--bank",
        metavar="FILE",
        action="append",
        help="bank to look up memories in, in place of the model's own: a file, or an address "
        "such as qdrant://host:6333/parts; may be given more than once, and 'default' means the "
        "model's own",
    )
    memory.add_argument("--no-memory", action="store_true", help="answer from the picture alone")
    memory.add_argument(
        "--top-k", metavar="N", type=int, help="use at most N memories (default: the model's, 3)"
    )
    memory.add_argument(
        "--memory-mode",
        choices=("latent", "text", "both"),
        help="what the language model reads of a memory: a few tokens made from its latents, all "
        "tokens of its text, or both (default: the model's own choice)",
    )
    memory.add_argument(
        "--where",
        metavar="KEY=VALUE",
        action="append",
        help="use only memories with this metadata; may be given more than once",
    )
    answer = p.add_argument_group("answer")
    answer.add_argument(
        "--max-tokens", metavar="N", type=int, default=128, help="longest answer (default: 128)"
    )
    answer.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0 gives the same, likeliest answer each time; higher varies more (default: 0)",
    )
    answer.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="with a temperature: choose among the likeliest words that make up this share",
    )
    answer.add_argument(
        "--seed", metavar="N", type=int, help="with a temperature: repeatable choice"
    )
    answer.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads (default: all this process may use)"
    )
    answer.add_argument(
        "--provider",
        metavar="NAME",
        default="cpu",
        help="execution provider of onnxruntime: cpu, cuda, coreml, directml, openvino, qnn, "
        "xnnpack or another that is installed; says on stderr what ran on the CPU all the same "
        "(default: cpu)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    # Else threads of numpy's BLAS, which has next to nothing to do here, wait awake for work and
    # keep a core from the sessions that are being opened (0.05 s of two cores).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        return run(parser().parse_args(argv))
    except KeyboardInterrupt:
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Answer, or say in one line why not."""
    return guarded("tinyalign-infer", lambda: answer(arguments))


def guarded(program: str, work: Callable[[], int | None]) -> int:
    """Do a command's work; what it raises becomes one line on stderr and the exit code."""
    from tinyalign.runtime.errors import InputError, TinyAlignError

    if sys.stdout is None:
        return complain(program, "standard output is closed")
    try:
        code = work()
        sys.stdout.flush()
    except InputError as error:
        return complain(program, error, 2)
    except BrokenPipeError:  # the reader has left, e.g. `| head -c 10`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TinyAlignError, OSError, MemoryError) as error:
        return complain(program, error, 1)
    except ModuleNotFoundError as error:  # export and training need what the runtime does not
        reason = f"{error.name} is not installed: pip install 'tinyalign[train]' has all"
        return complain(program, reason, 1)
    return code or 0


def answer(arguments: argparse.Namespace) -> int | None:
    """Load the model, ask, print."""
    check(arguments)
    where = pairs(arguments.where, "--where")
    asked = None
    if arguments.jsonl:
        from tinyalign.runtime import batch

        asked = batch.read_questions(Path(arguments.jsonl))
    picture = standard_input() if arguments.image == "-" else arguments.image

    from tinyalign.runtime.loading import start_loading

    provider = arguments.provider
    # it goes on while the rest is imported
    loading = start_loading(arguments.model, arguments.threads, provider=provider)

    from tinyalign.runtime.model import TinyAlign

    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # decoders warn about what an error line says better
    banks = [] if arguments.no_memory else arguments.bank
    options = {
        "memory": not arguments.no_memory,
        "memory_mode": arguments.memory_mode,
        "top_k": arguments.top_k,
        "where": where or None,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    with TinyAlign.load(loading, banks=banks) as model:
        if provider != "cpu":
            from tinyalign.runtime.providers import placement_lines

            for line in placement_lines(model.parts.sessions, provider):
                print(f"tinyalign-infer: {line}", file=sys.stderr)
        if asked is not None:
            output = Path(arguments.output) if arguments.output else None
            failed = batch.answer_file(
                model, asked, output, options, lambda result: summary(result, model.load_ms)
            )
            if failed:
                return complain("tinyalign-infer", f"{failed} of {len(asked)} not answered", 2)
            return None
        stream = model.stream(picture, arguments.question, **options)
        if arguments.json:
            sys.stdout.write(json.dumps(summary(stream.answer, model.load_ms)) + "\n")
            return None
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show every letter
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    return None


def summary(result: Any, load_ms: float) -> dict[str, Any]:
    """The object of ``--json``; times in milliseconds, ``tokens`` a count."""
    times = {name: round(value, 3) for name, value in vars(result.timings).items()}
    return {
        "answer": result.text,
        "memories": [
            {"id": hit.id, "score": round(hit.score, 4), "text": hit.text, "bank": hit.bank}
            for hit in result.memories
        ],
        "timings": {"load": round(load_ms, 3), **times, "tokens": result.tokens},
        "finish_reason": result.finish_reason,
    }


def check(arguments: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    from tinyalign.runtime.errors import InputError

    if arguments.jsonl:
        if arguments.image is not None:
            raise InputError("--jsonl takes the place of IMAGE and QUESTION: give one or the other")
    elif arguments.question is None:
        missing = "QUESTION" if arguments.image is not None else "IMAGE, QUESTION"
        raise InputError(f"required: {missing} (see tinyalign-infer --help)")
    elif not arguments.question.strip():
        raise InputError("the question is empty")
    if arguments.output and not arguments.jsonl:
        raise InputError("--output goes with --jsonl")
    for name in ("top_k", "max_tokens", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    if not 0 <= arguments.temperature < float("inf"):
        raise InputError(f"--temperature must be 0 or more, not {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise InputError(f"--top-p must be above 0 and at most 1, not {arguments.top_p}")


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    """KEY=VALUE arguments as a dict; InputError if one is something else."""
    from tinyalign.runtime.errors import InputError

    values = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InputError(f"{option} takes KEY=VALUE, not {text!r}")
        values[key] = value
    return values


def standard_input() -> bytes:
    """The picture on standard input."""
    from tinyalign.runtime.errors import InputError
    from tinyalign.runtime.images import read_picture

    if sys.stdin is None:
        raise InputError("cannot read the picture from standard input: it is closed")
    return read_picture(sys.stdin.buffer, "standard input")


def complain(program: str, error: object, code: int = 1) -> int:
    """One line on stderr, whatever a file name or a message holds; returns ``code``."""
    text = " ".join(str(error).split()) or type(error).__name__
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    print(f"{program}: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
