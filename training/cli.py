"""`tinyalign-train`: from packages of pictures to the weights that `tinyalign-export` reads."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyalign.runtime.cli import Parser, guarded

# torch and all that is imported when it is needed, so that --help is quick.

DESCRIPTION = """\
Train the default model: prepare the pictures (downloaded once, hash-checked), then
  stage 0  compressor and connectors, mostly without the language model (minutes)
  stage 1  connectors with retrieved memories, through the frozen language model
  stage 2  fine-tuning with LoRA on episodes that teach when to trust a memory
--base trains a memory for somebody else's vision-language model instead, of which nothing is
changed: compressor and RAG connector, the key recipe and a bank (stages 0 and 1).
--encoder and --lm train the same model around a vision encoder and a language model of yours.
--data adds pictures of your own, with questions and answers in LLaVA's JSON; a fixed 15 % of their
concepts is held out.
The run can be stopped at any time (Ctrl-C); the same command continues it. It ends with a weights
directory for `tinyalign-export --weights`."""


class Images(argparse.Action):
    """--images belongs to the --data before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not namespace.data or namespace.data[-1][1] is not None:
            parser.error("--images stands behind the --data that it is for")
        namespace.data[-1] = (namespace.data[-1][0], values)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = Parser(
        prog="tinyalign-train",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="run directory (default: runs/default; with --base, runs/ and the model's name)",
    )
    made.add_argument(
        "--base",
        metavar="MODEL",
        help="directory of a vision-language model (LLaVA, Idefics3, SmolVLM, nanoVLM), or its "
        "name on the Hugging Face hub: owner/name or owner/name@revision",
    )
    made.add_argument(
        "--encoder",
        metavar="MODEL",
        help="with --lm: your own vision encoder (CLIP, SigLIP, DINOv2, ViT, timm) in place of the "
        "default one; a directory or a name on the hub",
    )
    made.add_argument(
        "--lm",
        metavar="MODEL",
        help="with --encoder: your own language model (Llama, Qwen, Phi, Gemma, OPT); a directory, "
        "a GGUF file or a name on the hub",
    )
    made.add_argument(
        "--until",
        choices=("prepare", "0", "1", "2"),
        help="stop after this stage (default: the last one)",
    )
    made.add_argument("--seed", metavar="N", type=int, default=17, help="random seed (default: 17)")
    made.add_argument(
        "--scale",
        metavar="X",
        type=float,
        default=1.0,
        help="multiply the steps of every stage, for instance 0.1 for a quick look (default: 1); "
        "with --base, and below 1 with --encoder, the number of pictures as well",
    )
    made.add_argument(
        "--data",
        metavar="FILE.json",
        action="append",
        default=[],
        type=lambda name: (Path(name), None),
        help="train on the pictures and conversations of this file as well (LLaVA's JSON); "
        "may be given several times",
    )
    made.add_argument(
        "--images",
        metavar="DIR",
        action=Images,
        type=Path,
        help="where the pictures of the --data before it are (default: beside the file)",
    )
    made.add_argument(
        "--install", action="store_true", help="when done, make the result the default weights"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return guarded("tinyalign-train", lambda: run(arguments))
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    from tinyalign.runtime.errors import InputError

    if not arguments.scale > 0:
        raise InputError("--scale must be greater than 0")
    if arguments.base is not None:
        train_base(arguments)
        return
    if arguments.encoder is not None or arguments.lm is not None:
        train_own(arguments)
        return
    from tinyalign.training.llava import read_data
    from tinyalign.training.parts import DEFAULT_WEIGHTS, copy_weights
    from tinyalign.training.pipeline import train
    from tinyalign.training.recipe import Recipe, scaled

    recipe = scaled(dataclasses.replace(Recipe(), seed=arguments.seed), arguments.scale)
    data = [read_data(file, images) for file, images in arguments.data]
    directory, until = arguments.out or Path("runs/default"), arguments.until or "2"
    train(recipe, directory, until, data)
    if arguments.install and until == "2":
        copy_weights(directory / "weights", DEFAULT_WEIGHTS)


def train_own(arguments: argparse.Namespace) -> None:
    """Train a model around other people's encoder and language model."""
    from tinyalign.runtime.errors import InputError

    if arguments.encoder is None or arguments.lm is None:
        raise InputError("--encoder and --lm go together")
    if arguments.install:
        raise InputError("--install is for the default model: --encoder has weights of its own")
    from tinyalign.training.backbone import Places, load_backbone
    from tinyalign.training.llava import read_data
    from tinyalign.training.pipeline import train
    from tinyalign.training.recipe import recipe_for, scaled

    data = [read_data(file, images) for file, images in arguments.data]
    places = Places(*(located(name) for name in (arguments.encoder, arguments.lm)))
    backbone = load_backbone(places)
    width = int(backbone.lm.config.hidden_size)
    recipe = recipe_for(backbone.width, width, backbone.prompt, arguments.seed)
    recipe = scaled(recipe, arguments.scale)
    directory = arguments.out or Path("runs") / backbone.name
    train(recipe, directory, arguments.until or "2", data, backbone, arguments.scale)


def located(name: str) -> str:
    """A model's place that also holds elsewhere: an absolute path, or its name on a hub."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def train_base(arguments: argparse.Namespace) -> None:
    """Train a memory for another model."""
    from tinyalign.runtime.errors import InputError

    if arguments.encoder is not None or arguments.lm is not None:
        raise InputError("--base has its own encoder and language model")
    if arguments.install:
        raise InputError("--install is for the default model: --base has weights of its own")
    if arguments.until == "2":
        raise InputError("--base ends with stage 1: the language model stays as it is")
    from tinyalign.training import base
    from tinyalign.training.hub import model_name, model_place
    from tinyalign.training.llava import read_data
    from tinyalign.training.models.vlm import load_vlm

    data = [read_data(file, images) for file, images in arguments.data]
    name = model_name(arguments.base)
    directory = arguments.out or Path("runs") / name
    vlm = load_vlm(model_place(arguments.base), name)
    until = arguments.until or "1"
    base.train_base(vlm, directory, arguments.seed, arguments.scale, until, data)


if __name__ == "__main__":
    sys.exit(main())
