"""``tinyalign-share``: push a model directory to a Hugging Face repository, or pull one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyalign.runtime.cli import Parser, guarded

DESCRIPTION = """\
Share a model directory through a repository of the Hugging Face hub, or of the server that
HF_ENDPOINT names. Push checks every file, uploads them in one commit with a generated model card,
and prints the commit. Pull takes that commit, checks every byte against the manifest, and only then
puts the directory in its place.

Needs huggingface_hub (pip install 'tinyalign[share]'); `hf auth login` stores who you are."""

EXAMPLES = """\
examples:
  tinyalign-share push my-model ada/pumps --private
  tinyalign-share pull ada/pumps my-model --revision 0123456789abcdef0123456789abcdef01234567

exit codes: 0 done; 1 the network or the hub failed; 2 an argument or an input cannot be used (one
line on stderr says why); 130 interrupted with Ctrl-C. Only 0 changes what is at DIR."""


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        prog="tinyalign-share",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = p.add_subparsers(dest="verb", metavar="VERB", required=True)
    push = verbs.add_parser("push", help="upload a model directory and print its commit")
    push.add_argument("directory", metavar="DIR", type=Path, help="the model directory")
    push.add_argument("repo", metavar="REPO", help="owner/name; made if it is not there")
    push.add_argument(
        "--private", action="store_true", help="make a repository that not everybody can see"
    )
    pull = verbs.add_parser("pull", help="download a model directory of a commit")
    pull.add_argument("repo", metavar="REPO", help="owner/name")
    pull.add_argument(
        "directory", metavar="DIR", type=Path, help="where to; an older model there is replaced"
    )
    pull.add_argument(
        "--revision",
        metavar="SHA",
        default="main",
        help="the commit, 40 hex digits; without it, the error says which one is the newest",
    )
    pull.add_argument(
        "--force",
        action="store_true",
        help="replace DIR even if it holds something else than a model; all in it is deleted",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        arguments = parser().parse_args(argv)
        return guarded("tinyalign-share", lambda: print(share(arguments)))
    except KeyboardInterrupt:
        return 130


def share(arguments: argparse.Namespace) -> str:
    """Push or pull; what to print at the end."""
    from tinyalign.export.share import pull, push

    directory, repo = arguments.directory, arguments.repo
    if arguments.verb == "push":
        return push(directory, repo, arguments.private)
    manifest = pull(repo, directory, arguments.revision, arguments.force)
    return f"{directory}: {sum(entry.bytes for entry in manifest.files) / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
