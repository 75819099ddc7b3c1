"""The training stages, each a plain loop over steps that are the same however often it is
interrupted.

    0  bags         compressor and RAG connector: a chunk's token tells which words are in the chunk
       slots        connector: every image token names its part (name, kind, colour, number, place)
    1  align        connector and RAG connector with retrieved memories, frozen LM
    2  finetune     LoRA on the LM with mixed episodes (TinyAlign, arXiv 2505.12884, section 3.3)

What a step sees depends on (seed, stage, step) only, so a resumed run equals an uninterrupted one.
Several processes (`accelerate launch`) share the examples of a step and add up their gradients, so
they take the steps that one process would.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyalign.bank.errors import InputError
from tinyalign.runtime.memory_text import read_memory
from tinyalign.runtime.prompt import encode_text
from tinyalign.training.batch import (
    Batch,
    Episode,
    answer_loss,
    embed_batch,
    make_batch,
    text_input,
)
from tinyalign.training.episodes import aligned_episode, draw_episode, draw_taught, rows_by_source
from tinyalign.training.features import Record
from tinyalign.training.modules import COSINE_SCALE
from tinyalign.training.parts import Parts
from tinyalign.training.recipe import Recipe, Stage
from tinyalign.training.vocabulary import COLOURS, NUMBERS, PLACES, name_ids, word_id
from tinyalign.training.world import World, cells_of, image_tokens_of

LORA_LAYERS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj",
    "qkv_proj", "gate_up_proj", "dense", "out_proj", "fc1", "fc2",  # Phi's and OPT's
]  # fmt: skip
CHECKPOINT_SECONDS = 60.0
IMAGE_DROPOUT = 0.1  # share of pictures whose image tokens are blanked in the LM stages
GROUP = 4  # batches drawn together, so that episodes of one length share a batch
BITS = 1 / math.log(2)
# How often each source is drawn in the slot stage.
SLOT_SHARES = {
    "emoji": 5, "clipart": 4, "furniture": 2, "prototypes": 4, "easy_vqa": 2, "composites": 6,
    "noto": 2, "twemoji": 2, "flat": 1, "turned": 1,
}  # fmt: skip


@dataclass
class Run:
    """A training run: the parts, the data, where it is, and what has been logged."""

    parts: Parts
    world: World
    recipe: Recipe
    directory: Path
    lm: PreTrainedModel | PeftModel  # the LM as trained: with LoRA in fine-tuning
    done: dict[str, int] = field(default_factory=dict)  # stage -> steps done
    log: list[dict[str, Any]] = field(default_factory=list)
    optimizer_state: dict[str, Any] | None = None
    accelerator: Accelerator = field(
        default_factory=lambda: Accelerator(cpu=not torch.cuda.is_available())
    )

    @property
    def mine(self) -> slice:
        """Which examples of a step are this process's."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device


# The loss summed over this process's examples of a step, and their weight (what to divide by).
LossOf = Callable[[int], tuple[Tensor, float]]


# ------------------------------------------------------------------ one loop for all stages


def train_stage(
    run: Run,
    name: str,
    stage: Stage,
    groups: dict[str, list[nn.Parameter]],
    loss_of: LossOf,
) -> None:
    """Run the steps of a stage that are left: AdamW, warm-up then cosine, clipping, checkpoints."""
    accelerator = run.accelerator
    start = run.done.get(name, 0)
    if start >= stage.steps:
        return
    for parameter in all_parameters(run):
        parameter.requires_grad_(False)
    trained = [p for group in groups.values() for p in group]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": groups[key], "lr": rate} for key, rate in stage.rates.items()],
        weight_decay=0.01,
    )
    rates = list(stage.rates.values())
    if start and run.optimizer_state:
        optimizer.load_state_dict(run.optimizer_state)
    began = saved = time.monotonic()
    for step in range(start, stage.steps):
        torch.manual_seed(
            int.from_bytes(f"{run.recipe.seed}/{name}/{step}".encode(), "big") % 2**63
        )
        factor = schedule(step, stage)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        total, weight = loss_of(step)
        loss = total / added(accelerator, torch.tensor(weight, device=run.device))
        optimizer.zero_grad()
        loss.backward()
        if accelerator.num_processes > 1:
            for parameter in trained:
                gradient = parameter.grad
                parameter.grad = added(
                    accelerator, torch.zeros_like(parameter) if gradient is None else gradient
                )
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        run.done[name] = step + 1
        now = time.monotonic()
        bits = added(accelerator, loss.detach()).item() * BITS
        entry = {"stage": name, "step": step + 1, "bits": round(bits, 4)}
        run.log.append(entry)
        if not accelerator.is_main_process:
            continue
        left = (now - began) / (step + 1 - start) * (stage.steps - step - 1)
        print(
            f"{name} {step + 1}/{stage.steps}  {entry['bits']:.3f} bits  {left / 60:.1f} min left",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if now - saved > CHECKPOINT_SECONDS or step + 1 == stage.steps:
            save_checkpoint(run, optimizer.state_dict() if step + 1 < stage.steps else None)
            saved = now


def added(accelerator: Accelerator, value: Tensor) -> Tensor:
    """A value's sum over all processes."""
    total: Tensor = accelerator.reduce(value, "sum")
    return total


def schedule(step: int, stage: Stage) -> float:
    """Factor of the learning rate: linear warm-up, then cosine to a tenth."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    through = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * through))


def all_parameters(run: Run) -> Iterator[nn.Parameter]:
    """Parameters of every part."""
    for module in (run.lm, *run.parts.trained.values()):
        yield from module.parameters()


# ------------------------------------------------------------------ stage 0


def train_bags(run: Run) -> None:
    """Compressor and RAG connector: each chunk's token is nearest to the words of its chunk.

    The language model's head is its table of token embeddings, so a token that is near a word's
    embedding lets the frozen model say that word. Rare words count more. No language model here.
    """
    stage, parts, world = run.recipe.bags, run.parts, run.world
    shape, table = parts.compressor.shape, parts.embeddings.detach().float()  # [V, D]
    unit = F.normalize(table, dim=-1)
    if not run.done.get("bags"):
        start_near_identity(parts, table)
    rarity = word_rarity(parts, world, run.recipe.seed).to(run.device)  # [V]

    def loss_of(step: int) -> tuple[Tensor, float]:
        rng = Random(f"{run.recipe.seed}/bags/{step}")
        texts = [told_text(world, rng) for _ in range(stage.batch)]
        read = [
            read_memory(parts.tokenizer, text, shape.max_text_tokens, shape.chunks)
            for text in texts[run.mine]
        ]
        ids, members = text_input(read, shape, shape.max_text_tokens)
        ids, members = ids.to(run.device), members.to(run.device)
        latents = parts.compressor.text_latents(F.embedding(ids, table), members)  # [B, C, d]
        noise = torch.randn(stage.batch, *latents.shape[1:])[run.mine].to(run.device)
        latents = latents + 0.01 * noise  # the bank stores int8
        used = members.any(-1)  # [B, C]
        tokens = parts.rag_connector.text_tokens(latents[used])  # [M, D]
        logs = (COSINE_SCALE * F.normalize(tokens, dim=-1) @ unit.T).log_softmax(-1)  # [M, V]
        weights = (members * rarity[ids][:, None])[used]  # [M, N]
        said = logs.gather(1, ids[:, None].expand(-1, shape.chunks, -1)[used])  # [M, N]
        losses = -(weights * said).sum(-1) / weights.sum(-1).clamp(min=1e-6)  # [M]
        return losses.sum(), len(losses)

    groups = {
        "compressor": [
            *parts.compressor.weigh.parameters(),
            *parts.compressor.project.parameters(),
        ],
        "rag_connector": text_parameters(parts),
    }
    train_stage(run, "bags", stage, groups, loss_of)


def start_near_identity(parts: Parts, table: Tensor) -> None:
    """Projection and lift as the principal axes of the embeddings [V, D] and their inverse."""
    unit = F.normalize(table, dim=-1)
    _, axes = torch.linalg.eigh(unit.T @ unit)
    main = axes[:, -parts.compressor.shape.latent_width :].T.contiguous()  # [d, D]
    with torch.no_grad():
        parts.compressor.project.weight.copy_(main)
        parts.rag_connector.lift.weight.copy_(main.T)
        parts.rag_connector.lift.bias.zero_()


def word_rarity(parts: Parts, world: World, seed: int, sample: int = 3000) -> Tensor:
    """How much a token counts [V]: 1 for those in no sampled text, near 0 for those in all."""
    rng = Random(f"{seed}/rarity")
    counts = torch.zeros(len(parts.embeddings))
    for _ in range(sample):
        counts[list(set(encode_text(parts.tokenizer, told_text(world, rng))))] += 1
    return (-torch.log((counts + 1) / (sample + 1)) / math.log(sample + 1)).clamp(min=0.02)


def told_text(world: World, rng: Random) -> str:
    """The text of a memory: half of the time of the bank, else with invented names and facts."""
    place = rng.randrange(len(world.bank))
    if rng.random() < 0.5:
        return world.bank_texts[place]
    return draw_taught(world, world.records[world.bank[place]], rng).text


def slot_targets(parts: Parts, records: list[Record]) -> Tensor:
    """What each image token should say, [n, T] indices into the soft vocabulary, -100 where not
    known."""
    index = {int(token): i for i, token in enumerate(parts.vocabulary_ids)}
    shape = parts.own_connector.shape
    slots, tokenizer = shape.name_slots, parts.tokenizer
    rows = []
    for record in records:
        row = [-100] * shape.tokens
        if record.name:
            row[:slots] = [index.get(t, -100) for t in name_ids(tokenizer, record.name, slots)]
        words = (record.kind, record.colour, number_word(record.count), record.position)
        known = ("", COLOURS, NUMBERS, PLACES)
        for place, (word, among) in enumerate(zip(words, known, strict=True)):
            if word and (not among or word in among):
                row[slots + place] = index.get(word_id(tokenizer, word), -100)
        rows.append(row)
    return torch.tensor(rows)


def number_word(count: int) -> str:
    """ "three" for 3, and "" for 0 (not known)."""
    return NUMBERS[count - 1] if 0 < count <= len(NUMBERS) else ""


def train_slots(run: Run) -> None:
    """Connector and the memories' picture token: per-slot cross-entropy, without the LM."""
    stage, parts, world = run.recipe.slots, run.parts, run.world
    connector = parts.own_connector
    rows = rows_by_source(world.records, tuple(SLOT_SHARES))
    everything = [row for found in rows.values() for row in found]
    targets = torch.full((len(world.records), connector.shape.tokens), -100)
    targets[everything] = slot_targets(parts, [world.records[row] for row in everything])
    sources = list(rows)
    shares = [SLOT_SHARES[source] for source in sources]
    head = connector.shape.name_slots - 1

    def loss_of(step: int) -> tuple[Tensor, float]:
        rng = Random(f"{run.recipe.seed}/slots/{step}")
        picked = [
            rng.choice(rows[source]) for source in rng.choices(sources, shares, k=stage.batch)
        ]
        cells = cells_of(world, picked)
        cells = cells * (1 + 0.2 * torch.randn_like(cells))
        other = cells.roll(1, 0)  # a share of another picture's layout, as if it stood behind
        cells = (cells + 0.3 * torch.rand(len(cells), 1, 1) * (other - other.mean(0))).clamp(min=0)
        wanted = targets[picked]  # [B, T]
        known, heads = (wanted >= 0).sum(), (wanted[:, head] >= 0).sum()
        cells, wanted = cells[run.mine].to(run.device), wanted[run.mine].to(run.device)
        logits = connector.vocabulary.logits(connector.slot_vectors(cells))
        loss = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
        )
        latent = parts.compressor.picture_latent(cells)
        picture = parts.rag_connector.vocabulary.logits(parts.rag_connector.picture_vector(latent))
        named = F.cross_entropy(picture, wanted[:, head], ignore_index=-100, reduction="sum")
        share = 1 / run.accelerator.num_processes
        return loss / known.clamp(min=1) + 0.3 * named / heads.clamp(min=1), share

    groups = {
        "connector": list(connector.parameters()),
        "memory_picture": [
            *parts.compressor.picture.parameters(),
            *parts.rag_connector.picture_hidden.parameters(),
            *parts.rag_connector.picture_out.parameters(),
        ],
    }
    train_stage(run, "slots", stage, groups, loss_of)


# ------------------------------------------------------------------ stages 1 and 2


def train_align(run: Run) -> None:
    """Connector and RAG connector with retrieved neighbours, through the frozen LM."""
    groups = {
        "connector": list(run.parts.connector.parameters()),
        "rag_connector": rag_parameters(run.parts),
        "copy": [run.parts.rag_connector.copy_bonus],
    }
    train_stage(
        run,
        "align",
        run.recipe.align,
        groups,
        episode_loss(run, "align", run.recipe.align, aligned_episode),
    )


def train_finetune(run: Run) -> None:
    """LoRA on the LM and the connectors, with mixed episodes."""
    groups = {
        "lora": [p for n, p in run.lm.named_parameters() if "lora_" in n],
        "connector": list(run.parts.connector.parameters()),
        "rag_connector": rag_parameters(run.parts),
        "copy": [run.parts.rag_connector.copy_bonus],
    }
    stage = run.recipe.finetune
    train_stage(run, "finetune", stage, groups, episode_loss(run, "finetune", stage, draw_episode))


def text_parameters(parts: Parts) -> list[nn.Parameter]:
    """What turns a text latent into a token."""
    rag = parts.rag_connector
    return [p for part in (rag.lift, rag.hidden, rag.out) for p in part.parameters()]


def rag_parameters(parts: Parts) -> list[nn.Parameter]:
    """The RAG connector's own parameters, without the copy bonus, which learns faster."""
    bonus = parts.rag_connector.copy_bonus
    return [p for p in parts.rag_connector.parameters() if p is not bonus]


Draw = Callable[[World, dict[str, list[int]], Recipe, Random], Episode]


def episode_loss(
    run: Run, name: str, stage: Stage, draw: Draw, rows: dict[str, list[int]] | None = None
) -> LossOf:
    """The loss of a step over drawn episodes; `rows` are those of all training pictures."""
    rows = rows_by_source(run.world.records) if rows is None else rows
    memory: dict[int, list[list[Episode]]] = {}

    def group_of(number: int) -> list[list[Episode]]:
        if number not in memory:
            rng = Random(f"{run.recipe.seed}/{name}/{number}")
            episodes = [draw(run.world, rows, run.recipe, rng) for _ in range(GROUP * stage.batch)]
            episodes.sort(key=lambda e: (e.mode != "latent", sum(len(m.text) for m in e.memories)))
            batches = [episodes[i * stage.batch : (i + 1) * stage.batch] for i in range(GROUP)]
            rng.shuffle(batches)
            memory.clear()
            memory[number] = batches
        return memory[number]

    def loss_of(step: int) -> tuple[Tensor, float]:
        episodes = group_of(step // GROUP)[step % GROUP]
        dropout = IMAGE_DROPOUT if name == "align" else IMAGE_DROPOUT / 2
        keep = (torch.rand(len(episodes)) >= dropout).float()
        return episodes_loss(run, episodes[run.mine], keep[run.mine])

    return loss_of


def episodes_loss(
    run: Run, episodes: list[Episode], keep: Tensor | None = None
) -> tuple[Tensor, float]:
    """Answer loss (nats) summed over the answer tokens of some episodes, and their number.

    `keep` [B] is 0 where the picture's tokens are blanked.
    """
    batch, inputs = embed_episodes(run, episodes, keep)
    count = int((batch.labels >= 0).sum())
    with lm_arithmetic(run.device.type):
        loss = answer_loss(base_of(run.lm), inputs, batch, run.parts.rag_connector.copy_bonus)
    return loss * count, count


def embed_episodes(
    run: Run, episodes: Sequence[Episode], keep: Tensor | None = None
) -> tuple[Batch, Tensor]:
    """Some episodes as a batch and as the LM's input [B, N, D], where the run computes."""
    parts, world, device = run.parts, run.world, run.device
    batch = make_batch(episodes, parts.prompt, parts.tokenizer, parts.compressor.shape)
    image = image_tokens_of(world, batch.image_rows.tolist(), device)
    memory_cells = cells_of(world, batch.memory_rows.tolist()).to(device)
    batch = batch.to(device)
    inputs = embed_batch(
        batch, image, memory_cells, parts.embeddings, parts.compressor, parts.rag_connector,
        None if keep is None else keep.to(device),
    )  # fmt: skip
    return batch, inputs


def base_of(lm: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a peft model (LoRA layers included), or the model itself."""
    return cast(PreTrainedModel, lm.get_base_model()) if isinstance(lm, PeftModel) else lm


@contextmanager
def lm_arithmetic(device: str = "cpu") -> Iterator[None]:
    """bfloat16 products where the processor has them: 1.6 times as fast here, same loss curve."""
    with torch.autocast(device, torch.bfloat16):
        yield


def for_training(lm: PreTrainedModel) -> PreTrainedModel:
    """The LM with its layers' weights in bfloat16; the embeddings stay exact and the head is its
    own copy."""
    lm.lm_head = copy.deepcopy(lm.lm_head)  # a tied one would take the embeddings along
    for module in (*lm.model.modules(), lm.lm_head):
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return lm.requires_grad_(False)


def with_lora(run: Run) -> None:
    """Give the LM its LoRA adapter (once)."""
    if not isinstance(run.lm, PeftModel):
        torch.manual_seed(run.recipe.seed)
        config = LoraConfig(
            r=run.recipe.lora_rank,
            lora_alpha=run.recipe.lora_alpha,
            target_modules=LORA_LAYERS,
            task_type="CAUSAL_LM",
        )
        run.lm = get_peft_model(run.lm, config)
        for parameter in run.lm.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def save_lora(run: Run, directory: Path) -> None:
    """Write the LoRA adapter (fp16, peft's format); nothing before fine-tuning."""
    if not isinstance(run.lm, PeftModel):
        return
    run.lm.save_pretrained(str(directory), save_embedding_layers=False)  # else peft asks a hub
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)


# ------------------------------------------------------------------ checkpoints


def lora_state(run: Run) -> dict[str, Tensor]:
    """The LoRA parameters by name."""
    return {name: value.detach() for name, value in run.lm.named_parameters() if "lora_" in name}


def save_checkpoint(run: Run, optimizer: dict[str, Any] | None) -> None:
    """Write everything a resumed run needs, atomically."""
    run.directory.mkdir(parents=True, exist_ok=True)
    parts = run.parts
    state = {
        "recipe": repr(run.recipe),
        "done": run.done,
        "log": run.log,
        **{name: module.state_dict() for name, module in parts.trained.items()},
        "lora": lora_state(run),
        "optimizer": optimizer,
    }
    temporary = run.directory / "checkpoint.tmp"
    torch.save(state, temporary)
    temporary.replace(run.directory / "checkpoint.pt")
    (run.directory / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in run.log))


def load_checkpoint(run: Run) -> None:
    """Continue a run where its checkpoint is; nothing happens where there is none.

    Raises InputError when the checkpoint is of another recipe.
    """
    path = run.directory / "checkpoint.pt"
    if not path.exists():
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != repr(run.recipe):
        raise InputError(
            f"{run.directory} holds a run of another recipe (seed, steps or shapes differ): "
            "continue it as it was started, or choose another --out"
        )
    run.done, run.log, run.optimizer_state = state["done"], state["log"], state["optimizer"]
    for name, module in run.parts.trained.items():
        module.load_state_dict(state[name])
    if state["lora"]:
        with_lora(run)
        run.lm.load_state_dict(state["lora"], strict=False)
