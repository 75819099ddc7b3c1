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

from tinyalign.bank import Bank, NewMemory
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import MemoryMode
from tinyalign.runtime.memory_text import read_memory
from tinyalign.runtime.prompt import encode_text
from tinyalign.training import stages
from tinyalign.training.answer import prompt_rows
from tinyalign.training.batch import (
    Episode,
    RetrievedMemory,
    Turn,
    answer_loss,
    embed_batch,
    make_batch,
    text_input,
)
from tinyalign.training.default_bank import latents_of
from tinyalign.training.episodes import UNKNOWN, Found, draw_episode, rows_by_source, show
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
from tinyalign.training.world import World, cells_of, make_world

DV, D, CLASSES = 24, tiny_model.D, 5
CONNECTOR = ConnectorShape(vision_width=DV, width=D, hidden=16, cell_width=4)
MEMORY = MemoryShape(D, DV, latent_width=24, chunks=3, max_text_tokens=48, hidden=8)
RECIPE = Recipe(
    connector=CONNECTOR,
    memory=MEMORY,
    image_key_width=8,
    text_key_width=4,
    turns=2,
    slots=Stage(6, 4, {"connector": 1e-2, "memory_picture": 1e-2}),
    bags=Stage(4, 3, {"compressor": 1e-2, "rag_connector": 1e-2}),
    align=Stage(6, 2, {"connector": 1e-2, "rag_connector": 1e-2, "copy": 1e-2}),
    finetune=Stage(4, 2, {"lora": 1e-2, "connector": 1e-3, "rag_connector": 1e-3, "copy": 1e-2}),
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
    rag = RagConnector(MEMORY, vocabulary, radius=1.0)
    torch.nn.init.normal_(rag.out.weight, std=0.02)
    torch.nn.init.constant_(rag.picture_share, 0.2)
    prompt = replace(PROMPT, similarity=(("same", 0.5), ("distant", -1.0)))
    return Parts(None, lm, tokenizer, connector, compressor, rag, prompt, ids, names)  # type: ignore[arg-type]


@pytest.fixture
def world() -> World:
    return tiny_world()


def tiny_world() -> World:
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


def episode(turns: int = 1, memories: int = 2, mode: MemoryMode = "latent") -> Episode:
    texts = ("This is a red cup.", "Mira's box. It is red.", "x")
    shown = tuple(RetrievedMemory(texts[i], 2 + i, "same") for i in range(memories))
    asked = (Turn("What?", "This is a cup."), Turn("Who owns it?", "Mira."), Turn("Why?", UNKNOWN))
    return Episode(0, shown, asked[:turns], mode)


def loss_of(world: World, episodes: list[Episode]) -> Tensor:
    """Loss with everything in float32."""
    parts = world.parts
    parts.connector.eval()
    batch = make_batch(episodes, parts.prompt, parts.tokenizer, MEMORY)
    inputs = embed_batch(
        batch,
        parts.image_tokens(cells_of(world, batch.image_rows.tolist())),
        cells_of(world, batch.memory_rows.tolist()),
        parts.embeddings,
        parts.compressor,
        parts.rag_connector,
    )
    return answer_loss(parts.lm, inputs, batch, parts.rag_connector.copy_bonus)


@pytest.mark.parametrize("mode", ["latent", "text", "both"])
def test_questions_of_an_episode_do_not_see_each_other(world: World, mode: MemoryMode) -> None:
    together = episode(turns=3, mode=mode)
    apart = [Episode(0, together.memories, (turn,), mode) for turn in together.turns]
    sizes = [len(encode_text(world.parts.tokenizer, t.answer)) + 1 for t in together.turns]
    losses = [loss_of(world, [one]).item() for one in apart]
    expected = np.average(losses, weights=sizes)
    assert loss_of(world, [together]).item() == pytest.approx(expected, abs=1e-4)


def test_padding_changes_nothing(world: World) -> None:
    short, long = episode(1, memories=0), episode(3, memories=3, mode="both")
    alone = [loss_of(world, [short]).item(), loss_of(world, [long]).item()]
    sizes = [
        sum(len(encode_text(world.parts.tokenizer, t.answer)) + 1 for t in e.turns)
        for e in (short, long)
    ]
    both = loss_of(world, [short, long]).item()
    assert both == pytest.approx(np.average(alone, weights=sizes), abs=1e-4)


@pytest.mark.parametrize("mode", ["latent", "text", "both"])
def test_training_embeds_the_prompt_that_the_runtime_embeds(
    world: World, tmp_path: Path, mode: MemoryMode
) -> None:
    parts, one = world.parts, episode(1, mode=mode)
    parts.connector.eval()
    batch = make_batch([one], parts.prompt, parts.tokenizer, MEMORY)
    cells = torch.from_numpy(world.cells[:1].astype(np.float32))
    memory_cells = torch.from_numpy(world.cells[batch.memory_rows.numpy()].astype(np.float32))
    trained = embed_batch(
        batch, parts.image_tokens(cells), memory_cells, parts.embeddings,
        parts.compressor, parts.rag_connector,
    )[0].detach()  # fmt: skip

    texts = [memory.text for memory in one.memories]
    keys = np.eye(2, 12, dtype=np.float32)
    latents = latents_of(world, [memory.row for memory in one.memories], texts)
    with Bank.create(tmp_path / "b.sqlite", "f", 12, MEMORY.latent_width) as bank:
        bank.add(map(NewMemory, keys, latents, texts))
        hits = bank.search((keys[0] + keys[1]) / 2**0.5, 2)
    served = prompt_rows(parts, cells, "What?", hits, mode)[0]
    assert served.shape == trained[: len(served)].shape
    assert (served - trained[: len(served)]).abs().max() < 0.05  # int8 of the latents
    labels = batch.labels[0]
    answer = [
        *encode_text(parts.tokenizer, "This is a cup."),
        parts.tokenizer.token_to_id("<|im_end|>"),
    ]
    assert labels[len(served) - 1 :].tolist() == [*answer, -100]
    assert (labels[: len(served) - 1] == -100).all()


def test_copying_a_memory_is_rewarded(world: World) -> None:
    """The loss falls with the bonus where the answer repeats a memory, and nowhere else."""
    rag = world.parts.rag_connector
    losses = {}
    for memories in (0, 2):  # "This is a red cup." is in the first of two memories
        for bonus in (0.0, 6.0):
            torch.nn.init.constant_(rag.copy_bonus, bonus)
            losses[memories, bonus] = loss_of(world, [episode(1, memories)]).item()
    assert losses[0, 0.0] == losses[0, 6.0]
    assert losses[2, 6.0] < losses[2, 0.0] - 0.5


def test_a_chunk_reads_as_its_words(world: World, tmp_path: Path) -> None:
    """After the first stage a chunk's token lies near the tokens of the chunk, of unseen texts."""
    run = new_run(world, tmp_path)
    run.recipe = replace(RECIPE, bags=Stage(60, 8, {"compressor": 3e-3, "rag_connector": 3e-3}))
    stages.train_bags(run)
    parts = world.parts
    read = read_memory(parts.tokenizer, "zz. kk. www.", 48, MEMORY.chunks)
    ids, members = text_input([read], MEMORY, 48)
    unit = torch.nn.functional.normalize(parts.embeddings, dim=-1)
    latents = parts.compressor.text_latents(unit[ids], members)[0]  # [C, d]
    near = (parts.rag_connector.text_tokens(latents) @ unit.T).argmax(-1)  # [C]
    for span, token in zip(read.members, near.tolist(), strict=True):
        assert token in read.ids[span.start : span.stop]


def test_a_picture_never_retrieves_itself_or_another_view(world: World) -> None:
    for row, record in enumerate(world.records):
        found = world.retrieve(row, "What is this?", 5)
        assert len(found) == 5
        assert all(world.records[world.bank[place]].id != record.id for place, _ in found)


def test_a_scene_retrieves_none_of_its_pictures(world: World) -> None:
    scene = replace(world.records[0], id="composites/0", pictures=("emoji/0", "emoji/1"))
    cells = np.concatenate([world.cells, world.cells[:1]])
    with_scene = make_world(world.parts, cells, [*world.records, scene], RECIPE)
    row = len(world.records)
    found = {with_scene.records[with_scene.bank[p]].id for p, _ in with_scene.retrieve(row, "x", 9)}
    assert len(found) == 7 and not found & set(scene.pictures)


def test_what_is_far_behind_the_best_is_not_shown(world: World) -> None:
    world.parts.prompt = replace(world.parts.prompt, margin=0.1)
    found = [Found(0.9, "best", 0), Found(0.85, "near", 2), Found(0.7, "far", 4)]
    assert [m.text for m in show(world, found)] == ["best", "near"]
    assert [m.text for m in show(world, found, crowded=True)] == ["best", "near", "far"]


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


def test_a_finished_stage_is_left_as_it_is(world: World, tmp_path: Path) -> None:
    """The bags stage starts from the embeddings' axes: not again when the run is continued."""
    run = new_run(world, tmp_path)
    stages.train_bags(run)
    trained = {
        name: snapshot(getattr(world.parts, name)) for name in ("compressor", "rag_connector")
    }
    again = new_run(tiny_world(), tmp_path)
    stages.load_checkpoint(again)
    stages.train_bags(again)
    for name, weights in trained.items():
        assert not changed(weights, getattr(again.parts, name))


def test_a_run_is_not_continued_with_another_recipe(world: World, tmp_path: Path) -> None:
    run = new_run(world, tmp_path)
    stages.train_slots(run)
    other = replace(RECIPE, seed=99)
    with pytest.raises(InputError, match="another recipe"):
        stages.load_checkpoint(stages.Run(world.parts, world, other, tmp_path, world.parts.lm))


@pytest.mark.parametrize("large", [10, 1_000_000])
def test_saved_parts_load_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """Bit for bit what `finish` left, whether matrices are stored in fp16 or in int8."""
    monkeypatch.setattr("tinyalign.training.parts.LARGE", large)
    parts = world.parts
    parts.finish()
    save_parts(parts, tmp_path)
    blank = tiny_parts()
    torch.nn.init.zeros_(blank.connector.hidden.weight)
    monkeypatch.setattr(
        "tinyalign.training.parts.build_parts", lambda *given: replace(blank, prompt=given[2])
    )
    again = load_parts(tmp_path)
    assert not changed(snapshot(parts.connector), again.connector)
    assert not changed(snapshot(parts.rag_connector), again.rag_connector)
    assert again.prompt == parts.prompt
    assert again.keys is not None and parts.keys is not None
    assert np.array_equal(again.keys.image_projection, parts.keys.image_projection)


@pytest.mark.parametrize(
    ("surplus", "margin"),
    [(torch.linspace(-3, 4, 701), 0.0), (torch.linspace(1, 5, 401), 1.0), (-torch.ones(9), 0.0)],
)
def test_the_margin_of_not_knowing_costs_one_answer_in_twenty(
    monkeypatch: pytest.MonkeyPatch, surplus: torch.Tensor, margin: float
) -> None:
    from tinyalign.training import unknown

    monkeypatch.setattr(unknown, "missing_questions", lambda run: [])
    monkeypatch.setattr(unknown, "margins", lambda run, episodes: surplus)
    found = unknown.calibrated_margin(None)  # type: ignore[arg-type]
    assert found == margin
    answered = surplus[surplus > 0]
    assert (answered >= found).sum() >= 0.95 * len(answered)
