"""A chat as a language model was trained to read it: a tokenizer's chat template as plain data.

A chat template is a program that writes a conversation as one text. What it writes *between* the
messages depends, in nearly all templates, only on who speaks before and after that place. So eight
texts say all of it, and no template engine is needed to write a conversation.
training/models/chat_template.py finds these texts and checks them; docs/chat-templates.md says for
which families they are enough.

    before_system S1 system_to_user U1 user_to_assistant A1 assistant_to_user U2 user_to_answer
    before_user   U1 user_to_assistant A1 after_assistant

The texts may hold special tokens such as ``<|im_start|>``; in a message they are only letters, so
nobody can end a turn or begin another one by writing its tokens. The tokenizer's own
``apply_chat_template`` takes them for the tokens: here the two differ, and are meant to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import Between, ChatTemplate
from tinyalign.runtime.prompt import encode_text

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """What one side says. A conversation is a system message or none, then user and assistant in
    turns, the user first."""

    role: Role
    text: str


@dataclass(frozen=True)
class Said:
    """The text of a message among the pieces of a template (which are plain strings)."""

    text: str


Piece: TypeAlias = str | Said


def render(
    template: ChatTemplate, messages: Sequence[Message], generation: bool = True
) -> tuple[Piece, ...]:
    """A conversation as pieces, template text and messages in turns.

    `generation`: the model is to answer; then the last message must be the user's.

    Raises InputError for messages that the template has no place for, and for empty ones.
    """
    roles = [message.role for message in messages]
    check_order(template, roles, generation)
    before = template.before_system if roles[0] == "system" else template.before_user
    pieces: list[Piece] = [before.text]
    for message, following in zip(messages, [*roles[1:], None], strict=True):
        text = message.text
        if not text.strip():
            raise InputError(f"a message of the {message.role} is empty")
        after = between(template, message.role, following, generation)
        text = text.lstrip() if before.rstrip else text
        pieces += [Said(text.rstrip() if after.lstrip else text), after.text]
        before = after
    return tuple(pieces)


def check_order(template: ChatTemplate, roles: Sequence[Role], generation: bool) -> None:
    """Raises InputError for an order of messages that no conversation has."""
    if roles[:1] == ["system"] and template.no_system:
        raise InputError(f"this model takes no system message: {template.no_system}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * len(turns)
    if not turns or list(turns) != expected[: len(turns)]:
        raise InputError(
            "a conversation is a system message or none, then user and assistant in turns, the "
            f"user first; this one is {', '.join(roles) or 'empty'}"
        )
    if generation and roles[-1] != "user":
        raise InputError("the last message must be the user's for the model to answer it")


def between(
    template: ChatTemplate, role: Role, following: Role | None, generation: bool
) -> Between:
    """What stands behind a message of `role`; `following` is who speaks next."""
    if role == "system":
        return template.system_to_user
    if role == "assistant":
        return template.assistant_to_user if following else template.after_assistant
    if following:
        return template.user_to_assistant
    return template.user_to_answer if generation else template.after_user


def encode(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[int, ...]:
    """Token ids of a rendered conversation.

    Special tokens of template pieces become their ids. All between two of them, letters of the
    template and messages, is tokenized in one go, as the tokenizer itself does it: "user\\n" and a
    message that begins with spaces give other tokens one by one.
    """
    special = {t.content: t for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    longest_first = sorted(special, key=len, reverse=True)
    cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if special else None
    ids: list[int] = []
    run = ""
    first, strip_left = True, False
    for piece in pieces:
        if isinstance(piece, Said):
            run += piece.text
            continue
        for part in cut.split(piece) if cut else [piece]:
            if part not in special:
                run += part
                continue
            # some special tokens take the white space beside them
            run = run.lstrip() if strip_left else run
            ids += encode_run(tokenizer, run.rstrip() if special[part].lstrip else run, first)
            ids.append(tokenizer.token_to_id(part))
            run, first, strip_left = "", False, special[part].rstrip
    return (*ids, *encode_run(tokenizer, run.lstrip() if strip_left else run, first))


def encode_run(tokenizer: Tokenizer, text: str, first: bool) -> tuple[int, ...]:
    """Token ids of the text between two special tokens; `first`: nothing stands before it."""
    if first:
        return encode_text(tokenizer, text)
    with without_prefix(tokenizer):
        return encode_text(tokenizer, text)


@contextmanager
def without_prefix(tokenizer: Tokenizer) -> Iterator[None]:
    """Some tokenizers put a space before what a text begins with, but only there."""
    splitter = tokenizer.pre_tokenizer
    if not isinstance(splitter, Metaspace) or splitter.prepend_scheme != "first":
        yield
        return
    splitter.prepend_scheme = "never"
    try:
        yield
    finally:
        splitter.prepend_scheme = "first"


def question_pieces(template: ChatTemplate, system: str = "") -> tuple[str, str]:
    """What stands before and after the only question of a conversation, as two texts."""
    messages = [Message("user", "?")]
    if system:
        messages = [Message("system", system), *messages]
    *before, question, after = render(template, messages)
    assert question == Said("?") and isinstance(after, str)
    return "".join(p.text if isinstance(p, Said) else p for p in before), after
