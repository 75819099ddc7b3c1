"""Questions a record can answer, with answers as short sentences and the bare answer as `label`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from tinyalign.training.features import Record
from tinyalign.training.wordnet import head_noun, word_list

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_PLACES = {
    "left": "on the left", "right": "on the right", "top": "at the top",
    "bottom": "at the bottom", "centre": "in the centre",
}  # fmt: skip

_NAME = (
    "What is this?", "What does the picture show?", "What is in the picture?", "What do you see?",
    "What is shown here?", "What is it?", "Name this.", "What can you see in this picture?",
)  # fmt: skip
_KIND = ("What kind of thing is this?", "What sort of thing is it?", "What kind of thing is {the}?")
_COLOUR = ("What colour is {the}?", "What color is {the}?", "What colour is it?",
           "What color is this?",
           "Which colour is it?", "What is the colour of {the}?")  # fmt: skip
_COUNT = ("How many {many} are there?", "How many {many} do you see?",
          "How many {many} are in the picture?",
          "Count the {many}.")  # fmt: skip
_PLACE = (
    "Where is {the}?",
    "Where in the picture is {the}?",
    "In which part of the picture is {the}?",
)
_CAPTION = (
    "Describe the picture.",
    "Describe this picture.",
    "Write a caption.",
    "What is going on here?",
)
_GLOSS = ("What is {a}?", "Explain what this is.", "Tell me about this.", "Tell me about {the}.")

# Names to ask about where the answer is no.
_OTHERS = word_list(
    """cat dog horse cow elephant lion bird duck owl fish shark frog snake bee spider butterfly
    tree flower rose cactus apple banana lemon strawberry tomato carrot potato pizza hamburger
    cake cookie egg cup bottle spoon fork knife plate chair table sofa bed lamp door window
    house church castle bridge car bus truck train bicycle motorcycle boat ship airplane rocket
    hammer saw screwdriver scissors pencil book newspaper clock watch camera telephone laptop
    keyboard television radio guitar piano trumpet drum ball balloon kite doll hat shoe shirt
    dress glasses umbrella bag key bell candle star heart moon cloud hand eye boy woman robot"""
)

_MASS = frozenset(
    word_list(
        """bread milk butter salt rice popcorn ginger garlic bacon sushi spaghetti honey sugar soap
    fire fog corn lettuce broccoli coral wood furniture luggage clothing sand snow water sake
    ice lightning guacamole yarn money pottery toast gold cheese meat beer wine coffee tea wheat
    hay food"""
    )
)
_SINGULAR_IN_S = frozenset(
    word_list(
        """triceratops rhinoceros mars gallows gps cactus bus hippopotamus octopus walrus abacus
    hibiscus iris glass dress cross compass lens tennis chess grass princess mattress atlas
    canvas gas species series swiss"""
    )
)
_PLURAL = frozenset(
    word_list("""fries skis people dice men women children feet teeth geese mice lice paparazzi""")
)
_UNCOUNTED = re.compile(
    r"^(Christmas|Mount|mount|Tokyo|Statue|Santa|Mrs|Mx|Mars|Jupiter|Saturn|Big Ben)\b"
)


@dataclass(frozen=True)
class Item:
    """One question with its answer in a sentence, the bare answer, and its type: name, kind,
    colour, count, position, yesno, caption, gloss, shape, given."""

    question: str
    answer: str
    label: str
    type: str


def is_plural(name: str) -> bool:
    """True for names that take "these are": "scissors", "fried eggs"."""
    head = head_noun(name).lower()
    return head in _PLURAL or (
        head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in _SINGULAR_IN_S
    )


def noun_phrase(name: str) -> str:
    """A name as it stands in a sentence: "a banana", "an owl", "bread", "scissors"."""
    if is_plural(name) or head_noun(name).lower() in _MASS or re.match(r"(Mrs|Santa|Mx)\b", name):
        return name
    if name.startswith(("Statue of", "milky way")):
        return f"the {name}"
    silent = name.lower().startswith(("hour", "honest", "x-ray"))
    hard = name.lower().startswith(
        ("uni", "ute", "euro", "ukulele", "one", "us", "ewe")
    ) and not name.lower().startswith("unid")
    vowel = name[:1].lower() in "aeiou"
    return f"{'an' if silent or (vowel and not hard) else 'a'} {name}"


def sentence(name: str) -> str:
    """ "This is a banana." or "These are scissors." """
    return f"{'These are' if is_plural(name) else 'This is'} {noun_phrase(name)}."


def pluralise(name: str) -> str:
    """More of it: "bananas", "cups of coffee", "berries"."""
    if is_plural(name):
        return name
    head = head_noun(name)
    at = name.rindex(head) if name.endswith(head) else name.index(head)
    if head in ("fish", "sheep", "deer", "aircraft", "bison", "moose", "squid", "shrimp"):
        more = head
    elif head.endswith("man") and head not in ("human", "caiman", "talisman"):
        more = head[:-3] + "men"
    elif head in ("mouse", "goose", "tooth", "foot", "child", "person"):
        more = {"mouse": "mice", "goose": "geese", "tooth": "teeth", "foot": "feet",
                "child": "children", "person": "people"}[head]  # fmt: skip
    elif re.search(r"[^aeiou]y$", head):
        more = head[:-1] + "ies"
    elif head.endswith(("s", "x", "z", "ch", "sh")) or head in ("tomato", "potato", "mango"):
        more = head + "es"
    elif head in ("leaf", "knife", "wolf", "loaf", "shelf", "calf", "scarf", "half", "elf"):
        more = (head[:-2] if head.endswith("fe") else head[:-1]) + "ves"
    else:
        more = head + "s"
    return name[:at] + more + name[at + len(head) :]


def questions_of(record: Record, rng: Random) -> list[Item]:
    """What can be asked of a record's picture, one or two wordings a type drawn with `rng`."""
    if record.source == "easy_vqa":
        return _easy_vqa(record, rng)
    if record.source == "llava":  # asked as it was given
        return [Item(question, answer, answer, "given") for question, answer in record.questions]
    if record.task == "pair":
        return _pair(record, rng)
    if record.task in ("count", "position", "colour"):
        return _scene(record, rng)
    return _object(record, rng)


def _object(record: Record, rng: Random) -> list[Item]:
    name, many = record.name, is_plural(record.name)
    items = [Item(q, sentence(name), name, "name") for q in rng.sample(_NAME, 2)]
    items += _kind_items(record, rng) + _colour_items(record, rng) + _is_this(record, rng)
    if record.gloss:
        verb = "are" if many else "is"
        asked = (f"What are {name}?", *_GLOSS[1:]) if many else _GLOSS
        answer = f"{_capital(noun_phrase(name))} {verb} {record.gloss}."
        items.append(Item(_fill(rng.choice(asked), name), answer, record.gloss, "gloss"))
    if record.source in ("emoji", "furniture") and not many and noun_phrase(name) != name:
        items += _count_items(name, 1, rng)
    shown = noun_phrase(name)
    if record.colour and record.colour not in name and not many:
        shown = noun_phrase(f"{record.colour} {name}")
    items.append(Item(rng.choice(_CAPTION), f"The picture shows {shown}.", name, "caption"))
    return items


def _scene(record: Record, rng: Random) -> list[Item]:
    name = record.name
    if record.count > 1:
        answer = f"There are {NUMBERS[record.count]} {pluralise(name)}."
        items = [Item(rng.choice(_NAME), answer, name, "name")]
        shown = f"{NUMBERS[record.count]} {pluralise(name)}"
    else:
        items = [Item(rng.choice(_NAME), sentence(name), name, "name")]
        shown = noun_phrase(name)
        items += _kind_items(record, rng) + _colour_items(record, rng)
    items += _is_there(record.names, rng)
    if record.task == "count":
        items += _count_items(name, record.count, rng)
    if record.position:
        place = _PLACES[record.position]
        verb = "are" if is_plural(name) else "is"
        for question in rng.sample(_PLACE, 2):
            asked = _fill(question, name)
            if verb == "are":
                asked = asked.replace(" is the ", " are the ")
            items.append(Item(asked, f"The {name} {verb} {place}.", record.position, "position"))
        shown += f" {place}"
    items.append(Item(rng.choice(_CAPTION), f"The picture shows {shown}.", name, "caption"))
    return items


def _pair(record: Record, rng: Random) -> list[Item]:
    left, right = record.names
    items = _is_there(record.names, rng)
    for side, name in (("left", left), ("right", right)):
        verb = "are" if is_plural(name) else "is"
        place = _PLACES[side]
        items.append(
            Item(f"What is {place}?", f"There {verb} {noun_phrase(name)} {place}.", name, "name")
        )
        items.append(
            Item(f"Where {verb} the {name}?", f"The {name} {verb} {place}.", side, "position")
        )
    shown = f"{noun_phrase(left)} on the left and {noun_phrase(right)} on the right"
    items.append(
        Item(rng.choice(_CAPTION), f"The picture shows {shown}.", f"{left}, {right}", "caption")
    )
    return items


def _kind_items(record: Record, rng: Random) -> list[Item]:
    if not record.kind or record.kind in record.name.split():
        return []
    answer = _as_kind(record.name, record.kind)
    return [Item(_fill(rng.choice(_KIND), record.name), answer, record.kind, "kind")]


def _as_kind(name: str, kind: str) -> str:
    whole = {"clothing", "furniture", "money", "food", "footwear", "headwear", "jewelry",
             "equipment",
             "weather", "medicine", "cloth", "paper", "thread", "furnishing",
             "tableware"}  # fmt: skip
    if is_plural(name):
        return f"{_capital(name)} are a kind of {kind}."
    what = f"a kind of {kind}" if kind in whole else noun_phrase(kind)
    return f"{_capital(noun_phrase(name))} is {what}."


def _colour_items(record: Record, rng: Random) -> list[Item]:
    if not record.colour:
        return []
    name, many = record.name, is_plural(record.name)
    items = []
    for question in rng.sample(_COLOUR, 2):
        asked = _fill(question, name)
        if many:
            asked = asked.replace(" is the ", " are the ").replace(
                "are the colour", "is the colour"
            )
        subject = f"The {name}" if "{the}" in question else "It"
        verb = "are" if many and subject != "It" else "is"
        items.append(Item(asked, f"{subject} {verb} {record.colour}.", record.colour, "colour"))
    return items


def _count_items(name: str, count: int, rng: Random) -> list[Item]:
    asked = rng.choice(_COUNT).format(many=pluralise(name))
    if is_plural(name) and count == 1:
        return []
    what = name if count == 1 else pluralise(name)
    answer = f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} {what}."
    return [Item(asked, answer, str(count), "count")]


def _is_this(record: Record, rng: Random) -> list[Item]:
    name, other = record.name, _other(record.names or (record.name,), rng)
    return [_this_item(name, name), _this_item(name, other)]


def _this_item(name: str, asked: str) -> Item:
    many = is_plural(asked)
    question = f"{'Are these' if many else 'Is this'} {noun_phrase(asked)}?"
    head = "these are" if many else "this is"
    if asked == name:
        return Item(question, f"Yes, {head} {noun_phrase(asked)}.", "yes", "yesno")
    return Item(question, f"No, {head} not {noun_phrase(asked)}.", "no", "yesno")


def _is_there(names: tuple[str, ...], rng: Random) -> list[Item]:
    items = []
    for asked in (rng.choice(names), _other(names, rng)):
        verb = "are" if is_plural(asked) else "is"
        wording = rng.choice(
            ("{Verb} there {a}?", "{Verb} there {a} in the picture?", "Can you see {a}?")
        )
        question = wording.format(Verb=verb.capitalize(), a=noun_phrase(asked))
        if asked in names:
            answer = f"Yes, there {verb} {noun_phrase(asked)}."
        else:
            answer = f"No, there {verb} no {asked}."
        items.append(Item(question, answer, "yes" if asked in names else "no", "yesno"))
    return items


def _easy_vqa(record: Record, rng: Random) -> list[Item]:
    return [
        Item(_capital(question), *_easy_answer(question, answer.replace("gray", "grey")))
        for question, answer in record.questions
    ] + [Item(rng.choice(_NAME),
    f"This is {noun_phrase(f'{record.colour} {record.name}'.strip())}.",
              record.name, "name")]  # fmt: skip


def _easy_answer(question: str, answer: str) -> tuple[str, str, str]:
    """Sentence, label and type of one of easy-vqa's questions."""
    if answer in ("yes", "no"):
        negated = bool(re.search(r"\b(not|no)\b", question))
        match = re.search(r"\b(?:an?|no) ((?:\w+ )?(?:shape|circle|rectangle|triangle))", question)
        what = (match[1] if match else "shape").replace("gray", "grey")
        there = (
            f"there is {noun_phrase(what)}"
            if (answer == "yes") != negated
            else f"there is no {what}"
        )
        return f"{_capital(answer)}, {there}.", answer, "yesno"
    if answer in ("circle", "rectangle", "triangle"):
        match = re.search(r"the (\w+) shape\?", question)
        what = f"The {match[1].replace('gray', 'grey')} shape is" if match else "The shape is"
        return f"{what} a {answer}.", answer, "shape"
    match = re.search(r"the (circle|rectangle|triangle|shape)\?", question)
    return f"The {match[1] if match else 'shape'} is {answer}.", answer, "colour"


def _other(names: tuple[str, ...], rng: Random) -> str:
    """A common name that none of the given names holds, nor the other way round."""
    words = {word.rstrip("s") for name in names for word in name.lower().split()}
    while True:
        other = rng.choice(_OTHERS)
        if other.rstrip("s") not in words:
            return other


def _fill(template: str, name: str) -> str:
    return template.format(the=f"the {name}", a=noun_phrase(name))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
