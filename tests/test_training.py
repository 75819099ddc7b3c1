"""The training path on a tiny random model: what it sees, what it may retrieve, what it changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny_model
import torch
from torch import Tensor

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.prompt import build_prompt, embed, encode_text
from tinyalign.training import stages
from tinyalign.training.batch import (
    Episode,
    RetrievedMemory,
    Turn,
    answer_loss,
    embed_batch,
    make_batch,
)
from tinyalign.training.episodes import UNKNOWN, draw_episode, rows_by_source
from tinyalign.training.facts import draw_fact
from tinyalign.training.features import Record
from tinyalign.training.modules import (
    Compressor,
    Connector,
    ConnectorShape,
    MemoryShape,
    RagConnector,
    SoftVocabulary,
)
from tinyalign.training.parts import Parts, load_parts, save_parts
from tinyalign.training.recipe import PROMPT, Recipe, Stage
from tinyalign.training.vocabulary import name_ids
from tinyalign.training.world import World, make_world

DV, D, CLASSES = 24, tiny_model.D, 5
CONNECTOR = ConnectorShape(vision_width=DV, width=D, hidden=16, cell_width=4)
MEMORY = MemoryShape(width=D, vision_width=DV, latent_width=48, text_latents=8, tokens_per_latent=6)
RECIPE = Recipe(
    connector=CONNECTOR,
    memory=MEMORY,
    image_key_width=8,
    text_key_width=4,
    turns=2,
    slots=Stage(6, 4, {"connector": 1e-2, "memory_picture": 1e-2}),
    align=Stage(6, 2, {"connector": 1e-2, "rag_connector": 1e-2}),
    finetune=Stage(4, 2, {"lora": 1e-2, "connector": 1e-3, "rag_connector": 1e-3}),
)


def tiny_parts() -> Parts:
    """Random parts whose tokens are bytes."""
    torch.manual_seed(3)
    tokenizer = tiny_model.tokenizer()
    lm = tiny_model.language_model(tokenizer.get_vocab_size()).requires_grad_(False)
    table = lm.get_input_embeddings().weight.detach()
    ids = torch.arange(len(table) - 3)
    vocabulary = SoftVocabulary(table[ids], ids)
    names = torch.randint(0, len(ids), (CLASSES, CONNECTOR.name_slots))
    classifier = torch.randn(CLASSES, DV)
    connector = Connector(CONNECTOR, vocabulary, classifier, torch.zeros(CLASSES), names)
    compressor = Compressor(MEMORY)
    rag = RagConnector(MEMORY, vocabulary, table, compressor.codes(table).detach())
    torch.nn.init.normal_(rag.text_out.weight, std=0.02)
    prompt = replace(PROMPT, similarity=(("same", 0.5), ("distant", -1.0)))
    return Parts(None, lm, tokenizer, connector, compressor, rag, prompt, ids, names)  # type: ignore[arg-type]


@pytest.fixture
def world() -> World:
    """Twelve pictures of two views each, of which some are held out."""
    rng = np.random.default_rng(0)
    records, cells = [], []
    for number in range(12):
        seen = rng.normal(size=(10, DV)).clip(0)
        for view in range(2):
            split = "held" if number % 4 == 3 else "train"
            name = f"thing{number}"
            records.append(
                Record(f"emoji/{number}", view, "emoji", split, name, name, "toy", "", "", "")
            )
            cells.append((seen + 0.1 * rng.normal(size=(10, DV))).clip(0))
    return make_world(tiny_parts(), np.array(cells, np.float16), records, RECIPE)


def episode(turns: int = 1, memories: int = 2) -> Episode:
    texts = ("a red cup", "Mira's box", "x")
    shown = tuple(RetrievedMemory(texts[i], 2 + i, "same") for i in range(memories))
    asked = (Turn("What?", "This is a cup."), Turn("Who owns it?", "Mira."), Turn("Why?", UNKNOWN))
    return Episode(0, shown, asked[:turns])


def loss_of(world: World, episodes: list[Episode]) -> Tensor:
    """Loss with everything in float32."""
    parts = world.parts
    parts.connector.eval()
    batch = make_batch(episodes, parts.prompt, parts.tokenizer, MEMORY.max_text_tokens)
    inputs = embed_batch(
        batch,
        torch.from_numpy(world.cells[batch.image_rows.numpy()].astype(np.float32)),
        torch.from_numpy(world.cells[batch.memory_rows.numpy()].astype(np.float32)),
        parts.embeddings,
        parts.connector,
        parts.compressor,
        parts.rag_connector,
    )
    return answer_loss(parts.lm, inputs, batch)


def test_questions_of_an_episode_do_not_see_each_other(world: World) -> None:
    together = episode(turns=3)
    apart = [Episode(0, together.memories, (turn,)) for turn in together.turns]
    sizes = [len(encode_text(world.parts.tokenizer, t.answer)) + 1 for t in together.turns]
    losses = [loss_of(world, [one]).item() for one in apart]
    expected = np.average(losses, weights=sizes)
    assert loss_of(world, [together]).item() == pytest.approx(expected, abs=1e-4)


def test_padding_changes_nothing(world: World) -> None:
    short, long = episode(1, memories=0), episode(3, memories=3)
    alone = [loss_of(world, [short]).item(), loss_of(world, [long]).item()]
    sizes = [
        sum(len(encode_text(world.parts.tokenizer, t.answer)) + 1 for t in e.turns)
        for e in (short, long)
    ]
    both = loss_of(world, [short, long]).item()
    assert both == pytest.approx(np.average(alone, weights=sizes), abs=1e-4)


def test_training_embeds_the_prompt_that_the_runtime_embeds(world: World) -> None:
    parts, one = world.parts, episode(1)
    parts.connector.eval()
    batch = make_batch([one], parts.prompt, parts.tokenizer, MEMORY.max_text_tokens)
    cells = torch.from_numpy(world.cells[:1].astype(np.float32))
    memory_cells = torch.from_numpy(world.cells[2:4].astype(np.float32))
    trained = embed_batch(
        batch, cells, memory_cells, parts.embeddings,
        parts.connector, parts.compressor, parts.rag_connector,
    )[0].detach()  # fmt: skip

    tokens = torch.zeros(2, MEMORY.max_text_tokens, D)
    for number, memory in enumerate(one.memories):
        ids = list(encode_text(parts.tokenizer, memory.text))
        tokens[number, : len(ids)] = parts.embeddings[ids]
    latents = parts.compressor(tokens, memory_cells)
    scale = latents.abs().amax(-1, keepdim=True) / 127  # as the bank stores them
    latents = (latents / scale.clamp(min=1e-9)).round() * scale
    memories, keep = parts.rag_connector(latents)
    image, _ = parts.connector(cells)
    segments = build_prompt(parts.prompt, parts.tokenizer, "What?", ["same", "same"])
    served = embed(
        segments,
        parts.embeddings.numpy(),
        image[0].detach().numpy(),
        [rows[kept].detach().numpy() for rows, kept in zip(memories, keep, strict=True)],
    )
    assert torch.from_numpy(served).shape == trained[: len(served)].shape
    assert np.abs(served - trained[: len(served)].numpy()).max() < 0.05  # int8 of the latents
    labels = batch.labels[0]
    answer = [
        *encode_text(parts.tokenizer, "This is a cup."),
        parts.tokenizer.token_to_id("<|im_end|>"),
    ]
    assert labels[len(served) - 1 :].tolist() == [*answer, -100]
    assert (labels[: len(served) - 1] == -100).all()


def test_latents_hold_the_exact_text(world: World) -> None:
    parts = world.parts
    parts.rag_connector.text_out.weight.data.zero_()
    ids = list(encode_text(parts.tokenizer, "Part number KX-204, owner Zaumle!"))
    tokens = torch.zeros(1, MEMORY.max_text_tokens, D)
    tokens[0, : len(ids)] = parts.embeddings[ids]
    latents = parts.compressor(tokens, torch.rand(1, 10, DV))
    memory, keep = parts.rag_connector(latents)
    assert keep.sum() == 1 + len(ids)
    assert torch.equal(memory[0, 1 : 1 + len(ids)], parts.embeddings[ids])


def test_a_picture_never_retrieves_itself_or_another_view(world: World) -> None:
    for row, record in enumerate(world.records):
        found = world.retrieve(row, "What is this?", 5)
        assert len(found) == 5
        assert all(world.records[world.bank[place]].id != record.id for place, _ in found)


def test_the_bank_holds_training_pictures_only(world: World) -> None:
    assert {world.records[row].split for row in world.bank} == {"train"}
    assert {
        world.records[row].split for rows in rows_by_source(world.records).values() for row in rows
    } == {"train"}


def test_queries_are_questions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the search is a question: never an answer, and never what holds one."""
    asked: list[str] = []
    search = World.retrieve

    def retrieve(self: World, row: int, question: str, count: int) -> list[tuple[int, float]]:
        asked.append(question)
        return search(self, row, question, count)

    monkeypatch.setattr(World, "retrieve", retrieve)
    rows = rows_by_source(world.records)
    for seed in range(60):
        asked.clear()
        drawn = draw_episode(world, rows, RECIPE, Random(seed))
        answers = {turn.answer for turn in drawn.turns}
        assert not answers & set(asked)
        assert not any(answer in question for answer in answers for question in asked)


def test_facts_are_told_as_they_are_answered() -> None:
    rng = Random(0)
    for _ in range(200):
        fact = draw_fact(rng)
        assert fact.value in fact.tell and fact.value in fact.answer and fact.value not in fact.ask


def test_names_stand_right_aligned() -> None:
    tokenizer = tiny_model.tokenizer()
    filler = encode_text(tokenizer, " a")
    owl = list(encode_text(tokenizer, " owl"))
    assert name_ids(tokenizer, "owl", 8) == [*filler, *filler, *owl]
    assert name_ids(tokenizer, "barn owl", 3) == owl[1:]


def new_run(world: World, directory: Path) -> stages.Run:
    return stages.Run(world.parts, world, RECIPE, directory, world.parts.lm)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {
        name for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    }


def test_each_stage_changes_what_it_should(world: World, tmp_path: Path) -> None:
    run, parts = new_run(world, tmp_path), world.parts
    lm, compressor = snapshot(parts.lm), snapshot(parts.compressor)
    connector, rag = snapshot(parts.connector), snapshot(parts.rag_connector)
    stages.train_align(run)
    assert changed(connector, parts.connector) and changed(rag, parts.rag_connector)
    assert not changed(lm, parts.lm) and not changed(compressor, parts.compressor)
    stages.with_lora(run)
    base = snapshot(run.lm)
    stages.train_finetune(run)
    moved = changed(base, run.lm)
    assert moved and all("lora_" in name for name in moved)
    assert not changed(compressor, parts.compressor)


def test_a_stopped_run_ends_like_one_that_was_not(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CHECKPOINT_SECONDS", 0.0)
    other = copy.deepcopy(world)
    whole = new_run(world, tmp_path / "whole")
    stages.train_slots(whole)

    def stop(step: int, stage: Stage, schedule=stages.schedule) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return schedule(step, stage)

    first = new_run(other, tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "schedule", stop)
        stages.train_slots(first)
    fresh = copy.deepcopy(other)
    torch.nn.init.zeros_(fresh.parts.connector.hidden.weight)  # must come from the checkpoint
    second = new_run(fresh, tmp_path / "stopped")
    stages.load_checkpoint(second)
    assert second.done == {"slots": 3}
    stages.train_slots(second)
    assert not changed(snapshot(world.parts.connector), second.parts.connector)
    assert [entry["bits"] for entry in whole.log] == [entry["bits"] for entry in second.log]


def test_a_run_is_not_continued_with_another_recipe(world: World, tmp_path: Path) -> None:
    run = new_run(world, tmp_path)
    stages.train_slots(run)
    other = replace(RECIPE, seed=99)
    with pytest.raises(InputError, match="another recipe"):
        stages.load_checkpoint(stages.Run(world.parts, world, other, tmp_path, world.parts.lm))


def test_saved_parts_load_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = world.parts
    parts.round_to_half()
    save_parts(parts, tmp_path)
    blank = tiny_parts()
    torch.nn.init.zeros_(blank.connector.hidden.weight)
    monkeypatch.setattr("tinyalign.training.parts.build_parts", lambda *_: blank)
    again = load_parts(tmp_path)
    assert not changed(snapshot(parts.connector), again.connector)
    assert not changed(snapshot(parts.rag_connector), again.rag_connector)
    assert again.prompt == parts.prompt
    assert again.keys is not None and parts.keys is not None
    assert np.array_equal(again.keys.image_projection, parts.keys.image_projection)
