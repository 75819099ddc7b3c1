"""The runtime's one object: a loaded model that answers questions about pictures.

model = TinyAlign.load()
for piece in model.stream("cat.jpg", "What is this?"):
    print(piece, end="", flush=True)

picture ─► vision ─► cells ─► connector ─► image tokens ┐
                       └► key ─► bank ─► RAG connector ─► memory tokens ├─► LM ─► answer
question ─► token embeddings ───────────────────────────┘
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from tinyalign.bank import Hit, Memory, NewMemory, content_hash
from tinyalign.bank.bank import MemoryBank
from tinyalign.bank.memory import check_text as valid_text
from tinyalign.bank.opening import open_bank
from tinyalign.runtime.answers import Answer, AnswerStream, EncodedPicture, Timings
from tinyalign.runtime.decode import continue_answer
from tinyalign.runtime.errors import InputError, QuestionError
from tinyalign.runtime.images import Picture, load_for, normalise, resize, thumbnail
from tinyalign.runtime.keys import make_key, mean_embedding, retold_key
from tinyalign.runtime.lm import LmState
from tinyalign.runtime.loading import (
    DEFAULT_BANK,
    Loading,
    Parts,
    finish_loading,
    graph_path,
    open_session,
    start_loading,
)
from tinyalign.runtime.manifest import MemoryMode, no_memory
from tinyalign.runtime.memory_text import MemoryText, add_copy_bonus, read_memory
from tinyalign.runtime.prompt import (
    Segment,
    build_prompt,
    embed,
    encode_question,
    encode_template,
    encode_text,
    relevant,
    similarity_word,
    token_count,
)
from tinyalign.runtime.sampling import Sampling, pick

Floats = NDArray[np.float32]
MAX_TOKENS = 128
ANSWER_RESERVE = 16  # tokens of the context kept free for the answer
LEAST_CAPACITY = 256  # tokens of a key/value cache: 12 MB, used again for the next question
KEPT_PICTURES = 16  # encoded ones, of 70 kB each: a second question need not look again
ENCODE_BATCH = 4  # pictures; more are no faster, and slower beside other work (benchmarks/add.py)


class TinyAlign:
    """A loaded model with its banks. Threads may share one."""

    def __init__(self, parts: Parts, banks: Sequence[MemoryBank], load_ms: float = 0.0) -> None:
        self._parts = parts
        self._banks = tuple(banks)
        self._compressor: ort.InferenceSession | None = None
        self._opening = threading.Lock()
        self._seen: OrderedDict[str, EncodedPicture] = OrderedDict()  # the last ones, by pixel hash
        self._seeing = threading.Lock()
        self._spare: LmState | None = None  # the last answer's cache: the next may begin alike
        self._model_id = hashlib.sha256(parts.manifest.to_json().encode()).hexdigest()
        self.load_ms = load_ms

    @classmethod
    def load(
        cls,
        path: str | Path | Loading | None = None,
        threads: int | None = None,
        banks: Sequence[str | Path] | None = None,
        lm: bool = True,
        provider: str = "cpu",
    ) -> TinyAlign:
        """Open a model directory ($TINYALIGN_MODEL or the cache's, if none is named), or go on with
        one that ``start_loading`` began to open.

        ``threads`` defaults to the CPUs this process may use. ``banks`` are bank files, or
        addresses in Qdrant ("qdrant://host:port/collection"), that replace the model's own, which
        is called "default"; an empty list means none.
        Without ``lm`` the language model is opened at the first question only: teaching needs none.
        ``provider`` is the one of onnxruntime that runs the graphs, such as "cuda" or "coreml"; the
        CPU runs what it has no kernels for (``placement_lines`` tells). Raises ModelError,
        BankError or InputError with one clear line.
        """
        loading = path if isinstance(path, Loading) else start_loading(path, threads, lm, provider)
        parts = finish_loading(loading, lm)
        with ExitStack() as opened:
            names = (["default"] if parts.memory else []) if banks is None else banks
            open_banks = [opened.enter_context(_open_bank(parts, name)) for name in names]
            opened.pop_all()
        return cls(parts, open_banks, _ms(loading.started))

    @property
    def parts(self) -> Parts:
        """The opened model directory: manifest, tokenizer, sessions."""
        return self._parts

    @property
    def banks(self) -> tuple[MemoryBank, ...]:
        """The banks in use."""
        return self._banks

    def close(self) -> None:
        """Close the banks."""
        for bank in self._banks:
            bank.close()

    def __enter__(self) -> TinyAlign:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def encode(self, image: Picture | EncodedPicture) -> EncodedPicture:
        """Look at a picture once; the result can be asked about again and again."""
        if isinstance(image, EncodedPicture):
            if image.model != self._model_id:
                raise InputError("the picture was encoded by another model")
            return image
        return self._see([self._pixels(image)])[0]

    def encode_many(self, images: Sequence[Picture]) -> list[EncodedPicture]:
        """Look at many pictures: the same as ``encode`` of each, bit for bit, but faster.

        They are read side by side and go through the encoder in batches. PictureError if one of
        them cannot be read.
        """
        with ThreadPoolExecutor(self._parts.threads) as pool:
            pixels = list(pool.map(self._pixels, images))
        return self._see(pixels)

    def key(self, image: Picture | EncodedPicture, question: str | None = None) -> Floats:
        """What the banks are searched with, f32 [Dk]: picture and question, or picture alone."""
        parts = self._parts
        ids = () if question is None else encode_question(parts.tokenizer, question)
        words = mean_embedding(ids, parts.embeddings)
        return make_key(self.encode(image).pooled, words, parts.keys)

    def retrieve(
        self,
        image: Picture | EncodedPicture,
        question: str,
        top_k: int | None = None,
        where: Mapping[str, str | int | float | bool] | None = None,
    ) -> list[Hit]:
        """The memories an answer would rest on, nearest first.

        At most ``top_k``; none below its bank's score floor, which is the model's own where a bank
        has none; and none that is far behind the best (``PromptSpec.margin``).
        """
        prompt = self._parts.manifest.prompt
        if top_k is not None and top_k < 1:
            raise InputError(
                f"top-k must be 1 or more, not {top_k} (no memory at all: --no-memory)"
            )
        if not self._banks:
            return []
        count, key = top_k or prompt.top_k, self.key(image, question)
        near: list[Hit] = []
        for bank in self._banks:
            floor = bank.score_floor
            hits = bank.search(key, count, where)
            near += [h for h in hits if similarity_word(prompt, h.score, floor) is not None]
        near = sorted(near, key=lambda hit: -hit.score)[:count]
        return near[: relevant(prompt, [hit.score for hit in near])]

    def ask(
        self,
        image: Picture | EncodedPicture,
        question: str,
        *,
        memory: bool = True,
        memory_mode: MemoryMode | None = None,
        top_k: int | None = None,
        where: Mapping[str, str | int | float | bool] | None = None,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        drafts: bool = True,
    ) -> Answer:
        """Answer a question about a picture (path, bytes, PIL image, array, or an encoded one).

        Greedy unless ``temperature`` is above 0. ``memory=False`` asks without the banks;
        ``memory_mode`` says as what the language model reads the memories (the model's own mode
        unless given); ``where`` keeps only memories with that metadata; ``drafts=False`` decodes
        one token at a time, which gives the same answer later. Raises PictureError,
        QuestionError or InputError, all of them InputError, with one clear line.
        """
        return self.stream(
            image,
            question,
            memory=memory,
            memory_mode=memory_mode,
            top_k=top_k,
            where=where,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            drafts=drafts,
        ).answer

    def ask_many(
        self, items: Sequence[tuple[Picture | EncodedPicture, str]], **options: Any
    ) -> list[Answer]:
        """``ask`` for many (picture, question) pairs, with its options: the same answers, in less
        time, because pictures go through the encoder in batches and each only once."""
        pictures = [image for image, _ in items if not isinstance(image, EncodedPicture)]
        encoded = iter(self.encode_many(pictures))
        return [
            self.ask(
                image if isinstance(image, EncodedPicture) else next(encoded), question, **options
            )
            for image, question in items
        ]

    def stream(
        self,
        image: Picture | EncodedPicture,
        question: str,
        *,
        memory: bool = True,
        memory_mode: MemoryMode | None = None,
        top_k: int | None = None,
        where: Mapping[str, str | int | float | bool] | None = None,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        drafts: bool = True,
    ) -> AnswerStream:
        """Like ``ask``, but gives the answer piece by piece; work starts with the first piece."""
        sampling = Sampling(temperature, top_p, seed)
        if max_tokens < 1:
            raise InputError(f"max-tokens must be 1 or more, not {max_tokens}")
        if top_k is not None and top_k < 1:
            raise InputError(
                f"top-k must be 1 or more, not {top_k} (no memory at all: --no-memory)"
            )
        mode = memory_mode or self._parts.manifest.prompt.memory_mode
        if mode not in get_args(MemoryMode):
            raise InputError(f"the memory mode is latent, text or both, not {mode!r}")
        self._check_room(question, (), (), max_tokens)
        wanted = (top_k, where) if memory else None
        return AnswerStream(
            self._answer(image, question, wanted, mode, max_tokens, sampling, drafts)
        )

    def memory(
        self,
        image: Picture | EncodedPicture,
        text: str,
        source: str = "",
        metadata: Mapping[str, str | int | float | bool] | None = None,
    ) -> NewMemory:
        """A memory of a picture and its text, ready for ``Bank.add``.

        Raises InputError for an empty text or one longer than the compressor takes.
        """
        ids = self.check_text(text)
        small = None
        if not isinstance(image, EncodedPicture):
            image = load_for(image, self._parts.manifest.image)
            small = thumbnail(image)
        seen = self.encode(image)
        latents = self._compress(text, seen.cells)
        key = make_key(seen.pooled, mean_embedding(ids, self._parts.embeddings), self._parts.keys)
        digest = content_hash(bytes.fromhex(seen.pixel_hash), text.strip())
        return NewMemory(key, latents, text.strip(), source, dict(metadata or {}), small, digest)

    def retold(self, memory: Memory, text: str) -> NewMemory:
        """A stored memory with another text; its picture is not needed. Raises InputError."""
        spec = self._parts.manifest.vision
        ids = self.check_text(text)
        latents = self._compress(text, np.zeros((spec.cells, spec.width), np.float32))
        latents[0] = memory.latents[0]  # the picture's, in every compressor
        words = mean_embedding(ids, self._parts.embeddings)
        if words is None:
            raise InputError("the text is empty: a memory needs a text")
        key = retold_key(memory.key, words, self._parts.keys)
        kept = (memory.source, memory.metadata, memory.thumbnail)
        return NewMemory(key, latents, text.strip(), *kept)

    def content_hash(self, image: Picture, text: str) -> str:
        """The hash that ``memory`` gives, without looking at the picture as the model does."""
        digest = hashlib.sha256(self._pixels(image).tobytes()).digest()
        return content_hash(digest, text.strip())

    def check_text(self, text: str) -> tuple[int, ...]:
        """The tokens of a memory's text; InputError if it is empty or the compressor's too long."""
        limit = self._parts.manifest.memory.max_text_tokens
        ids = encode_text(self._parts.tokenizer, valid_text(text, "text").strip())
        if not ids:
            raise InputError("the text is empty: a memory needs a text")
        if len(ids) > limit:
            rest = self._parts.tokenizer.decode(ids[limit:]).strip()[:60]
            raise InputError(
                f"the text is {len(ids)} tokens long, a memory holds {limit}: too much is {rest!r}"
            )
        return tuple(ids)

    def _pixels(self, image: Picture) -> NDArray[np.uint8]:
        """A picture as the encoder sees it, u8 [S, S, 3]."""
        spec = self._parts.manifest.image
        return resize(load_for(image, spec), spec)

    def _see(self, pictures: Sequence[NDArray[np.uint8]]) -> list[EncodedPicture]:
        """Pictures as pixels, encoded; those that were seen lately are not encoded again."""
        hashes = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
        by_hash = dict(zip(hashes, pictures, strict=True))
        with self._seeing:
            seen = {name: self._seen[name] for name in by_hash if name in self._seen}
        new = [name for name in by_hash if name not in seen]
        for start in range(0, len(new), ENCODE_BATCH):
            part = new[start : start + ENCODE_BATCH]
            looked = self._look({name: by_hash[name] for name in part})
            seen |= dict(zip(part, looked, strict=True))
        with self._seeing:
            for name in hashes:
                self._seen[name] = seen[name]
                self._seen.move_to_end(name)
            while len(self._seen) > KEPT_PICTURES:
                self._seen.popitem(last=False)
        return [seen[name] for name in hashes]

    def _look(self, pictures: Mapping[str, NDArray[np.uint8]]) -> list[EncodedPicture]:
        """One batch of pixels, by their hashes, through vision encoder and connector."""
        parts, spec = self._parts, self._parts.manifest.image
        pixels = np.stack([normalise(p, spec) for p in pictures.values()])  # [B, 3, S, S]
        cells = _run(parts.vision, ["cells"], pixels=pixels)[0]
        cells.flags.writeable = False
        encoded, words = [], parts.manifest.connector.words
        for name, one in zip(pictures, cells, strict=True):
            # One by one: the int8 connector rounds one row otherwise than several.
            outputs = ["image_tokens", "token_ids"][: 1 + words]
            (tokens,), *rest = _run(parts.connector, outputs, cells=one[None])
            ids = rest[0][0] if words else np.zeros(0, np.int64)
            tokens.flags.writeable = ids.flags.writeable = False
            encoded.append(EncodedPicture(one, tokens, ids, name, self._model_id))
        return encoded

    def _compress(self, text: str, cells: Floats) -> Floats:
        """Latents f32 [l, d] of a text and cells [C, Dv], without the unused rest."""
        parts, spec = self._parts, self._parts.manifest.memory
        width = parts.manifest.lm.width
        read = self._read_memory(text)
        words = np.zeros((1, spec.max_text_tokens, width), np.float32)  # [1, N, D]
        members = np.zeros((1, spec.chunks, spec.max_text_tokens), np.float32)
        words[0, : len(read.ids)] = parts.embeddings[list(read.ids)]
        for row, span in zip(members[0], read.members, strict=False):
            row[span.start : span.stop] = 1
        with self._opening:
            if self._compressor is None:
                path = graph_path(parts.directory, parts.manifest, "compressor")
                self._compressor = open_session(path, parts.threads, provider=parts.provider)
        inputs = {"token_embeddings": words, "members": members, "cells": cells[None]}
        latents: Floats = _run(self._compressor, ["latents"], **inputs)[0][0]
        return latents[: 1 + len(read.chunks)]

    def _read_memory(self, text: str) -> MemoryText:
        """The tokens of a memory's text and their chunks."""
        spec = self._parts.manifest.memory
        return read_memory(self._parts.tokenizer, text, spec.max_text_tokens, spec.chunks)

    def _answer(
        self,
        image: Picture | EncodedPicture,
        question: str,
        wanted: tuple[int | None, Mapping[str, str | int | float | bool] | None] | None,
        mode: MemoryMode,
        max_tokens: int,
        sampling: Sampling,
        drafts: bool,
    ) -> Generator[str, None, Answer]:
        parts, context = self._parts, self._parts.manifest.lm.context
        started = time.perf_counter()
        picture = self.encode(image)
        encoded = time.perf_counter()
        hits = self.retrieve(picture, question, *wanted) if wanted else []
        retrieved = time.perf_counter()

        texts = [self._read_memory(hit.text) for hit in hits]
        sentences = [sentence for text in texts for sentence in text.to_copy()]
        bonus = parts.manifest.prompt.copy_bonus
        tokens = self._memory_tokens(hits, texts, mode)
        segments = self._check_room(question, hits, tokens, max_tokens)
        rows = embed(segments, parts.embeddings, picture.image_tokens, tokens)  # [N, D]
        limit = min(max_tokens, context - len(rows) - 1)  # decoding reads one token ahead
        state = self._take_state(len(rows) + limit + 1)
        reused = state.keep_common(rows)
        random = sampling.generator()
        logits = parts.lm.forward(state, rows[reused:])[0]
        if hits and mode != "latent" and (margin := parts.manifest.prompt.unknown_margin):
            logits[self._unknown] -= margin
        token = pick(logits, sampling, random)  # nothing to copy yet
        prefilled = time.perf_counter()

        def choose(logits: Floats, answer: Sequence[int]) -> int:
            add_copy_bonus(logits, answer, sentences, bonus)
            return pick(logits, sampling, random)

        runs = continue_answer(
            parts.lm, state, parts.embeddings, token, choose, parts.stop_ids, limit,
            self._guesses(picture, sentences) if drafts else None,
            parts.next_tokens if drafts else None,
        )  # fmt: skip
        ids: list[int] = []
        text = ""
        decode_ms, steps = 0.0, 0
        decoder = DecodeStream(skip_special_tokens=True)
        new: list[int] | None = [token]
        while new:
            for token in new:
                if token in parts.stop_ids:
                    break
                ids.append(token)
                piece = decoder.step(parts.tokenizer, token)
                if piece:
                    text += piece
                    yield piece
            step = time.perf_counter()
            new = next(runs, None)
            decode_ms += _ms(step)
            steps += bool(new)
        self._spare = state
        rest = parts.tokenizer.decode(ids, skip_special_tokens=True)[len(text) :]
        if rest:  # bytes of a character that never became whole
            yield rest
        timings = Timings(
            encode=1e3 * (encoded - started),
            retrieve=1e3 * (retrieved - encoded),
            prefill=1e3 * (prefilled - retrieved),
            decode=decode_ms,
            first_token=1e3 * (prefilled - started),
        )
        finish: Literal["stop", "length"] = "stop" if token in parts.stop_ids else "length"
        return Answer(
            text + rest, tuple(hits), timings, len(ids), tuple(ids), len(rows), finish, steps,
            reused,
        )  # fmt: skip

    @cached_property
    def _phrases(self) -> list[tuple[int, ...]]:
        """What answers often say, in tokens."""
        tokenizer, prompt = self._parts.tokenizer, self._parts.manifest.prompt
        return [encode_template(tokenizer, phrase) for phrase in prompt.phrases]

    @cached_property
    def _unknown(self) -> int:
        """The first token of "I do not know."."""
        return encode_text(self._parts.tokenizer, self._parts.manifest.prompt.unknown)[0]

    def _guesses(
        self, picture: EncodedPicture, sentences: Sequence[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        """What an answer may say: the memories' sentences, the picture's name, usual phrases."""
        parts, prompt = self._parts, self._parts.manifest.prompt
        end = parts.tokenizer.token_to_id(prompt.stop[0])
        guesses = [(*sentence, end) for sentence in sentences]
        slots = next((piece for piece in prompt.image if isinstance(piece, int)), 0)
        article, other, stop = (encode_text(parts.tokenizer, text) for text in (" a", " an", "."))
        name = tuple(picture.token_ids[:slots].tolist())
        while name[:1] == tuple(article):  # the name stands at the end of its slots
            name = name[1:]
        if name:
            guesses += [(*start, *name, *stop, end) for start in (article, other)]
        return guesses + self._phrases

    def _take_state(self, tokens: int) -> LmState:
        """The last answer's key/value cache, if it is large enough, or a new one.

        Who takes it has it alone; it is given back at the end of the answer.
        """
        with self._seeing:
            state, self._spare = self._spare, None
        if state is None or state.capacity < tokens:
            state = self._parts.lm.new_state(max(tokens, LEAST_CAPACITY))
        return state

    def _check_room(
        self, question: str, hits: Sequence[Hit], tokens: Sequence[Floats], max_tokens: int
    ) -> tuple[Segment, ...]:
        """The prompt; raises QuestionError if it leaves no room for an answer."""
        parts, manifest = self._parts, self._parts.manifest
        words = [similarity_word(manifest.prompt, hit.score, -1.0) or "" for hit in hits]
        segments = build_prompt(manifest.prompt, parts.tokenizer, question, words)
        length = token_count(segments, [len(rows) for rows in tokens])
        own = len(encode_question(parts.tokenizer, question))
        room = manifest.lm.context - min(max_tokens, ANSWER_RESERVE) - (length - own)
        if own > room:
            raise QuestionError(
                f"the question is {own} tokens long; {max(room, 0)} fit beside the picture"
                f"{' and its memories' if hits else ''} (context {manifest.lm.context})"
            )
        return segments

    def _memory_tokens(
        self, hits: Sequence[Hit], texts: Sequence[MemoryText], mode: MemoryMode
    ) -> list[Floats]:
        """LM tokens [m, D] of every hit: from its latents, its text, or both."""
        table = self._parts.embeddings
        written = [table[list(text.ids)].astype(np.float32) for text in texts]
        if mode == "text" or not hits:
            return written
        latent = self._latent_tokens(hits)
        if mode == "latent":
            return latent
        return [np.concatenate(pair) for pair in zip(latent, written, strict=True)]

    def _latent_tokens(self, hits: Sequence[Hit]) -> list[Floats]:
        """LM tokens [m, D] of every hit, through the RAG connector in one run."""
        spec = self._parts.manifest.memory
        latents = np.zeros((len(hits), spec.latents, spec.width), np.float32)  # [K, L, d]
        for row, hit in zip(latents, hits, strict=True):
            if hit.latents.shape[0] > spec.latents or hit.latents.shape[1] != spec.width:
                raise InputError(f"memory {hit.id} of {hit.bank} has latents of another size")
            row[: len(hit.latents)] = hit.latents
        tokens, keep = _run(self._parts.rag_connector, ["memory_tokens", "keep"], latents=latents)
        return [rows[kept] for rows, kept in zip(tokens, keep, strict=True)]


def _open_bank(parts: Parts, name: str | Path) -> MemoryBank:
    """Open a bank for reading and bring its keys into memory, so that no question waits for it."""
    if parts.memory is None:
        raise no_memory(parts.manifest.name)
    own = str(name) == "default"
    place = parts.directory / DEFAULT_BANK if own else name
    label = "default" if own else ""
    bank = open_bank(place, parts.manifest.fingerprint, read_only=True, label=label)
    try:
        bank.search(np.eye(1, bank.key_width, dtype=np.float32)[0], 1)
    except BaseException:
        bank.close()
        raise
    return bank


def _run(
    session: ort.InferenceSession, outputs: list[str], **inputs: NDArray[np.generic]
) -> list[NDArray[np.generic]]:
    values: list[NDArray[np.generic]] = session.run(outputs, inputs)
    return values


def _ms(since: float) -> float:
    return 1e3 * (time.perf_counter() - since)
