"""Invented names and facts: what only a memory can know.

An episode that teaches trust in the bank tells the model something no picture shows and no LM has
read: "This is a dorvan. Its owner is Mira." Names are made of syllables, values are drawn at
random, and the wording of the memory, of the question and of the answer are drawn apart, so the
model must read.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


def phrases(text: str) -> list[str]:
    """The phrases of a text that commas part."""
    return [" ".join(phrase.split()) for phrase in text.split(",")]


ONSETS = """
    b bl br c ch cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sn st t th
    tr v w y z zh
""".split()
VOWELS = """
    a e i o u ai au ee oo ou
""".split()
RUDE = (
    "fuck",
    "shit",
    "cunt",
    "dick",
    "cock",
    "nigg",
    "fag",
    "slut",
    "twat",
    "piss",
    "tit",
    "kike",
)
CODAS = [
    "",
    "",
    "",
    "b",
    "ck",
    "d",
    "ff",
    "g",
    "l",
    "lt",
    "m",
    "mp",
    "n",
    "nd",
    "nk",
    "p",
    "r",
    "rn",
    "sh",
    "sk",
    "t",
    "x",
    "zz",
]
ENDINGS = ["", "", "", "", "er", "le", "o", "a", "ix", "ium", "oid", "y", "us", "in"]
PEOPLE = """
    Mira Tom Anna Omar Lena Raj Sofia Kenji Nora Pablo Ines Lukas Amara Felix Yuki Hana Igor
    Clara Dario Elif Marco Priya Jonas Zoe Samuel Tara Victor Wanda Ali Greta Hugo Iris Jack
    Kira Leo Maya Nils Olga Peter Quinn Rosa Stefan Ursula Vera Will Ximena Yara Zane Bruno
    Carmen Diego Esther Frank Gloria
""".split()
TOWNS = """
    Oslo Lima Porto Kyoto Bergen Quito Turin Ghent Cairo Lagos Delhi Perth Malmo Basel Riga
    Sofia Nantes Leeds Boston Denver Austin Seoul Osaka Hanoi Dakar Tunis Lyon Graz Bern Cork
    Vienna Prague Athens
""".split()
ROOMS = phrases("""
    kitchen, garage, attic, cellar, workshop, office, hall, garden shed, library, laboratory,
    storeroom, bedroom, bathroom, studio, barn, archive, lobby, canteen, basement, greenhouse
""")
PLACES = phrases("""
    blue cupboard, top drawer, red box, third shelf, glass cabinet, metal locker, bottom drawer,
    green crate, wooden chest, second cabinet, white bin, leather case, small tin, corner rack,
    left drawer, yellow basket
""")
MATERIALS = """
    wood steel brass paper glass cotton leather rubber wax clay copper stone plastic silk
    ceramic tin
""".split()
MONTHS = """
    January February March April May June July August September October November December
""".split()
DAYS = """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""".split()
RULES = phrases("""
    keep it dry, never wash it, do not touch it, charge it every night, clean it with soap,
    keep it frozen, wear gloves, oil it once a month, switch it off first, handle it with care,
    store it upright, keep it away from fire, feed it twice a day, ask before using it,
    do not stack it, check it every week
""")
COMPANIES = """
    Nordal Vextra Brimco Halden Tolgate Umira Pelican Kestrel Ostara Quantrel Delmar Savik
    Lumo Ferrum Arbo
""".split()


def code(rng: Random) -> str:
    """A part number such as KX-204."""
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.choice([1, 2, 2])))
    return f"{letters}{rng.choice(['-', '-', ''])}{rng.randrange(10, 1000)}"


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: wordings of the memory, of the question and of the answer, and its
    values."""

    name: str
    tells: tuple[str, ...]
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    values: tuple[str, ...] = ()  # empty: a value is made by `make`
    make: str = ""  # "code", "price", "number", "year", "name"

    def value(self, rng: Random) -> str:
        """Draw a value."""
        if self.values:
            return rng.choice(self.values)
        makers = {
            "code": lambda: code(rng),
            "price": lambda: (
                f"{rng.randrange(2, 990)} {rng.choice(['euros', 'dollars', 'pounds'])}"
            ),
            "number": lambda: str(rng.randrange(2, 999)),
            "weight": lambda: f"{rng.randrange(2, 900)} {rng.choice(['grams', 'kilos', 'pounds'])}",
            "year": lambda: str(rng.randrange(1900, 2030)),
            "name": lambda: (
                rng.choice(PEOPLE) if rng.random() < 0.6 else invented_name(rng).capitalize()
            ),
        }
        return makers[self.make]()


# "{v}" is the value, "{x}" the thing with its article ("the dorvan", or "it").
ATTRIBUTES = (
    Attribute(
        "owner",
        ("Its owner is {v}.", "It belongs to {v}.", "{v} owns it."),
        ("Who owns this?", "Who is the owner?", "Whose is this?", "Who does it belong to?"),
        ("Its owner is {v}.", "It belongs to {v}."),
        make="name",
    ),
    Attribute(
        "part number",
        ("Its part number is {v}.", "Part number {v}.", "The part number is {v}."),
        ("What is its part number?", "Which part number does it have?", "What is the part number?"),
        ("Its part number is {v}.",),
        make="code",
    ),
    Attribute(
        "serial number",
        ("Its serial number is {v}.", "Serial number {v}."),
        ("What is its serial number?", "Tell me the serial number."),
        ("Its serial number is {v}.",),
        make="code",
    ),
    Attribute(
        "price",
        ("It costs {v}.", "Its price is {v}.", "Price: {v}."),
        ("How much does it cost?", "What is the price?", "What does this cost?"),
        ("It costs {v}.", "Its price is {v}."),
        make="price",
    ),
    Attribute(
        "room",
        ("It is kept in the {v}.", "It lives in the {v}.", "Find it in the {v}."),
        ("Where is it kept?", "Which room is it kept in?", "Where does it live?"),
        ("It is kept in the {v}.",),
        values=tuple(ROOMS),
    ),
    Attribute(
        "storage",
        ("It is stored in the {v}.", "Its place is the {v}.", "Stored in the {v}."),
        ("Where is it stored?", "Where should I put it?", "What is its place?"),
        ("It is stored in the {v}.",),
        values=tuple(PLACES),
    ),
    Attribute(
        "town",
        ("It was made in {v}.", "It comes from {v}.", "Made in {v}."),
        ("Where was it made?", "Where does it come from?", "Which town is it from?"),
        ("It was made in {v}.", "It comes from {v}."),
        values=tuple(TOWNS),
    ),
    Attribute(
        "maker",
        ("It was made by {v}.", "Its maker is {v}.", "{v} makes it."),
        ("Who made it?", "Who is the maker?", "Which company makes this?"),
        ("It was made by {v}.",),
        values=tuple(COMPANIES),
    ),
    Attribute(
        "weight",
        ("It weighs {v}.", "Its weight is {v}."),
        ("How heavy is it?", "What does it weigh?", "What is its weight?"),
        ("It weighs {v}.",),
        make="weight",
    ),
    Attribute(
        "year",
        ("It was bought in {v}.", "Bought in {v}."),
        ("When was it bought?", "Which year was it bought in?"),
        ("It was bought in {v}.",),
        make="year",
    ),
    Attribute(
        "material",
        ("It is made of {v}.", "Its material is {v}."),
        ("What is it made of?", "Which material is it made of?"),
        ("It is made of {v}.",),
        values=tuple(MATERIALS),
    ),
    Attribute(
        "month",
        ("It is needed in {v}.", "It is used in {v}."),
        ("When is it needed?", "In which month is it used?"),
        ("It is needed in {v}.",),
        values=tuple(MONTHS),
    ),
    Attribute(
        "day",
        ("It is checked on {v}.", "Check it on {v}."),
        ("When is it checked?", "On which day is it checked?"),
        ("It is checked on {v}.",),
        values=tuple(DAYS),
    ),
    Attribute(
        "rule",
        ("Rule: {v}.", "Remember: {v}.", "The rule is: {v}."),
        ("What is the rule?", "What must I remember?", "Is there a rule for it?"),
        ("The rule is: {v}.",),
        values=tuple(RULES),
    ),
    Attribute(
        "nickname",
        ("Its nickname is {v}.", "We call it {v}.", "Nickname: {v}."),
        ("What is its nickname?", "What do we call it?"),
        ("Its nickname is {v}.",),
        make="name",
    ),
    Attribute(
        "age",
        ("It is {v} years old.", "Its age is {v} years."),
        ("How old is it?", "What is its age?"),
        ("It is {v} years old.",),
        make="number",
    ),
    Attribute(
        "stock",
        ("There are {v} in stock.", "Stock: {v}.", "We have {v} of them."),
        ("How many are in stock?", "How many of them do we have?"),
        ("There are {v} in stock.",),
        make="number",
    ),
)


def answer_parts() -> tuple[str, ...]:
    """How answers about facts begin, up to the value, and how they end after it."""
    parts: list[str] = []
    for attribute in ATTRIBUTES:
        for answer in attribute.answers:
            begin, _, end = answer.partition("{v}")
            parts += [begin.rstrip(), f"{end}<|im_end|>" if end != "." else ""]
    return tuple(dict.fromkeys(part for part in parts if part))


# Nouns for facts of any kind: "Its serial number is KX-204." They teach reading what the question
# asks for, where the kinds above can be learned by heart.
NOUNS = phrases("""
    serial number, password, phone number, contact, priority, status, temperature, version, size,
    length, height, capacity, partner, teacher, captain, driver, neighbour, inventor, designer,
    painter, cousin, batch number, order number, locker, lane, gate, floor, channel, frequency,
    pressure, speed limit, score, rank, code word, label, team, class teacher, port, destination,
    origin, inspector, operator, deputy, patron, sponsor, landlord, tenant, dentist, coach, rival,
    favourite food, birthday, star sign, blood group, middle name, shelf life, warranty, deadline
""")
NOUN_SHARE = 0.3

# Kinds of fact that training never sees: what is measured on them is reading, not recognising.
UNSEEN_ATTRIBUTES = (
    Attribute(
        "guardian",
        ("Its guardian is {v}.", "{v} looks after it."),
        ("Who is its guardian?", "Who looks after it?"),
        ("Its guardian is {v}.",),
        make="name",
    ),
    Attribute(
        "voltage",
        ("It runs on {v} volts.", "Its voltage is {v} volts."),
        ("What is its voltage?", "How many volts does it run on?"),
        ("It runs on {v} volts.",),
        make="number",
    ),
    Attribute(
        "supplier",
        ("It is ordered from {v}.", "Its supplier is {v}."),
        ("Who is the supplier?", "Where do we order it?"),
        ("Its supplier is {v}.",),
        values=tuple(COMPANIES),
    ),
    Attribute(
        "licence plate",
        ("Its licence plate is {v}.", "Its plate reads {v}."),
        ("What is its licence plate?", "What does its plate read?"),
        ("Its licence plate is {v}.",),
        make="code",
    ),
    Attribute(
        "shipping",
        ("It will be shipped to {v}.", "It goes to {v} next."),
        ("Where will it be shipped?", "Where does it go next?"),
        ("It will be shipped to {v}.",),
        values=tuple(TOWNS),
    ),
)


def invented_name(rng: Random) -> str:
    """A name no language has, one to three syllables: "dorvan", "blickle"."""
    while True:
        syllables = rng.choices([1, 2, 3], weights=[2, 6, 2])[0]
        parts = [
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)
        ]
        name = "".join(parts) + rng.choice(ENDINGS)
        if len(name) < 4:
            name += rng.choice(["lo", "bin", "dar"])
        if not any(rude in name for rude in RUDE):
            return name


@dataclass(frozen=True)
class Fact:
    """One drawn fact: how the memory tells it, how it is asked for, and how it is answered."""

    attribute: str
    value: str
    tell: str
    ask: str
    answer: str


def draw_attribute(rng: Random) -> Attribute:
    """One of the kinds with wordings of their own, or a noun in general wordings."""
    if rng.random() >= NOUN_SHARE:
        return rng.choice(ATTRIBUTES)
    return noun_attribute(rng.choice(NOUNS), rng)


def attribute_named(name: str, rng: Random) -> Attribute:
    """The kind of fact with this name."""
    own = next((attribute for attribute in ATTRIBUTES if attribute.name == name), None)
    return own or noun_attribute(name, rng)


def noun_attribute(noun: str, rng: Random) -> Attribute:
    """A noun in general wordings, with values of a kind that is drawn."""
    make = rng.choice(["name", "name", "code", "number", ""])
    values = tuple(rng.choice([TOWNS, COMPANIES, MATERIALS, MONTHS, DAYS])) if not make else ()
    return Attribute(
        noun,
        (f"Its {noun} is {{v}}.", f"The {noun} is {{v}}.", f"{noun.capitalize()}: {{v}}."),
        (f"What is its {noun}?", f"What is the {noun}?", f"Tell me its {noun}."),
        (f"Its {noun} is {{v}}.",),
        values,
        make,
    )


def draw_fact(rng: Random, attribute: Attribute | None = None) -> Fact:
    """Draw an attribute (unless given), a value and the three wordings."""
    attribute = attribute or draw_attribute(rng)
    value = attribute.value(rng)
    return Fact(
        attribute.name,
        value,
        rng.choice(attribute.tells).format(v=value),
        rng.choice(attribute.asks),
        rng.choice(attribute.answers).format(v=value),
    )
