"""Any encoder with any language model: every pair once, from torch through export to answers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import tiny_encoders
import torch
from tiny_model import picture
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import nn

from tinyalign.export.components import export_component
from tinyalign.export.lm import EMBEDDINGS_NAME, export_lm, write_embeddings
from tinyalign.export.model_dir import context_of, write_manifest
from tinyalign.export.precisions import FLOATS
from tinyalign.runtime import TinyAlign
from tinyalign.runtime.manifest import PromptSpec
from tinyalign.training.answer import answer
from tinyalign.training.base import without_memory
from tinyalign.training.models.encoders import Encoder, load_encoder
from tinyalign.training.models.vlm import Vlm
from tinyalign.training.models.vlm_prompt import FLOORS
from tinyalign.training.modules import Projector

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from families import FAMILIES, tiny_model

ENCODERS = ("clip", "siglip", "dinov2", "dinov2_with_registers", "vit")
LMS = {family.name: family for family in FAMILIES if family.name == family.model.lower()}
LMS["gemma3_text"] = next(family for family in FAMILIES if family.name == "gemma3_text")
LIMIT = 8


def tokenizer() -> Tokenizer:
    """Printable letters as tokens, and an end."""
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tok.decoder = decoders.Fuse()
    tok.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return tok


PROMPT = PromptSpec(
    system="look: ",
    image=(tiny_encoders.PATCHES,),
    memory="",
    memory_end="",
    question="\n{question}\n",
    similarity=FLOORS,
    stop=("<end>",),
)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Encoder, Path]]:
    """Each encoder in torch, and a directory with its graph."""
    known, found = tiny_encoders.families(), {}
    for name in ENCODERS:
        folder = tmp_path_factory.mktemp(name)
        encoder = load_encoder(known[name].save(folder / "source"))
        example = (tiny_encoders.pixels(2),)
        export_component("vision", encoder.module, folder / "vision.onnx", example, "fp32")
        found[name] = encoder, folder
    return found


@pytest.fixture(scope="module")
def connectors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Projector, Path]]:
    """A connector to language models of each width, and a directory with its graph."""
    torch.manual_seed(5)
    found = {}
    for width in (64, 128):
        hidden = nn.Linear(tiny_encoders.WIDTH, width)
        module = Projector(nn.Sequential(hidden, nn.GELU(), nn.Linear(width, width)))
        module = module.eval().requires_grad_(False)
        folder = tmp_path_factory.mktemp(f"connector{width}")
        example = (torch.ones(2, 1 + tiny_encoders.PATCHES, tiny_encoders.WIDTH),)
        export_component("projector", module, folder / "connector.onnx", example, "fp32")
        found[width] = module, folder
    return found


@pytest.mark.parametrize("name", LMS)
def test_every_pair_answers_as_in_torch(
    name: str,
    encoders: dict[str, tuple[Encoder, Path]],
    connectors: dict[int, tuple[Projector, Path]],
    tmp_path: Path,
) -> None:
    lm = tiny_model(LMS[name])
    connector, place = connectors[lm.config.hidden_size]
    answers = set()
    for encoder, source in encoders.values():
        kind, slots = "llava", tiny_encoders.PATCHES
        vlm = Vlm("pair", kind, encoder, connector, slots, lm, tokenizer(), PROMPT, None)
        parts = without_memory(vlm)
        target = tmp_path / encoder.model_type
        target.mkdir()
        for path in (*source.glob("vision.onnx*"), *place.glob("connector.onnx*")):
            shutil.copy(path, target)
        if not (tmp_path / "lm").exists():  # the language model's graph is written once
            (tmp_path / "lm").mkdir()
            write_embeddings(lm, tmp_path / "lm" / EMBEDDINGS_NAME)
            export_lm(lm, tmp_path / "lm/lm.onnx", "fp32", context_of(parts))
        for path in tmp_path.glob("lm/*"):
            shutil.copy(path, target)
        tokenizer().save(str(target / "tokenizer.json"))
        write_manifest(parts, target, FLOATS, {})
        with TinyAlign.load(target, threads=1) as model:
            for seed in range(2):
                asked = (picture(seed, (60, 48)), "what?")
                told = model.ask(*asked, max_tokens=LIMIT)
                assert told.token_ids == answer(parts, [], *asked, LIMIT).ids
                answers.add(told.token_ids)
    assert len(answers) > len(encoders)  # the picture matters
