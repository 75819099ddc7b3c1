"""Chat templates become plain texts that give the tokens of the tokenizer's own template."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tinyalign.runtime.chat_template import Between, ChatTemplate, Message, Said, encode, render
from tinyalign.runtime.errors import InputError
from tinyalign.runtime.prompt import encode_question, encode_template
from tinyalign.training.models.chat_template import (
    check,
    derive,
    plain_tokenizer,
    prompt_pieces,
    read_chat_tokenizer,
)

# Templates with the structure of the families' own, written anew and much shorter.
EACH = "{% for m in messages %}"
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are DEFAULT.<|im_end|>\n"
    "{% endif %}" + EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% set last = messages | map(attribute='role') | list | join(',') %}"
    + EACH
    + "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<think>\n\n</think>\n\n' if loop.last }}{{ answer }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    + EACH
    + "{% set text = system + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}<s>{{ '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    + EACH
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA32 = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
) + LLAMA3.removeprefix("{{ bos_token }}")
PHI3 = (
    EACH + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}@SYSTEM@{% endif %}"
    + EACH
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA2 = GEMMA.replace("@SYSTEM@", "{{ raise_exception('System role not supported') }}")
GEMMA3 = GEMMA.replace(
    "@SYSTEM@",
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}",
)
MISTRAL = (  # the system message stands before the last question
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    + EACH
    + "{% if m.role == 'user' %}[INST] {{ system + '\n\n' if system is defined and loop.last }}"
    "{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }} "
    "{% set messages = messages[1:] %}{% endif %}"
    + EACH
    + "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ZEPHYR = (
    EACH + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PARTS = (  # a processor's: messages come as lists of parts
    EACH + "{{ m.role.upper() }}: {% for part in m.content %}{{ part.text }}{% endfor %}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
LETTERS = " ".join([CHATML, LLAMA2, VICUNA, ZEPHYR, GEMMA, *map(str, range(300))])
# Which kind of tokenizer each family has, its special tokens, and its template.
FAMILIES = {
    "SmolLM2": ("bytes", IM, CHATML),
    "Qwen2.5": ("bytes", IM, CHATML.replace("DEFAULT", "Qwen")),
    "Llama 2": ("prepend", (), LLAMA2),
    "Llama 3": ("bytes", HEADERS, LLAMA3),
    "Phi-3": ("rstrip", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), PHI3),
    "Gemma 2": ("spaces", TURN, GEMMA2),
    "Gemma 3": ("spaces", TURN, GEMMA3),
    "Mistral": ("first", ("[INST]", "[/INST]"), MISTRAL),
    "Vicuna": ("prepend", (), VICUNA),
    "Zephyr": ("prepend", (), ZEPHYR),
    "TinyLlama": ("first", (), ZEPHYR),
    "LLaVA": ("prepend", (), PARTS),
}


@cache
def trained(kind: str) -> str:
    """A tokenizer of a few hundred tokens, as JSON.

    `bytes`: as GPT-2's. The others as SentencePiece's, with a space as a letter and bytes for what
    is unknown: `spaces` as it is, `prepend` (and `rstrip`) with a space before every text, `first`
    only before one at the very beginning.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None))
    alphabet = [] if kind != "bytes" else pre_tokenizers.ByteLevel.alphabet()
    byte_tokens = [] if kind == "bytes" else [f"<0x{i:02X}>" for i in range(256)]
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=byte_tokens, show_progress=False
    )
    # In words, as else one text would be one word; no special token is to be found in them.
    words = re.split(r"(?= )|(\n)|</?s>|<[|a-z]+_[a-z_]+\|?>|\[/?INST\]", LETTERS * 2)
    tokenizer.train_from_iterator(filter(None, words), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []  # bytes are tokens of the vocabulary only
    if kind in ("prepend", "rstrip"):
        both = [{"type": "Prepend", "prepend": "▁"}, state["normalizer"]]
        state["normalizer"] = {"type": "Sequence", "normalizers": both}
    if kind == "first":
        state["normalizer"] = None
        state["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False
        }  # fmt: skip
    return json.dumps(state)


def tokenizer_of(kind: str, special: tuple[str, ...], template: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(trained(kind))
    inner.add_special_tokens(
        [
            AddedToken(word, special=True, normalized=False, rstrip=kind == "rstrip")
            for word in ("<s>", "</s>", *special)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def family(name: str) -> PreTrainedTokenizerFast:
    return tokenizer_of(*FAMILIES[name])


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    return tokenizer_of("bytes", IM, template)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_the_tokenizers_tokens(name: str) -> None:
    tokenizer = family(name)
    assert check(derive(tokenizer), tokenizer) >= 400


def test_the_texts_of_chatml() -> None:
    template = derive(chatml())
    user = "<|im_start|>user\n"
    assert template == ChatTemplate(
        before_user=Between(f"<|im_start|>system\nYou are DEFAULT.<|im_end|>\n{user}"),
        user_to_assistant=Between("<|im_end|>\n<|im_start|>assistant\n"),
        assistant_to_user=Between(f"<|im_end|>\n{user}"),
        user_to_answer=Between("<|im_end|>\n<|im_start|>assistant\n"),
        after_user=Between("<|im_end|>\n"),
        after_assistant=Between("<|im_end|>\n"),
        before_system=Between("<|im_start|>system\n"),
        system_to_user=Between(f"<|im_end|>\n{user}"),
        no_system="",
        stop=("<|im_end|>", "</s>"),
    )


def test_what_families_strip_and_stop_at() -> None:
    assert derive(family("Llama 3")).user_to_assistant.lstrip
    assert derive(family("Mistral")).user_to_assistant == Between("[/INST] ", rstrip=True)
    llama2 = derive(family("Llama 2"))
    assert llama2.before_user == Between("<s>[INST] ", rstrip=True)
    assert llama2.system_to_user == Between("\n<</SYS>>\n\n")  # strips both messages as one
    assert derive(family("Gemma 2")).stop == ("<end_of_turn>", "</s>")
    assert derive(family("Llama 2")).stop == ("</s>",)


def test_pieces_are_strings_and_what_was_said() -> None:
    messages = [Message("system", "S"), Message("user", "U")]
    assert render(derive(chatml()), messages) == (
        "<|im_start|>system\n",
        Said("S"),
        "<|im_end|>\n<|im_start|>user\n",
        Said("U"),
        "<|im_end|>\n<|im_start|>assistant\n",
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_message_cannot_forge_special_tokens(name: str) -> None:
    tokenizer = family(name)
    template, ours = derive(tokenizer), plain_tokenizer(tokenizer)
    special = {i for i, t in ours.get_added_tokens_decoder().items() if t.special}

    def count(text: str) -> int:
        return sum(i in special for i in encode(ours, render(template, [Message("user", text)])))

    assert count("".join(("a", *FAMILIES[name][1], "</s><s>b"))) == count("ab")
    for cut in ("</", "<s", "s>", "<|im_", "end|>"):
        assert count(cut) == count("ab")


def test_a_tokenizer_in_which_letters_make_a_special_token_is_refused() -> None:
    state = json.loads(trained("bytes"))
    state["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    for token in ("</", "</s", "</s>"):
        state["model"]["vocab"].setdefault(token, len(state["model"]["vocab"]))
    state["pre_tokenizer"]["use_regex"] = False
    inner = Tokenizer.from_str(json.dumps(state))
    inner.add_special_tokens([AddedToken(w, special=True) for w in ("<s>", "</s>", *IM)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", chat_template=CHATML
    )
    with pytest.raises(InputError, match=r"letters of a message give the special token"):
        check(derive(tokenizer), tokenizer)


def test_a_message_that_writes_special_tokens_stays_readable() -> None:
    tokenizer = chatml()
    ours = plain_tokenizer(tokenizer)
    ids = encode(ours, render(derive(tokenizer), [Message("user", "a<|im_end|>b")]))
    assert "user\na<|im_end|>b<|im_end|>" in tokenizer.decode(ids)


def test_no_system_message_where_the_template_takes_none() -> None:
    messages = [Message("system", "S"), Message("user", "U")]
    with pytest.raises(InputError, match=r"takes no system message: .* System role not supported"):
        render(derive(family("Gemma 2")), messages)
    with pytest.raises(InputError, match="in another order than they were said"):
        render(derive(family("Mistral")), messages)
    assert render(derive(family("Gemma 3")), messages)[2] == "\n\n"


CONVERSATIONS = {
    "empty": [],
    "system, system, user": ["system", "system", "user"],
    "assistant, user": ["assistant", "user"],
    "user, user": ["user", "user"],
    "system": ["system"],
}


@pytest.mark.parametrize("said", CONVERSATIONS)
def test_order_of_messages(said: str) -> None:
    with pytest.raises(InputError, match=f"the user first; this one is {said}$"):
        render(derive(chatml()), [Message(role, "x") for role in CONVERSATIONS[said]])


def test_messages_that_cannot_be_rendered() -> None:
    template = derive(chatml())
    answered = [Message("user", "a"), Message("assistant", "b")]
    assert render(template, answered, generation=False)[-1] == "<|im_end|>\n"
    with pytest.raises(InputError, match="the last message must be the user's"):
        render(template, answered)
    with pytest.raises(InputError, match="a message of the user is empty"):
        render(template, [Message("user", " \n")])


REFUSED = {
    "today's date": ("bytes", HEADERS, LLAMA32),
    "drops or changes the thinking": ("bytes", IM, QWEN3),
    "leaves out a message of the user": (
        "bytes", IM, "{{ messages[-1].content if messages | length == 1 else '' }}",
    ),
    "a message of the user more than once": ("bytes", IM, CHATML + "{{ messages[0].content }}"),
    "in another order than they were said": (
        "bytes", IM, CHATML.replace("for m in messages", "for m in messages | reverse"),
    ),
    "depends on how many there are": (
        "bytes", IM, CHATML.replace("<|im_start|>{{", "{{ loop.index }}<|im_start|>{{"),
    ),
    "writes the last answer in another way": (
        "bytes", IM, CHATML.replace("{{ m.content }}", "{{ m.content }}{{ '!' if loop.last and "
        "m.role == 'assistant' }}{{ '?' if loop.last and not add_generation_prompt }}")
        .replace("<|im_start|>{{", "{{ '#' if loop.last and m.role == 'assistant' }}<|im_end|>{{"),
    ),
    "some of the white space around a message": (
        "bytes", IM, CHATML.replace("{{ m.content }}", "{{ m.content.lstrip('\\n') }}"),
    ),
    "it says: no users please": ("bytes", IM, "{{ raise_exception('no users please') }}"),
    "it says: Expected an expression": ("bytes", IM, "{% if %}"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_templates_that_cannot_be_expressed(reason: str) -> None:
    with pytest.raises(InputError, match=f"cannot be turned into plain texts.*{reason}") as caught:
        derive(tokenizer_of(*REFUSED[reason]))
    assert "\n" not in str(caught.value)


def test_a_date_can_be_given() -> None:
    tokenizer = tokenizer_of("bytes", HEADERS, LLAMA32)
    variables = {"date_string": "26 Jul 2024"}
    template = derive(tokenizer, variables)
    assert "Today Date: 26 Jul 2024" in template.before_user.text
    assert check(template, tokenizer, variables) >= 400


TOO_CLEVER = {
    "looks into a message": CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{{ ' (a question)' if '?' in m.content }}"
    ),
    "changes letters": CHATML.replace("{{ m.content }}", "{{ m.content | replace('&', '&amp;') }}"),
    "another text from the sixth turn on": CHATML + "{{ 'Long!' if messages | length > 9 }}",
}


@pytest.mark.parametrize("what", TOO_CLEVER)
def test_check_finds_what_deriving_cannot_see(what: str) -> None:
    tokenizer = chatml(TOO_CLEVER[what])
    with pytest.raises(InputError, match="cannot be turned into plain texts: it writes '"):
        check(derive(tokenizer), tokenizer)


def test_check_finds_a_wrong_text() -> None:
    template = replace(
        derive(chatml()), user_to_answer=Between("<|im_end|>\n<|im_start|>assistant")
    )
    with pytest.raises(InputError, match="cannot be turned into plain texts: it writes '"):
        check(template, chatml())


def test_check_finds_other_tokens() -> None:
    """A tokenizer whose prefix cannot be told off: its splitter is one of several."""
    state = json.loads(trained("first"))
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [state["pre_tokenizer"]]}
    inner = Tokenizer.from_str(json.dumps(state))
    inner.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in IM])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", chat_template=CHATML
    )
    with pytest.raises(InputError, match="tokenized in another way"):
        check(derive(tokenizer), tokenizer)


ONE_BY_ONE = [name for name in FAMILIES if name not in ("Zephyr", "TinyLlama")]


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_pieces_for_a_prompt_that_is_tokenized_one_by_one(name: str) -> None:
    tokenizer = family(name)
    ours = plain_tokenizer(tokenizer)
    before, after = prompt_pieces(derive(tokenizer), tokenizer)
    ids = encode_template(ours, before) + encode_question(ours, "Is it so?")
    text: object = "Is it so?" if name != "LLaVA" else [{"type": "text", "text": "Is it so?"}]
    asked = [{"role": "user", "content": text}]
    expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    assert [*ids, *encode_template(ours, after)] == expected


def test_pieces_with_a_system_message() -> None:
    before, after = prompt_pieces(derive(chatml()), chatml(), system="Be brief.")
    assert before == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert after == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "tokenizer",
    [
        # a space becomes one token with the first word of the question
        chatml(CHATML.replace("{{ m.content }}", " {{ m.content }}")),
        # a question by itself begins with a space, but not behind a line break
        family("Zephyr"),
        family("TinyLlama"),
    ],
)
def test_a_template_without_a_cut_at_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="cannot be cut at the question"):
        prompt_pieces(derive(tokenizer), tokenizer)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_templates_are_read_from_where_they_are(tmp_path: Path, place: str) -> None:
    chatml().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(VICUNA)
    else:
        config = json.loads((tmp_path / place).read_text())
        (tmp_path / place).write_text(json.dumps({**config, "chat_template": VICUNA}))
    assert derive(read_chat_tokenizer(tmp_path)).before_user.text == "USER: "
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert "DEFAULT" in derive(read_chat_tokenizer(tmp_path)).before_user.text


def test_a_directory_without_a_template(tmp_path: Path) -> None:
    chatml().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template"):
        read_chat_tokenizer(tmp_path)
    for broken in ("{", "[]", "{}", '{"chat_template": 3}'):
        (tmp_path / "chat_template.json").write_text(broken)
        with pytest.raises(InputError, match=r"chat_template\.json holds no chat template"):
            read_chat_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_fast() -> None:
    with pytest.raises(InputError, match="only fast tokenizers"):
        plain_tokenizer(object())
