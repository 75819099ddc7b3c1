"""The tokenizer of a GGUF file: byte-level BPE whose words are cut as the model's family does.

A GGUF file holds the vocabulary and the merges; how a text is cut into words before that, it only
names (`tokenizer.ggml.pre`). What each name here means is published with the models, in their
tokenizer.json.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tinyalign.bank.errors import InputError
from tinyalign.training.gguf_reader import ELSEWHERE, GgufFile

KINDS = (TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)  # cuts with GPT-2's regex


@dataclass(frozen=True)
class PreType:
    """What happens to a text before its words are merged."""

    steps: tuple[Any, ...]  # pre-tokenizers, the last of which maps bytes to letters
    normalizer: Any = None
    whole_words: bool = False  # a word of the vocabulary is one token, whatever the merges make


def words(number: str) -> Any:
    """Cuts into words with the letter, blank or sign before them, numbers, signs and blanks.

    `number`: the regex of what is kept together of a number.
    """
    return pre_tokenizers.Split(
        Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            + number
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        behavior="isolated",
    )


LLAMA3 = PreType((words(r"\p{N}{1,3}"), BYTES), whole_words=True)
PRE_TYPES = {
    "smollm": PreType((pre_tokenizers.Digits(individual_digits=True), GPT2)),
    "gpt-2": PreType((GPT2,)),
    "qwen2": PreType((words(r"\p{N}"), BYTES), normalizers.NFC()),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
}
"""By the name in `tokenizer.ggml.pre`."""


def read_pre_type(file: GgufFile) -> PreType:
    """How the file's tokenizer cuts a text; InputError when that is not known exactly."""
    model, pre = (file.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != "gpt2" or pre not in PRE_TYPES:
        raise InputError(
            f"{file.path}: of GGUF files only the tokenizers {', '.join(PRE_TYPES)} are read "
            f"exactly, not {(pre if model == 'gpt2' else model)!r}: {ELSEWHERE}"
        )
    return PRE_TYPES[pre]


def tokenizer_of(file: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF file, its control tokens special; nothing is added to a text.

    Raises InputError for another kind of tokenizer, or where the file contradicts itself.
    """
    pre_type = read_pre_type(file)
    tokens: list[str] = file.field("tokenizer.ggml.tokens")
    kinds: list[int] = file.field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    check_tokens(file, tokens, kinds)
    used = {t: i for i, t in enumerate(tokens) if kinds[i] != TokenType.UNUSED}  # not "[PAD7]"
    try:
        model = models.BPE(vocab=used, merges=merges, ignore_merges=pre_type.whole_words)
    except Exception as error:  # the library raises nothing narrower
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{file.path}: its merges cannot be used: {said}") from None
    tokenizer = Tokenizer(model)
    if pre_type.normalizer is not None:
        tokenizer.normalizer = pre_type.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(pre_type.steps))
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [t for t, of in zip(tokens, kinds, strict=True) if of == kind]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(t, normalized=False, special=special) for t in added])
    return tokenizer


def check_tokens(file: GgufFile, tokens: list[str], kinds: list[int]) -> None:
    """Raises InputError where a vocabulary is no list of different tokens of known kinds."""
    if len(tokens) != len(kinds):
        raise InputError(f"{file.path}: {len(tokens)} tokens, but the kinds of {len(kinds)}")
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise InputError(f"{file.path}: tokens of the kind {unknown[0]} are not read: {ELSEWHERE}")
    token, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        raise InputError(f"{file.path}: the token {token!r} is there {times} times")
