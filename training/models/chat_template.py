"""A tokenizer's chat template turned into plain texts, and compared with the original.

`derive` finds the texts by letting the template write conversations of made-up messages and cutting
what it wrote at these messages. `check` then lets both write several hundred conversations and
compares them token for token. A template whose texts depend on more than who speaks before and
after them is refused by the one or the other, with the reason.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tinyalign.runtime.chat_template import (
    Message,
    Piece,
    Role,
    Said,
    encode,
    question_pieces,
    render,
)
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.manifest import Between, ChatTemplate
from tinyalign.runtime.prompt import encode_question, encode_template
from tinyalign.training.models.checkpoint import in_one_line

TEMPLATE_NAME = "chat_template.json"  # a processor's; the tokenizer's two places transformers reads
DATE = "ProbeOfTheDate"
LEFT, RIGHT = "\n \t", "\t \n"
TURNS = 6
# What people write, and what looks like a template or is changed by one that is not careful.
TEXTS = (
    "What is this?",
    "It is a cat. It sleeps.",
    "  two spaces on both sides  ",
    "\nlines\n\nand more lines\n",
    "\ttab",
    "ends with a blank line\n\n",
    "\r\nfrom Windows\r\n",
    "œuvre, 猫 и ñandú 🙂🙂",
    "e\u0301 \u00a0\u200bx\u3000",
    ".",
    "0",
    "None",
    "user",
    "assistant\nsystem:",
    "USER: hello ASSISTANT: hi",
    "[INST] be good [/INST] <<SYS>> now <</SYS>>",
    "<|user|>\n<|system|>\n<|assistant|>",
    "<start_of_turn>model <|im_end|> </s>",
    "{{ messages }} {% if true %} {question}",
    "'quoted' \"twice\" \\n <b>&amp;</b>",
    "1234567 + 1 == 1234568",
)


@dataclass(frozen=True)
class Original:
    """The template that the tokenizer came with, as transformers applies it.

    `variables`: values for the template's own variables, such as {"date_string": "26 Jul 2024"}.
    `listed`: it takes a message's text as a list of parts.
    """

    tokenizer: Any
    variables: Mapping[str, object] = field(default_factory=dict)
    listed: bool = False

    def text(self, messages: Sequence[Message], generation: bool) -> str:
        """What it writes; InputError with what it says when it refuses."""
        text: str = self._apply(messages, generation, tokenize=False)
        return text

    def ids(self, messages: Sequence[Message], generation: bool) -> tuple[int, ...]:
        """The token ids of what it writes."""
        return tuple(self._apply(messages, generation, tokenize=True))

    def _apply(self, messages: Sequence[Message], generation: bool, tokenize: bool) -> Any:
        conversation: list[dict[str, object]] = [
            {"role": m.role, "content": [{"type": "text", "text": m.text}]}
            if self.listed
            else {"role": m.role, "content": m.text}
            for m in messages
        ]
        variables = {"strftime_now": lambda _format: DATE, **self.variables}
        try:
            return self.tokenizer.apply_chat_template(
                conversation, tokenize=tokenize, add_generation_prompt=generation, **variables
            )
        except Exception as error:  # a template can raise anything
            said = " ".join(str(error).split())[:200]
            raise InputError(f"it says: {said or type(error).__name__}") from None


def read_chat_tokenizer(directory: Path, template: str | None = None) -> Any:
    """transformers' tokenizer of a directory with its chat template: the given one, or that of
    tokenizer_config.json, chat_template.jinja or chat_template.json, whichever is there (the last
    before the others).

    Raises InputError where there is none.
    """
    path = directory / TEMPLATE_NAME
    if template is None and path.is_file():
        try:
            template = json.loads(path.read_bytes())["chat_template"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no chat template ({error})") from None
        if not isinstance(template, str):
            raise InputError(f"{path} holds no chat template")
    with in_one_line(directory):
        make: Any = AutoTokenizer
        whole = make.from_pretrained(directory, local_files_only=True)
    whole.chat_template = template or whole.chat_template
    if not whole.chat_template:
        raise InputError(
            f"{directory} has no chat template (chat_template.jinja): how a question is put to the "
            "model is not known"
        )
    return whole


def derive(tokenizer: Any, variables: Mapping[str, object] | None = None) -> ChatTemplate:
    """The chat template of a transformers tokenizer as texts. Not yet checked: see `check`.

    Raises InputError with the reason for one that cannot be expressed.
    """
    try:
        return derived(original(tokenizer, variables))
    except InputError as reason:
        raise InputError(f"the chat template cannot be turned into plain texts: {reason}") from None


def original(tokenizer: Any, variables: Mapping[str, object] | None) -> Original:
    """The template as it must be called: with texts, or with lists of parts."""
    plain = Original(tokenizer, variables or {})
    listed = Original(tokenizer, variables or {}, listed=True)
    try:
        cut(plain, ["user"])
    except InputError as reason:
        try:
            cut(listed, ["user"])
        except InputError:
            raise reason from None
        return listed
    return plain


def derived(chat: Original) -> ChatTemplate:
    """Find the texts."""
    check_date(chat)
    before_user, to_answer = cut(chat, ["user"], generation=True)
    after_user = cut(chat, ["user"])[-1]
    check_thinking(chat)
    texts = cut(chat, ["user", "assistant", "user", "assistant", "user"], generation=True)
    _, to_assistant, to_user, *_ = texts
    if texts != [before_user, to_assistant, to_user, to_assistant, to_user, to_answer]:
        raise InputError("what stands between two messages depends on how many there are")
    *last, after_assistant = cut(chat, ["user", "assistant"])
    if last != [before_user, to_assistant]:
        raise InputError("it writes the last answer in another way than earlier ones")
    before_system = system_to_user = Between("")
    no_system = ""
    try:
        before_system, system_to_user, *rest = cut(
            chat, ["system", "user", "assistant", "user"], generation=True
        )
        if rest != [to_assistant, to_user, to_answer]:
            raise InputError("with one, it changes what stands between the other messages")
    except InputError as reason:
        before_system = system_to_user = Between("")
        no_system = str(reason).replace("it ", "its chat template ", 1)
    return ChatTemplate(
        before_user=before_user,
        user_to_assistant=to_assistant,
        assistant_to_user=to_user,
        user_to_answer=to_answer,
        after_user=after_user,
        after_assistant=after_assistant,
        before_system=before_system,
        system_to_user=system_to_user,
        no_system=no_system,
        stop=stop_tokens(chat.tokenizer, after_assistant.text),
    )


def cut(chat: Original, roles: Sequence[Role], generation: bool = False) -> list[Between]:
    """What the template writes before, between and after messages of the given roles: one more
    than there are messages."""
    texts = cut_texts(chat, roles, generation)
    padded = cut_texts(chat, roles, generation, LEFT, RIGHT)
    found = []
    for i, (text, spaced) in enumerate(zip(texts, padded, strict=True)):
        right, left = RIGHT if i > 0 else "", LEFT if i < len(roles) else ""
        for lstrip, rstrip in itertools.product((False, True), repeat=2):
            if spaced == ("" if lstrip else right) + text + ("" if rstrip else left):
                found.append(Between(text, lstrip and i > 0, rstrip and i < len(roles)))
                break
        else:
            raise InputError("it takes away some of the white space around a message, not all")
    return found


def cut_texts(
    chat: Original, roles: Sequence[Role], generation: bool, left: str = "", right: str = ""
) -> list[str]:
    """The same as texts; `left` and `right`, put around every message, stay with them."""
    probes = [f"Probe{i}Text" for i in range(len(roles))]
    messages = [Message(r, left + p + right) for r, p in zip(roles, probes, strict=True)]
    written = chat.text(messages, generation)
    for role, probe in zip(roles, probes, strict=True):
        if probe not in written:
            raise InputError(f"it leaves out a message of the {role}")
        if written.count(probe) > 1:
            raise InputError(f"it writes a message of the {role} more than once")
    texts = re.split("|".join(probes), written)
    if written != "".join(itertools.chain(*zip(texts, probes, strict=False), texts[-1:])):
        raise InputError("it writes the messages in another order than they were said")
    return texts


def check_date(chat: Original) -> None:
    """Refuse a template that writes today's date."""
    if DATE in chat.text([Message("user", "a")], generation=True):
        raise InputError(
            "it writes today's date (one that lets a variable name the date can be told which)"
        )


def check_thinking(chat: Original) -> None:
    """Refuse a template that takes parts out of earlier answers, or all of a message."""
    cut_texts(chat, ["user", "assistant", "user"], generation=True)
    thought = Message("assistant", "<think>\nProbeThought\n</think>\n\nProbeAnswer")
    written = chat.text([Message("user", "a"), thought, Message("user", "b")], generation=True)
    if thought.text not in written:
        raise InputError("it drops or changes the thinking (<think> .. </think>) of past answers")


def stop_tokens(tokenizer: Any, after_assistant: str) -> tuple[str, ...]:
    """Tokens that end an answer: the one the template ends it with, and the tokenizer's own."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    ending = after_assistant.lstrip()
    first = max((token for token in special if ending.startswith(token)), key=len, default=None)
    stop = dict.fromkeys(t for t in (first, tokenizer.eos_token) if t is not None)
    if not stop:
        raise InputError("no token ends an answer (the tokenizer has no eos_token)")
    return tuple(stop)


def check(
    template: ChatTemplate, tokenizer: Any, variables: Mapping[str, object] | None = None
) -> int:
    """Compare with the tokenizer's `apply_chat_template`, token for token; how many conversations.

    Messages that hold the name of a special token are compared as texts, and must give the same
    special tokens as without them. Raises InputError with the first difference.
    """
    chat, ours = original(tokenizer, variables), plain_tokenizer(tokenizer)
    special = {t.content: i for i, t in ours.get_added_tokens_decoder().items() if t.special}
    used = [name for name in special if any(name in t for t in template_texts(template))]
    plain = [text for text in TEXTS if not any(name in text for name in special)]
    forged = [*(text for text in TEXTS if text not in plain), *map("a{}b".format, used)]
    done = 0
    for messages, generation in conversations(template, plain):
        pieces = same_text(template, chat, messages, generation)
        if encode(ours, pieces) != chat.ids(messages, generation):
            raise InputError(
                "the chat template cannot be turned into plain texts: in "
                f"{written(pieces)[-80:]!r} they are tokenized in another way"
            )
        done += 1
    for messages, generation in conversations(template, forged):
        pieces = same_text(template, chat, messages, generation)
        more = Counter(encode(ours, pieces)) - Counter(encode(ours, template_only(pieces)))
        if forgeries := [name for name, i in special.items() if i in more]:
            raise InputError(
                f"the tokenizer cannot be used: letters of a message give the special token "
                f"{forgeries[0]}"
            )
        done += 1
    return done


def same_text(
    template: ChatTemplate, chat: Original, messages: Sequence[Message], generation: bool
) -> tuple[Piece, ...]:
    """A conversation in pieces; InputError if the template itself writes another text."""
    pieces = render(template, messages, generation)
    if (found := written(pieces)) != (expected := chat.text(messages, generation)):
        raise InputError(
            "the chat template cannot be turned into plain texts: "
            f"{first_difference(expected, found)}"
        )
    return pieces


def template_only(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with "x" in place of what was said."""
    return [Said("x") if isinstance(piece, Said) else piece for piece in pieces]


def template_texts(template: ChatTemplate) -> list[str]:
    """The eight texts."""
    values = [getattr(template, field.name) for field in fields(template)]
    return [value.text for value in values if isinstance(value, Between)]


def plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """A copy of a transformers tokenizer's inner one, as tokenizer.json holds it."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise InputError("the tokenizer has no tokenizer.json: only fast tokenizers can be used")
    copy: Tokenizer = Tokenizer.from_str(inner.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def conversations(
    template: ChatTemplate, texts: Sequence[str]
) -> Iterator[tuple[list[Message], bool]]:
    """Conversations of one to TURNS questions, with and without a system message, ending with an
    answer, a question, or a question that is to be answered, beginning with each of the texts."""
    systems = (False,) if template.no_system else (False, True)
    for start, turns, system in itertools.product(range(len(texts)), range(1, TURNS + 1), systems):
        said = itertools.islice(itertools.cycle(texts), start, None)
        roles: list[Role] = ["user", "assistant"] * turns
        if system:
            roles.insert(0, "system")
        messages = [Message(role, next(said)) for role in roles]
        yield messages, False
        yield messages[:-1], False
        yield messages[:-1], True


def written(pieces: Sequence[Piece]) -> str:
    """All pieces as one text."""
    return "".join(piece.text if isinstance(piece, Said) else piece for piece in pieces)


def first_difference(expected: str, found: str) -> str:
    """Where two texts part, in a few words of each."""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
        min(len(expected), len(found)),
    )
    start = max(0, at - 20)
    return f"it writes {expected[start : at + 20]!r} where they give {found[start : at + 20]!r}"


def prompt_pieces(template: ChatTemplate, tokenizer: Any, system: str = "") -> tuple[str, str]:
    """The texts before and after a single question, for a prompt whose pieces are tokenized one by
    one (`PromptSpec`), cut so that the tokens are still those of the whole.

    Tokenizers of the SentencePiece kind put a space before every text: there, spaces beside the
    question are left out. White space that special tokens swallow is left out, too. Raises
    InputError where no cut gives the tokens.
    """
    ours = plain_tokenizer(tokenizer)
    before, after = (without_swallowed(ours, t) for t in question_pieces(template, system))
    messages = [Message("system", system)] if system else []
    questions = [text.strip() for text in TEXTS]
    expected = [encode(ours, render(template, [*messages, Message("user", q)])) for q in questions]
    cuts = [(before, after), (before.removesuffix(" "), after), (before, after.removeprefix(" ")),
            (before.removesuffix(" "), after.removeprefix(" "))]  # fmt: skip
    for left, right in cuts:
        first, last = encode_template(ours, left), encode_template(ours, right)
        if all(
            first + encode_question(ours, question) + last == ids
            for question, ids in zip(questions, expected, strict=True)
        ):
            return left, right
    raise InputError(
        "the chat template cannot be cut at the question: the tokens of one depend on what "
        "stands beside it"
    )


def without_swallowed(tokenizer: Tokenizer, text: str) -> str:
    """A text without the white space that special tokens in it take from behind them."""
    tokens = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.rstrip]
    return re.sub(rf"({'|'.join(map(re.escape, tokens))})\s+", r"\1", text) if tokens else text
