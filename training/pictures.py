"""The pictures to train and to check on: named, with kind, licence and a fixed split.

A concept (the name without modifiers) is wholly in training or wholly held out, over all sources.
Photographs are held out always; the encoder's own class prototypes are names, not pictures.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image

from tinyalign.training.sources import unpack
from tinyalign.training.wordnet import Meaning, WordNet, load_wordnet, short_gloss, word_list

Split = Literal["train", "held"]
SOURCES = ("emoji", "photos", "easy_vqa", "furniture", "clipart")
HELD_PERCENT = 15
CLIPART_PIXELS = 300
_CLIPART_MAX_BYTES = 250_000


@dataclass(frozen=True)
class Picture:
    """One picture and what is known about it. `file` is a path in its unpacked package
    (or "archive!member"); `questions` are the source's own (question, bare answer) pairs."""

    id: str
    source: str
    name: str
    concept: str
    kind: str
    gloss: str
    split: Split
    licence: str
    creator: str
    file: str
    questions: tuple[tuple[str, str], ...] = ()


def split_of(concept: str) -> Split:
    """Which side a concept is on: a fixed hash, the same for every source."""
    bucket = int.from_bytes(hashlib.sha256(f"split:{concept}".encode()).digest()[:4], "big") % 100
    return "held" if bucket < HELD_PERCENT else "train"


# Words that tell how a thing looks, not what it is; left out of the concept.
_MODIFIERS = frozenset(
    word_list(
        """red orange yellow green blue purple pink brown black white grey gray small big large
        little
        old new open opened closed full empty round rounded square double triple simple modern
    classic oncoming front-facing baby tropical cartoon sitting lying down standing holding
    young male female wooden plastic iron glass oak hot nice cute happy sad smiling single high
    low left right spouting two-hump rectangle rectangular oval wall the a an"""
    )
)


def concept_of(name: str, wordnet: WordNet) -> str:
    """A name without looks and in the singular: "green apples" -> "apple"."""
    words = [word for word in name.lower().split() if word not in _MODIFIERS] or name.split()
    phrase = " ".join(words)
    return (
        wordnet.lemma(phrase) or " ".join((*words[:-1], wordnet.lemma(words[-1]) or words[-1]))
    ).replace("_", " ")


# ------------------------------------------------------------------ emoji

_EMOJI_SKIP = frozenset(
    word_list(
        """skin-tone hair-style country-flag subdivision-flag flag keycap alphanum arrow zodiac
    av-symbol gender math punctuation currency other-symbol warning transport-sign religion
    person-symbol family person-gesture person-activity person-resting"""
    )
)
_EMOJI_PREFER: dict[str, frozenset[str]] = {
    "animal": frozenset(
        word_list(
            """dog cat bird fish insect snake monkey bear spider dinosaur lizard shellfish
            crustacean amphibian reptile animal"""
        )
    ),
    "plant": frozenset({"plant", "tree", "flower", "fungus"}),
    "food": frozenset({"fruit", "vegetable", "food", "dish", "bread", "dessert", "sweet"}),
    "drink": frozenset({"drink", "container", "tableware"}),
    "transport": frozenset({"car", "truck", "boat", "ship", "aircraft", "train", "vehicle", "way"}),
    "place": frozenset({"building", "structure", "landform", "land"}),
    "clothing": frozenset({"clothing", "footwear", "hat", "headwear", "bag", "jewelry"}),
    "tool": frozenset({"tool", "weapon", "utensil"}),
    "musical": frozenset({"musical instrument"}),
    "sport": frozenset({"sports equipment", "ball", "game equipment"}),
    "game": frozenset({"game equipment", "toy", "game"}),
    "sky": frozenset({"celestial body", "star", "weather", "cloud"}),
    "body": frozenset({"body part"}),
    "person": frozenset({"person", "imaginary being"}),
}
_PROPER = re.compile(r"^(Christmas|Japanese|Tokyo|Statue|Santa|Mrs|T-Rex|Mx)")
_EMOJI_NAMES = {
    "dog face": "dog", "cat face": "cat", "horse face": "horse", "tiger face": "tiger",
    "monkey face": "monkey", "cow face": "cow", "pig face": "pig", "mouse face": "mouse",
    "rabbit face": "rabbit", "dragon face": "dragon", "front-facing baby chick": "baby chick",
    "spouting whale": "whale", "ear of corn": "corn", "automobile": "car",
    "headphone": "headphones",
    "sport utility vehicle": "car", "oncoming automobile": "car", "hot beverage": "cup of coffee",
    "closed book": "book", "red paper lantern": "paper lantern", "carpentry saw": "saw",
    "microbe": "microbe", "optical disk": "compact disc", "pool 8 ball": "billiard ball",
    "hourglass done": "hourglass", "hourglass not done": "hourglass",
    "umbrella on ground": "umbrella",
    "soft ice cream": "ice cream", "leafy green": "lettuce", "lady beetle": "ladybug",
    "cricket game": "cricket bat", "ping pong": "table tennis racket",
    "badminton": "badminton racket",
    "tennis": "tennis racket", "bullseye": "dartboard", "game die": "dice",
    "thong sandal": "sandal",
    "billed cap": "cap", "roll of paper": "toilet paper", "locked": "padlock",
    "unlocked": "open padlock", "linked paperclips": "paperclips", "balance scale": "scales",
    "one-piece swimsuit": "swimsuit", "articulated lorry": "truck", "delivery truck": "truck",
    "kick scooter": "scooter", "goal net": "goal", "military medal": "medal",
    "sports medal": "medal", "wrapped gift": "gift", "locomotive": "steam locomotive",
    "police car light": "siren", "hut": "hut", "nut and bolt": "bolt", "headstone": "gravestone",
    "musical keyboard": "piano keyboard", "high voltage": "lightning bolt", "droplet": "water drop",
    "mobile phone": "mobile phone", "framed picture": "picture frame", "mantelpiece clock": "clock",
    "film projector": "movie projector", "cooking": "fried egg", "pile of poo": "poop",
}  # fmt: skip


def emoji(cache: Path | None = None) -> list[Picture]:
    """Emoji renders that show a thing, an animal, a place or a face (MIT)."""
    root = unpack("emojibase-data", cache) / "package"
    entries = json.loads((root / "en" / "data.json").read_text(encoding="utf-8"))
    subgroups = json.loads((root / "meta" / "groups.json").read_text(encoding="utf-8"))["subgroups"]
    assets = unpack("@lobehub/fluent-emoji-3d", cache) / "package" / "assets"
    files = {_bare_code(path.stem): path.name for path in sorted(assets.glob("*.webp"))}
    wordnet = load_wordnet(cache)
    pictures = []
    for entry in sorted(entries, key=lambda e: e["hexcode"]):
        subgroup = subgroups.get(str(entry.get("subgroup")), "skin-tone")
        file = files.get(_bare_code(entry["hexcode"]))
        name = _emoji_name(entry["label"])
        if file is None or subgroup in _EMOJI_SKIP or not name:
            continue
        prefer = next((v for k, v in _EMOJI_PREFER.items() if subgroup.startswith(k)), frozenset())
        meaning = wordnet.meaning(name, prefer) or Meaning("", "", "")
        if subgroup.startswith("face-"):
            meaning = Meaning("face", "", "")
        pictures.append(
            _picture(
                f"emoji/{file[:-5]}", "emoji", name, meaning, wordnet, "MIT", "Microsoft", file
            )
        )
    return pictures


def _bare_code(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _emoji_name(label: str) -> str:
    name = label.replace("’", "'").replace("“", "").replace("”", "")
    if re.search(r"o'clock|thirty|medium|: |button|^(man|woman|men|women)\b|&", name):
        return ""
    if not _PROPER.match(name):
        name = name[0].lower() + name[1:]
    name = _EMOJI_NAMES.get(name, name).replace("oK hand", "OK hand")
    return "" if len(name.split()) > 4 else name


# ------------------------------------------------------------------ furniture

_FURNITURE_LICENCES = {
    "BlendSwap-CC-0": "CC0-1.0", "BlendSwap-CC-BY": "CC-BY-3.0", "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US", "Scopia": "CC-BY-3.0",
}  # fmt: skip
# Brand names, drawings on the floor, wall parts no one would ask about.
_FURNITURE_SKIP = re.compile(
    r"\d|frame |parking|switch|plug|socket|chevrolet|peugeot|renault|seat leon|ford|yamaha|vw "
    r"|apple i|playstation|barnum|concept|cctv|suv|flipper|puff|frame|winchester|osaka"
    r"|ryokan|unit\b|:|,"
    r"|island extension|contemporary living room|full bookcase|hashtray|bootie|penbox"
    r"|rail crossing",
    re.I,
)
_FURNITURE_NAMES = {
    "letters box": "letter box", "lip stick": "lipstick", "short": "shorts", "trunck": "trunk",
    "text marker": "marker pen", "gaz water heater": "water heater", "mocassin": "moccasin",
    "woman shoes": "shoes", "teck chair": "teak chair", "toilets": "toilet", "female": "woman",
    "male": "man", "little bank": "small bench", "wood bank": "wooden bench", "tv": "television",
    "basin": "basin", "cup cake": "cupcake", "bended coconut tree": "coconut tree",
    "bath": "bathtub",
    "fork lift": "forklift", "punching ball": "punching bag", "extinguisher": "fire extinguisher",
    "mixer": "mixer", "wall flat tv": "flat television", "cooker": "cooker", "safe": "safe",
}  # fmt: skip
_FURNITURE_PREFER = frozenset(
    word_list(
        """furniture seat lamp furnishing appliance container device equipment tableware utensil
    structure tree plant door covering tool box bag vehicle clothing footwear room ball toy
    machine computer telephone camera"""
    )
)


def furniture(cache: Path | None = None) -> list[Picture]:
    """Icons of furniture and household things (CC0 or CC-BY, per catalogue and maker)."""
    root = furniture_dir(cache)
    wordnet = load_wordnet(cache)
    pictures = []
    for catalogue, licence in _FURNITURE_LICENCES.items():
        archive = root / f"{catalogue}.sh3f"
        with zipfile.ZipFile(archive) as stored:
            text = stored.read("PluginFurnitureCatalog.properties").decode("latin-1")
        entries: dict[str, dict[str, str]] = {}
        for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.M):
            entries.setdefault(number, {})[key] = value.strip()
        for number, entry in entries.items():
            raw = entry["name"].encode("ascii", "ignore").decode().strip()
            name = raw.lower()
            name = _FURNITURE_NAMES.get(name, name)
            if _FURNITURE_SKIP.search(raw) or "\\u" in raw or not 1 <= len(name.split()) <= 4:
                continue
            meaning = wordnet.meaning(name, _FURNITURE_PREFER) or Meaning("", "", "")
            pictures.append(
                _picture(
                    f"furniture/{catalogue}/{number}",
                    "furniture",
                    name,
                    meaning,
                    wordnet,
                    licence,
                    entry.get("creator", catalogue),
                    f"{catalogue}.sh3f!{entry['icon'].lstrip('/')}",
                )
            )
    return pictures


# ------------------------------------------------------------------ clip art

_CLIPART_DIRS: dict[str, frozenset[str]] = {
    "animals": _EMOJI_PREFER["animal"],
    "buildings": _EMOJI_PREFER["place"] | _FURNITURE_PREFER,
    "containers": frozenset({"container", "box", "bag", "bottle"}),
    "decorations": frozenset({"decoration"}),
    "education": frozenset({"publication", "equipment"}),
    "electronics": frozenset({"electronic device", "device", "appliance", "lamp"}),
    "food": _EMOJI_PREFER["food"] | _EMOJI_PREFER["drink"],
    "geography/astronomy": _EMOJI_PREFER["sky"],
    "office": frozenset({"writing tool", "device", "furniture", "telephone"}),
    "people": frozenset({"person", "body part", "clothing", "footwear", "hat", "imaginary being"}),
    "plants": _EMOJI_PREFER["plant"] | _EMOJI_PREFER["food"],
    "recreation": frozenset({"musical instrument", "toy", "ball", "sports equipment"}),
    "science": _EMOJI_PREFER["sky"] | frozenset({"device"}),
    "computer": frozenset({"computer", "electronic device", "machine", "device"}),
    "signs_and_symbols": frozenset({"symbol", "sign", "clock", "weather", "emblem"}),
    "telephone": frozenset({"telephone"}),
    "tools": _EMOJI_PREFER["tool"],
    "transportation": _EMOJI_PREFER["transport"],
    "unsorted": frozenset({"animal", "plant", "food", "device"}),
}
_CLIPART_SKIP = re.compile(
    r"^(shapes/|computer/(icons|buttons|folders|diagrams)|special/|signs_and_symbols/(flags|map_symbols|led|hazard|"
    r"disability|awards)|transportation/(aiga|roadsigns)|recreation/games/cards|people/stickmen|logos|"
    r"unsorted/duplicates|buttons|geography/[^/]*$|recreation/(art|religion))"
)
_TITLE_JUNK = re.compile(
    r"\([^)]*\)|\[[^]]*\]|\b(b and w|bw|b w|black and white|outline|silhouette|clip ?art|icons?|"
    r"svg|ganson|etiquette|stylized|remix|vector|simple|drawing|sketch|cartoon|line art|"
    r"by \w+.*|nr|no|v)\b|[#&].*|\d+|[-_,.:!?]+(?=\s|$)",
    re.I,
)
_CLIPART_BAD_KINDS = frozenset({"substance", "material", "sign", "room", "way", "sport"})
_TITLE_BAD = frozenset(
    word_list(
        """art collection theme test lam set clipart work logo sign symbol icon image picture design
    example border background pattern frame page untitled submission thing time new load
    illustration signs homes parking question button icons symbols figures rules avatar tux whit
    cisco flourish form celtic user rpm"""
    )
)


def clipart(cache: Path | None = None) -> list[Picture]:
    """Clip art whose title is a plain English name of one to three words (public domain)."""
    root = unpack("openclipart-svg", cache) / "usr" / "share" / "openclipart" / "svg"
    wordnet = load_wordnet(cache)
    pictures = []
    for path in sorted(root.rglob("*.svg")):
        relative = path.relative_to(root).as_posix()
        if _CLIPART_SKIP.match(relative) or path.stat().st_size > _CLIPART_MAX_BYTES:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        title = re.search(r"<dc:title>(.*?)</dc:title>", text, re.S)
        licence = re.search(r'<cc:license[^>]*resource="([^"]*)"', text)
        if not title or not licence or "publicdomain" not in licence[1].lower():
            continue
        name = clean_title(title[1], wordnet)
        if not name:
            continue
        prefer = next((v for k, v in _CLIPART_DIRS.items() if relative.startswith(k)), frozenset())
        meaning = wordnet.meaning(name, prefer)
        if meaning is None or meaning.kind in _CLIPART_BAD_KINDS:
            continue
        maker = re.search(r"<dc:creator>.*?<dc:title>(.*?)</dc:title>", text, re.S)
        pictures.append(
            _picture(
                f"clipart/{relative[:-4]}",
                "clipart",
                name,
                meaning,
                wordnet,
                "public domain",
                maker[1].strip() if maker else "",
                relative,
            )
        )
    # A title many pictures share is the name of a series ("road signs", "bullet hole").
    often = Counter(picture.name for picture in pictures)
    return [p for p in pictures if often[p.name] <= 6 or len(p.name.split()) == 1]


def clean_title(title: str, wordnet: WordNet) -> str:
    """A clip-art title as a lower-case name of one to three English words, or ""."""
    plain = _TITLE_JUNK.sub(" ", title.replace("_", " ").replace("&amp;", "and"))
    words = re.sub(r"\s+", " ", plain).strip().lower().split()
    words = words[1:] if words and words[0] in ("a", "an", "the") else words
    if not 1 <= len(words) <= 3 or _TITLE_BAD & set(words):
        return ""
    small = {"of", "with", "and", "in", "on"}
    if words[0] in small or words[-1] in small:
        return ""
    name = " ".join(words)
    if not name.isascii() or any(len(w) < 3 and w not in small for w in words):
        return ""
    if not all(w in small or (re.fullmatch(r"[a-z'-]+", w) and wordnet.is_word(w)) for w in words):
        return ""
    return name


# ------------------------------------------------------------------ easy-vqa and photographs


def easy_vqa(cache: Path | None = None) -> list[Picture]:
    """Coloured shapes with questions; the package's own test images are held out (MIT)."""
    root = unpack("easy-vqa", cache) / "easy_vqa" / "data"
    pictures = []
    sides: tuple[tuple[str, Split], ...] = (("train", "train"), ("test", "held"))
    for folder, split in sides:
        asked: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in json.loads((root / folder / "questions.json").read_text()):
            asked.setdefault(image, []).append((question, answer))
        for image in sorted(asked):
            shape = easy_truth(asked[image], EASY_SHAPES) or "shape"
            pictures.append(
                Picture(
                    f"easy_vqa/{folder}/{image}",
                    "easy_vqa",
                    shape,
                    "easy vqa shape",
                    "shape",
                    "",
                    split,
                    "MIT",
                    "Victor Zhou",
                    f"{folder}/images/{image}.png",
                    tuple(asked[image]),
                )
            )
    return pictures


EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY_COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "teal", "brown")


def easy_truth(asked: Iterable[tuple[str, str]], options: tuple[str, ...]) -> str:
    """Which option is in the picture, told from its questions and answers ("" if none tells)."""
    excluded = set()
    for question, answer in asked:
        if answer in options:
            return answer
        named = next((option for option in options if option in question.rstrip("?").split()), "")
        if not named:
            continue
        if answer not in ("yes", "no") or (answer == "no") == bool(
            re.search(r"\b(not|no)\b", question)
        ):
            return named
        excluded.add(named)
    left = set(options) - excluded
    return left.pop() if len(left) == 1 else ""


def photos(cache: Path | None = None) -> list[Picture]:
    """The 20 labelled ImageNet photographs of foolbox: for checking only, never trained on."""
    root = unpack("foolbox", cache) / "foolbox" / "data"
    classes = imagenet_classes(cache)
    return [
        replace(classes[int(path.stem.split("_")[2])], id=f"photos/{path.stem}", source="photos",
                split="held", licence="ImageNet, not redistributed", creator="", file=path.name)
        for path in sorted(root.glob("imagenet_*.jpg"))
    ]  # fmt: skip


@lru_cache(maxsize=2)
def imagenet_classes(cache: Path | None = None) -> tuple[Picture, ...]:
    """The 1000 classes of the encoder's classifier as named items without a file."""
    root = unpack("imagenet-classes", cache) / "imagenet_classes"
    names = json.loads((root / "imagenet1k_clean_names.json").read_text())
    synonyms = json.loads((root / "imagenet1k_label_to_names.json").read_text())
    wordnet = load_wordnet(cache)
    found = []
    for index, raw in enumerate(names):
        name = re.sub(r"\s*\([^)]*\)", "", raw).strip()
        sense = wordnet.best_sense([part.strip() for part in synonyms[str(index)].split(",")])
        meaning = (
            Meaning(wordnet.kind(sense), short_gloss(sense.gloss), "")
            if sense
            else Meaning("", "", "")
        )
        item = _picture(f"prototypes/{index}", "prototypes", name, meaning, wordnet,
                        "Apache-2.0 (classifier), MIT (names), WordNet (glosses)", "",
                        "")  # fmt: skip
        found.append(replace(item, split="train"))
    return tuple(found)


# ------------------------------------------------------------------ reading


def pictures_of(source: str, cache: Path | None = None) -> list[Picture]:
    """All pictures of one of SOURCES, in a fixed order."""
    makers = {"emoji": emoji, "photos": photos, "easy_vqa": easy_vqa, "furniture": furniture,
              "clipart": clipart}  # fmt: skip
    return makers[source](cache)


def read_image(picture: Picture, cache: Path | None = None) -> Image.Image:
    """The picture as RGBA (cut-outs keep their alpha; photographs and shapes are opaque)."""
    if picture.source == "emoji":
        path = unpack("@lobehub/fluent-emoji-3d", cache) / "package" / "assets" / picture.file
    elif picture.source == "photos":
        path = unpack("foolbox", cache) / "foolbox" / "data" / picture.file
    elif picture.source == "easy_vqa":
        path = unpack("easy-vqa", cache) / "easy_vqa" / "data" / picture.file
    elif picture.source == "furniture":
        archive, member = picture.file.split("!")
        with zipfile.ZipFile(furniture_dir(cache) / archive) as stored:
            return Image.open(io.BytesIO(stored.read(member))).convert("RGBA")
    else:
        root = unpack("openclipart-svg", cache) / "usr" / "share" / "openclipart" / "svg"
        return render_svg(root / picture.file)
    with Image.open(path) as image:
        return image.convert("RGBA")


def furniture_dir(cache: Path | None = None) -> Path:
    """The folder of the furniture catalogues."""
    return unpack("sweethome3d-furniture", cache) / "usr" / "share" / "sweethome3d" / "furniture"


def render_svg(path: Path, size: int = CLIPART_PIXELS) -> Image.Image:
    """An SVG as RGBA, its longer side about `size` pixels; its own transparency is kept."""
    import resvg_py

    return _rgba(
        resvg_py.svg_to_bytes(svg_path=str(path), width=size, dpi=96, skip_system_fonts=True), size
    )


def svg_image(text: str, size: int = CLIPART_PIXELS) -> Image.Image:
    """An SVG's text as RGBA, likewise."""
    import resvg_py

    return _rgba(
        resvg_py.svg_to_bytes(svg_string=text, width=size, dpi=96, skip_system_fonts=True), size
    )


def _rgba(png: bytes, size: int) -> Image.Image:
    with Image.open(io.BytesIO(bytes(png))) as opened:
        image = opened.convert("RGBA")
    image.thumbnail((size, size))
    return image


# Names whose senses WordNet ranks misleadingly for pictures, and kinds that tell a person nothing.
_KIND_OF = {
    "plant": "plant", "bus": "vehicle", "mouth": "body part", "peacock": "bird", "kite": "toy",
    "cherries": "fruit", "banana": "fruit", "woman": "person", "man": "person", "male": "person",
    "female": "person", "hammer": "tool", "tv": "device", "television": "device",
    "shoe": "footwear",
    "train": "vehicle", "tram": "vehicle", "toothbrush": "tool", "flower": "plant", "light": "lamp",
    "speaker": "device", "player": "device", "bottle": "container", "bowl": "container",
    "heart suit": "symbol", "party popper": "toy", "sparkler": "toy", "yarn": "thread",
}  # fmt: skip
_VAGUE = frozenset({"object", "substance", "material", "natural object", "covering", "land"})


def _kind(name: str, meaning: Meaning) -> str:
    kind = _KIND_OF.get(name) or _KIND_OF.get(name.split()[-1]) or meaning.kind
    return "" if kind in _VAGUE or kind == name else kind


def _picture(
    id: str,
    source: str,
    name: str,
    meaning: Meaning,
    wordnet: WordNet,
    licence: str,
    creator: str,
    file: str,
) -> Picture:
    concept = concept_of(name, wordnet)
    kind = _kind(name, meaning)
    return Picture(
        id, source, name, concept, kind, meaning.gloss, split_of(concept), licence, creator, file
    )
