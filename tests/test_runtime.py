"""Asking, on a tiny random model: the cache, the stream, the memories and the threads are right."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from tiny_model import picture

from tinyalign.bank import Bank, Hit
from tinyalign.runtime import (
    BankError,
    InputError,
    PictureError,
    QuestionError,
    TinyAlign,
    bank_cli,
)
from tinyalign.runtime.prompt import build_prompt, embed, encode_text
from tinyalign.runtime.sampling import Sampling, pick
from tinyalign.runtime.teach import create_bank
from tinyalign.runtime.threads import default_threads

QUESTION = "what is it?"


@pytest.fixture(scope="module")
def model(tiny: Path) -> TinyAlign:
    return TinyAlign.load(tiny, threads=2)


def prompt_rows(model: TinyAlign, seed: int = 0) -> np.ndarray:
    parts = model.parts
    segments = build_prompt(parts.manifest.prompt, parts.tokenizer, QUESTION)
    return embed(segments, parts.embeddings, model.encode(picture(seed)).image_tokens)


# ---- the language model and its cache --------------------------------------------


def test_cached_decoding_equals_reading_everything_again(model: TinyAlign) -> None:
    lm, table = model.parts.lm, model.parts.embeddings
    rows = prompt_rows(model)
    state = lm.new_state(len(rows) + 70)
    logits = lm.forward(state, rows)[0].copy()
    for _ in range(40):
        fresh = lm.forward(lm.new_state(len(rows)), rows)[0]
        assert np.allclose(fresh, logits, atol=1e-4)
        assert fresh.argmax() == logits.argmax()
        row = table[[int(logits.argmax())]].astype(np.float32)
        rows = np.concatenate([rows, row])
        logits = lm.forward(state, row)[0].copy()


def test_reading_in_parts_and_any_rows(model: TinyAlign) -> None:
    lm, rows = model.parts.lm, prompt_rows(model)
    every = lm.forward(lm.new_state(len(rows)), rows, tuple(range(len(rows))))
    some = lm.forward(lm.new_state(len(rows)), rows, (3, -1))
    assert np.allclose(some, every[[3, -1]], atol=1e-4)
    state = lm.new_state(len(rows))
    lm.forward(state, rows[:20])
    assert np.allclose(lm.forward(state, rows[20:])[0], every[-1], atol=1e-4)


def test_the_cache_is_one_buffer_that_never_moves_or_grows(model: TinyAlign) -> None:
    lm, rows = model.parts.lm, prompt_rows(model)
    state = lm.new_state(len(rows) + 9)
    assert state.capacity == 64
    places = {name: buffer.data_ptr() for name, buffer in state.buffers.items()}
    lm.forward(state, rows)
    written = np.count_nonzero(state.buffers["1.value"].numpy().any(axis=(0, 1, 3)))
    assert written == state.length == len(rows)
    lm.forward(state, rows[:1])
    assert {name: b.data_ptr() for name, b in state.buffers.items()} == places
    assert np.count_nonzero(state.buffers["1.value"].numpy().any(axis=(0, 1, 3))) == len(rows) + 1
    with pytest.raises(Exception, match="do not fit into a cache of 64"):
        lm.forward(state, np.zeros((200, rows.shape[1]), np.float32))


def test_greedy_tokens_are_those_of_torch(model: TinyAlign) -> None:
    lm = tiny_model.language_model(model.parts.manifest.lm.vocab)
    rows = torch.from_numpy(prompt_rows(model))[None]
    with torch.inference_mode():
        ids = lm.generate(
            inputs_embeds=rows,
            attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=sorted(model.parts.stop_ids),
            pad_token_id=0,
        )[0].tolist()
    answer = model.ask(picture(0), QUESTION, memory=False, max_tokens=40)
    if answer.finish_reason == "stop":
        ids = ids[:-1]
    assert list(answer.token_ids) == ids


# ---- asking --------------------------------------------


def test_stream_equals_ask(model: TinyAlign) -> None:
    for seed in range(4):  # random bytes: most answers hold broken UTF-8
        options = {"temperature": 2.0, "seed": seed, "max_tokens": 60}
        stream = model.stream(picture(seed), QUESTION, **options)
        pieces = list(stream)
        answer = model.ask(picture(seed), QUESTION, **options)
        assert "".join(pieces) == answer.text == stream.answer.text
        assert answer.text == model.parts.tokenizer.decode(list(answer.token_ids))
        assert answer.tokens == len(answer.token_ids) <= 60


def test_letters_are_never_split(model: TinyAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "ä猫🙂!"
    script = iter([*model.parts.tokenizer.encode(text).ids, min(model.parts.stop_ids)])
    monkeypatch.setattr("tinyalign.runtime.model.pick", lambda *_: next(script))
    stream = model.stream(picture(0), QUESTION)
    assert list(stream) == ["ä", "猫", "🙂", "!"]
    assert stream.answer.finish_reason == "stop"
    assert stream.answer.tokens == len(text.encode())


def test_another_picture_or_question_gives_another_answer(model: TinyAlign) -> None:
    answers = {model.ask(picture(s), q, memory=False).text for s in (0, 1) for q in ("a?", "b?")}
    assert len(answers) == 4
    assert model.ask(picture(0), "a?").text == model.ask(picture(0), "a?").text


def test_an_encoded_picture_is_used_again(
    model: TinyAlign, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = model.encode(picture(0))
    assert seen.cells.shape == (10, 16)
    assert seen.image_tokens.shape == (3, 32)
    assert (seen.pooled == seen.cells[0]).all()
    assert seen.pixel_hash != model.encode(picture(1)).pixel_hash
    fresh = model.ask(picture(0), QUESTION)
    monkeypatch.setattr("tinyalign.runtime.model.load_for", lambda *_: pytest.fail("read again"))
    assert model.ask(seen, QUESTION).text == fresh.text
    with pytest.raises(ValueError, match="read-only"):
        seen.cells[0] = 1


def test_the_same_path_with_new_bytes_is_read_again(model: TinyAlign, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    answers = []
    for seed in (0, 1):
        picture(seed).save(path)
        answers.append(model.ask(path, QUESTION, memory=False).text)
    assert answers[0] != answers[1]


def test_max_tokens_and_context(model: TinyAlign) -> None:
    answer = model.ask(picture(0), QUESTION, max_tokens=3, temperature=1.0, seed=1)
    assert (answer.tokens, answer.finish_reason) == (3, "length")
    full = model.ask(picture(0), "x" * 180, max_tokens=10_000, temperature=1.5, seed=3)
    assert full.prompt_tokens + full.tokens <= tiny_model.CONTEXT
    fixed = model.ask(picture(0), "x", memory=False, max_tokens=1).prompt_tokens - 1
    room = tiny_model.CONTEXT - fixed - 16
    model.ask(picture(0), "x" * room, memory=False)
    with pytest.raises(QuestionError, match=f"{room + 1} tokens long; {room} fit beside the pic"):
        model.ask(picture(0), "x" * (room + 1), memory=False)
    with pytest.raises(QuestionError, match="fit beside the picture and its memories"):
        model.ask(picture(0), "x" * room)


def test_timings_add_up(model: TinyAlign) -> None:
    times = model.ask(picture(0), QUESTION).timings
    assert times.first_token == pytest.approx(times.encode + times.retrieve + times.prefill)
    assert min(vars(times).values()) > 0
    assert model.load_ms > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
        ({"top_k": 0}, "top-k"),
        ({"max_tokens": 0}, "max-tokens"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options(model: TinyAlign, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.stream(picture(0), QUESTION, **options)
    with pytest.raises(QuestionError, match="empty"):
        model.stream(picture(0), " ")
    with pytest.raises(PictureError):
        model.ask(b"", QUESTION)
    with pytest.raises(InputError, match="threads"):
        TinyAlign.load(model.parts.directory, threads=0)


def test_a_picture_of_another_model_is_refused(model: TinyAlign) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="another model"):
        model.ask(replace(model.encode(picture(0)), model="x"), QUESTION)


# ---- memories --------------------------------------------


def test_the_nearest_memory_is_cited_and_changes_the_answer(model: TinyAlign) -> None:
    for seed, text in enumerate(tiny_model.TEXTS):
        answer = model.ask(picture(seed), text, top_k=1)
        assert [(hit.id, hit.text) for hit in answer.memories] == [(seed + 1, text)]
        assert answer.memories[0].score == pytest.approx(1, abs=2e-3)
        assert answer.memories[0].bank == "default"
        bare = model.ask(picture(seed), text, memory=False)
        assert bare.memories == ()
        assert bare.text != answer.text
        assert bare.prompt_tokens < answer.prompt_tokens


def test_more_memories_than_there_are(model: TinyAlign) -> None:
    answer = model.ask(picture(0), QUESTION, top_k=50)
    assert sorted(hit.id for hit in answer.memories) == [1, 2, 3]
    scores = [hit.score for hit in answer.memories]
    assert scores == sorted(scores, reverse=True)
    assert len(model.ask(picture(0), QUESTION).memories) == 2  # the manifest's top_k


def test_below_the_banks_floor_there_is_no_memory(
    model: TinyAlign, tiny: Path, tmp_path: Path
) -> None:
    """The floor is stored in the bank: below it the answer is the one without memory."""
    bare = model.ask(picture(0), QUESTION, memory=False)
    path = tmp_path / "mine.sqlite"
    with create_bank(model, path) as bank:
        assert bank.score_floor == tiny_model.PROMPT.similarity[-1][1]
        bank.add([model.memory(picture(0), "a cat")])
    with TinyAlign.load(tiny, banks=[path]) as taught:
        found = taught.ask(picture(0), QUESTION)
        assert [hit.text for hit in found.memories] == ["a cat"]
        with Bank.open(path) as bank:
            bank.set_score_floor(found.memories[0].score + 0.001)
        told = taught.ask(picture(0), QUESTION)
        assert told.memories == ()
        assert (told.token_ids, told.prompt_tokens) == (bare.token_ids, bare.prompt_tokens)


def test_what_is_far_behind_the_best_is_not_used(
    model: TinyAlign, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_model.write_tiny_model(tmp_path / "model")
    path = tmp_path / "mine.sqlite"
    with create_bank(model, path) as bank:
        bank.add([model.memory(picture(seed), f"cat {seed}") for seed in (0, 1)])
    scores = [hit.score for hit in asked_of(directory, path)]
    assert len(scores) == 2 and scores[0] - scores[1] > 0.01
    for margin, used in ((scores[0] - scores[1] + 0.01, 2), (scores[0] - scores[1] - 0.01, 1)):
        manifest = directory / "tinyalign.json"
        described = json.loads(manifest.read_text())
        described["prompt"]["margin"] = margin
        manifest.write_text(json.dumps(described))
        assert len(asked_of(directory, path)) == used
        picture(0).save(tmp_path / "0.png")
        command = ["search", str(tmp_path / "0.png"), "--bank", str(path), "--text", QUESTION]
        assert bank_cli.main([*command, "--model", str(directory)]) == 0
        assert ("behind the best, not used" in capsys.readouterr().out) == (used == 1)


def asked_of(directory: Path, bank: Path) -> tuple[Hit, ...]:
    with TinyAlign.load(directory, banks=[bank]) as taught:
        return taught.ask(picture(0), QUESTION).memories


def test_memory_modes(model: TinyAlign) -> None:
    """Latents cost a token a chunk, the text its tokens, both the sum."""
    asked = {
        mode: model.ask(picture(0), QUESTION, memory_mode=mode, top_k=1)
        for mode in ("latent", "text", "both", None)
    }
    bare = model.ask(picture(0), QUESTION, memory=False).prompt_tokens
    (hit,) = asked["latent"].memories
    frame = asked["latent"].prompt_tokens - bare - (len(hit.latents) - 1)
    text = len(encode_text(model.parts.tokenizer, hit.text))
    assert asked["text"].prompt_tokens == bare + frame + text
    assert asked["both"].prompt_tokens == asked["latent"].prompt_tokens + text
    assert asked[None].token_ids == asked["latent"].token_ids
    assert len({asked[mode].token_ids for mode in ("latent", "text", "both")}) > 1
    with pytest.raises(InputError, match="latent, text or both"):
        model.ask(picture(0), QUESTION, memory_mode="all")  # type: ignore[arg-type]


def test_teach_and_ask(model: TinyAlign, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.sqlite"
    new = model.memory(picture(9), " my cup ", "me", {"room": "kitchen"})
    assert new.text == "my cup"
    assert len(new.latents) == 2  # the picture and one chunk; what is not used is left out
    assert len(model.memory(picture(9), "my cups!").latents) == 3
    with Bank.create(path, tiny_model.FINGERPRINT, 16, tiny_model.LATENT) as bank:
        assert bank.add([new]) == bank.add([model.memory(picture(9), "my cup")]) == [1]
    with TinyAlign.load(tiny, banks=[path, "default"]) as both:
        hits = both.ask(picture(9), "my cup", top_k=4).memories
        assert [(hits[0].text, hits[0].bank)] == [("my cup", "mine")]
        assert {hit.bank for hit in hits} == {"mine", "default"}
        kept = both.ask(picture(9), "my cup", where={"room": "kitchen"}).memories
        assert [hit.text for hit in kept] == ["my cup"]
        assert both.ask(picture(9), "my cup", where={"room": "attic"}).memories == ()
    with pytest.raises(InputError, match="is 9 tokens long, a memory holds 8"):
        model.memory(picture(9), "123456789")
    with pytest.raises(InputError, match="empty"):
        model.memory(picture(9), " ")


def test_a_bank_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    Bank.create(tmp_path / "other.sqlite", "0f" * 16, 16, 8).close()
    with pytest.raises(BankError, match="another model"):
        TinyAlign.load(tiny, banks=["default", tmp_path / "other.sqlite"])
    with pytest.raises(BankError):
        TinyAlign.load(tiny, banks=[tmp_path / "nothing.sqlite"])


# ---- sharing and growth --------------------------------------------


def test_threads_share_one_model(model: TinyAlign) -> None:
    expected = [model.ask(picture(s % 3), f"what {s}?").text for s in range(6)]
    start = threading.Barrier(6)

    def ask(seed: int) -> str:
        start.wait()
        return model.ask(picture(seed % 3), f"what {seed}?").text

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == expected


def test_interleaved_streams_do_not_disturb_each_other(model: TinyAlign) -> None:
    alone = [model.ask(picture(s), QUESTION).text for s in (0, 1)]
    streams = [model.stream(picture(s), QUESTION) for s in (0, 1)]
    together = ["", ""]
    for _ in range(200):
        for i, stream in enumerate(streams):
            together[i] += next(stream, "")
    assert together == alone


MANY_PICTURES = """
import sys

import psutil
from tiny_model import picture

from tinyalign.runtime import TinyAlign

def ask(first, last):
    for seed in range(first, last):
        size = (30 + 7 * seed % 200, 25 + 13 * seed % 300)
        model.ask(picture(seed, size), "what " * (seed % 9) + "?", max_tokens=5)
    return psutil.Process().memory_info().rss

with TinyAlign.load(sys.argv[1], threads=1) as model:
    warm = ask(0, 60)
    print(ask(60, 260) - warm)
"""


def test_200_pictures_leave_the_memory_where_it_was(tiny: Path) -> None:
    command = [sys.executable, "-c", MANY_PICTURES, str(tiny)]  # what others left does not count
    here = Path(__file__).parent
    told = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    assert int(told.stdout) < 8 << 20


# ---- sampling and threads --------------------------------------------


def test_sampling() -> None:
    logits = np.array([0.0, 3.0, 2.0, 1.0], np.float32)
    random = Sampling(seed=1).generator()
    assert pick(logits, Sampling(), random) == 1
    assert {pick(logits, Sampling(1.0, 0.6), random) for _ in range(50)} == {1}
    assert {pick(logits, Sampling(1.0, 0.7), random) for _ in range(90)} == {1, 2}
    assert {pick(logits, Sampling(50.0), random) for _ in range(200)} == {0, 1, 2, 3}
    counts = np.bincount([pick(logits, Sampling(1.0), random) for _ in range(4000)], minlength=4)
    assert counts / 4000 == pytest.approx(np.exp(logits) / np.exp(logits).sum(), abs=0.03)
    assert pick(logits, Sampling(1e-9), random) == 1


def test_seed_repeats(model: TinyAlign) -> None:
    one, two, other = (
        model.ask(picture(0), QUESTION, temperature=3.0, seed=s, max_tokens=20).token_ids
        for s in (5, 5, 6)
    )
    assert one == two != other


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, 99),
        ({"cpu.max": "max 100000"}, 99),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "rubbish"}, 99),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 99),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_threads_follow_affinity_and_quota(
    files: dict[str, str], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    assert default_threads(tmp_path) == min(3, most)
