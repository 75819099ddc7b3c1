"""The prompt of somebody else's vision-language model, from its own chat template, in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import PromptSpec
from tinyalign.runtime.prompt import TokenSegment, build_prompt
from tinyalign.training.models.chat_template import TEXTS
from tinyalign.training.models.checkpoint import in_one_line

QUESTION = "What is in the picture"
FLOORS = (("close", 0.0),)  # a model without a memory uses none


@dataclass(frozen=True)
class Marks:
    """How a picture stands in a prompt's text.

    `picture` is the token that is written once in its place, `left` and `right` what the model's
    processor puts around it. `listed`: the template takes a message's parts as a list.
    """

    picture: str
    left: str = ""
    right: str = ""
    listed: bool = True


def read_prompt(
    directory: Path, whole: Any, marks: Marks, tokenizer: Tokenizer, tokens: int
) -> PromptSpec:
    """One picture and one question as the model's chat template puts them.

    Raises InputError where the pieces give other tokens than the whole.
    """
    text = rendered(whole, marks, QUESTION)
    if text.count(marks.picture) != 1 or text.count(QUESTION) != 1:
        raise InputError(
            f"{directory}: the chat template does not hold a picture and a question once"
        )
    before, after = text.split(marks.picture)
    if QUESTION not in after:
        raise InputError(f"{directory}: the chat template puts the picture behind the question")
    between, end = after.split(QUESTION)
    if starts_with_bos(whole) and not before.startswith(whole.bos_token):
        before = whole.bos_token + before
    spec = PromptSpec(
        system=before + marks.left,
        image=(tokens,),
        memory="",
        memory_end="",
        question=marks.right + between + "{question}" + end,
        similarity=FLOORS,
        stop=stop_tokens(directory, whole),
        memory_mode="text",
        unknown="",
    )
    check_prompt(directory, spec, tokenizer, whole, marks)
    return spec


def starts_with_bos(whole: Any) -> bool:
    """Whether the tokenizer puts its first token before every text."""
    return whole.bos_token is not None and whole("x").input_ids[:1] == [whole.bos_token_id]


def rendered(whole: Any, marks: Marks, question: str) -> str:
    """The chat template's text for one picture and a question."""
    content: Any = marks.picture + question
    if marks.listed:
        content = [{"type": "image"}, {"type": "text", "text": question}]
    try:
        text: str = whole.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template can raise anything
        raise InputError(f"the chat template cannot be used: {error}") from None
    return text


def stop_tokens(directory: Path, whole: Any) -> tuple[str, ...]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's own."""
    ids = [whole.eos_token_id]
    if (directory / "generation_config.json").is_file():
        with in_one_line(directory):
            named: Any = GenerationConfig.from_pretrained(directory).eos_token_id
        ids = [*(named if isinstance(named, list) else [named]), *ids]
    known = dict.fromkeys(i for i in ids if i is not None)
    if not known:
        raise InputError(f"{directory} names no token that ends an answer (eos_token_id)")
    return tuple(whole.convert_ids_to_tokens(list(known)))


def check_prompt(
    directory: Path, spec: PromptSpec, tokenizer: Tokenizer, whole: Any, marks: Marks
) -> None:
    """Compare the pieces' tokens with those of the whole text, for several questions."""
    picture = whole.convert_tokens_to_ids(marks.picture)
    special = [t.content for t in whole.added_tokens_decoder.values() if t.special]
    for question in (t.strip() for t in TEXTS if not any(token in t for token in special)):
        text = rendered(whole, marks, question)
        text = text.replace(marks.picture, f"{marks.left}{marks.picture}{marks.right}")
        expected = whole(text).input_ids
        found: list[int] = []
        for segment in build_prompt(spec, tokenizer, question):
            found += segment.ids if isinstance(segment, TokenSegment) else (picture,)
        if found != expected:
            raise InputError(
                f"{directory}: the chat template cannot be written in pieces: the tokens of "
                f"{question!r} depend on what stands beside them"
            )
