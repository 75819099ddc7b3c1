"""The options of ``tinyalign-bank``; quick to import, so that --help is quick."""

from __future__ import annotations

import argparse
from typing import Any

from tinyalign.runtime.cli import Parser

DESCRIPTION = """\
Teach the model, and look after what it was taught.

A memory bank is one file of memories: each a picture and a text. When tinyalign-infer is asked
about a picture it looks up the most similar memories and answers from them too. A memory that was
added is used by the very next question; nothing is trained."""

EXAMPLES = """\
examples:
  tinyalign-bank add pump.jpg --text "This is the feed pump. It is part KX-204." --bank mine.sqlite
  tinyalign-infer pump-from-the-side.jpg "What is its part number?" --bank mine.sqlite
  tinyalign-bank list --bank mine.sqlite
  tinyalign-bank search photo.jpg --bank mine.sqlite

`tinyalign-bank VERB --help` explains each verb.

exit codes: 0 done; 1 something failed (pictures that could not be read, a bank that is not sound);
2 the input cannot be used (one line on stderr says why); 130 interrupted with Ctrl-C."""

ADD = """\
Add pictures with their texts. INPUT is

  a picture        with --text
  items.jsonl      a line each: {"image": "cup.jpg", "text": "Ann's cup", "metadata": {"room": "1"}}
  items.csv        with columns image and text; other columns become metadata
  items.json       captions or conversations as LLaVA has them
  a folder         all its pictures, with one --text or with --text-from-name
  -                lines as in items.jsonl from standard input

Pictures are looked for beside the list that names them (for -, in the current directory). What the
bank holds already is skipped: to go on after an interruption, run the same command again."""

SHOW = """\
Show one memory in full. Its small picture is drawn where the output is a terminal, unless NO_COLOR
is set."""

CALIBRATE = """\
Set a bank's score floor: memories whose score is below it have nothing to say and are not used.

Without an option the floor is measured on the bank's own memories: the score that the nearest other
memory reaches for nine tenths of them. A new bank starts with the model's floor, which was measured
in the same way on the pictures it was trained on."""


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        prog="tinyalign-bank",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = p.add_subparsers(dest="verb", metavar="VERB", required=True)

    add = _verb(verbs, "add", "teach: add pictures with their texts", ADD)
    add.add_argument("input", metavar="INPUT", help="picture, .jsonl, .csv, .json, folder or -")
    add.add_argument("--text", help="what the model shall know about the picture")
    add.add_argument(
        "--text-from-name", action="store_true", help="the file's name is the text: red_cup.jpg"
    )
    _set(add, "metadata of all that is added, for --where; may be given more than once")
    _bank(add, create=True)
    _model(add)
    add.add_argument(
        "--ray",
        action="store_true",
        help="look at the pictures in several processes with Ray (pip install 'tinyalign[ray]'), "
        "on this machine or on the cluster at $RAY_ADDRESS",
    )
    add.add_argument(
        "--workers", metavar="N", type=int, help="with --ray: how many (default: one a CPU)"
    )
    _json(add)

    show = _verb(verbs, "list", "show all memories, one a line")
    _banks(show)
    _where(show)
    _json(show)

    show = _verb(verbs, "show", "show one memory in full", SHOW)
    _id(show)
    show.add_argument("--thumbnail", metavar="FILE", help="write its small picture (WebP) to FILE")
    _banks(show, several=False)
    _json(show)

    search = _verb(
        verbs,
        "search",
        "show which memories a picture brings up, and why",
        "Show the memories nearest to a picture, best first. The score is the sum of what picture\n"
        "and text add to it; the word behind it says what the model is told of how near it is, or\n"
        "that it is too far to be used.",
    )
    search.add_argument("image", metavar="IMAGE", help="picture file, or - to read it from stdin")
    search.add_argument("--text", metavar="QUESTION", help="the question that is asked with it")
    search.add_argument("--top-k", metavar="N", type=int, default=5, help="how many (default: 5)")
    _banks(search)
    _where(search)
    _model(search)
    _json(search)

    remove = _verb(verbs, "remove", "forget memories, by id or by metadata")
    remove.add_argument("id", metavar="ID", type=int, nargs="*", help="as `list` shows it")
    _bank(remove)
    _where(remove)

    update = _verb(
        verbs,
        "update",
        "correct a memory's text, picture or metadata",
        "Correct a memory. With another text or picture it gets a new id, which is printed.",
    )
    _id(update)
    update.add_argument("--text", help="another text")
    update.add_argument("--image", metavar="PICTURE", help="another picture")
    update.add_argument("--source", help="another note of where it is from")
    _set(update, "set one entry of the metadata; may be given more than once")
    update.add_argument("--unset", metavar="KEY", action="append", help="remove one entry")
    _bank(update)
    _model(update)

    stats = _verb(verbs, "stats", "count and measure a bank")
    _banks(stats, several=False)
    _json(stats)

    merge = _verb(verbs, "merge", "add all memories of other banks to a bank")
    merge.add_argument(
        "into", metavar="INTO", help="the bank that grows; created if it is not there"
    )
    merge.add_argument("sources", metavar="FROM", nargs="+", help="banks of the same model")

    export = _verb(
        verbs,
        "export",
        "write a bank as JSONL and thumbnails",
        "Write a bank to a new folder: memories.jsonl, a memory a line, and thumbnails.",
    )
    export.add_argument("directory", metavar="DIR", help="the folder to write; must not exist")
    _banks(export, several=False)

    load = _verb(verbs, "import", "add what `export` wrote")
    load.add_argument("directory", metavar="DIR", help="a folder that `export` wrote")
    _bank(load, create=True)

    compact = _verb(verbs, "compact", "give the space of removed memories back")
    compact.add_argument(
        "--seal", action="store_true", help="and make it one dense file, ready to be shipped"
    )
    _bank(compact)

    calibrate = _verb(verbs, "calibrate", "set how near a memory must be to be used", CALIBRATE)
    floor = calibrate.add_mutually_exclusive_group()
    floor.add_argument("--floor", metavar="X", type=float, help="set it by hand, -1 to 1")
    floor.add_argument("--reset", action="store_true", help="go back to the model's own floor")
    _bank(calibrate)

    _banks(_verb(verbs, "verify", "read a whole bank and say what is wrong with it"), several=False)
    _bank(_verb(verbs, "reindex", "build the search index of a large bank anew"))
    return p


def _verb(verbs: Any, name: str, summary: str, description: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=description or summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _bank(p: argparse.ArgumentParser, create: bool = False) -> None:
    """The one bank that is written to."""
    more = "; created if it is not there" if create else ""
    p.add_argument(
        "--bank", metavar="FILE", required=True, help=f"the bank, a file or qdrant://...{more}"
    )


def _banks(p: argparse.ArgumentParser, several: bool = True) -> None:
    """A bank that is only read, or several."""
    more = "; may be given more than once" if several else ""
    p.add_argument(
        "--bank",
        metavar="FILE",
        action="append" if several else "store",
        help=f"the bank, a file or qdrant://... (default: 'default', the model's own){more}",
    )


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        metavar="DIR",
        help="model directory (default: $TINYALIGN_MODEL, else default-model in "
        "~/.cache/tinyalign)",
    )
    p.add_argument(
        "--threads", metavar="N", type=int, help="CPU threads (default: all this process may use)"
    )


def _where(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--where",
        metavar="KEY=VALUE",
        action="append",
        help="only memories with this metadata; may be given more than once",
    )


def _set(p: argparse.ArgumentParser, help: str) -> None:
    p.add_argument("--set", metavar="KEY=VALUE", action="append", help=help)


def _id(p: argparse.ArgumentParser) -> None:
    p.add_argument("id", metavar="ID", type=int, help="as `list` shows it")


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one JSON object")
