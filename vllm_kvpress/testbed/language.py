"""The words and wordings of the testbed's language.

The bundled model knows no other: facts hidden between sentences of a small filler grammar, and
questions about them. A fact may be worded in several ways and so may a question, whatever the
wording of the other; in every fact the value comes after its key, with no other key between them.
Every word is one token of the model's tokenizer, every digit and punctuation mark too, so lengths
are exact.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise

NAMES = (
    "alice bruno carla diego elena felix greta henry irene jonas karen lucas maria nolan olive "
    "pedro quinn rosa simon tessa ursula victor wanda xavier yvonne zelda adam bella colin daisy "
    "edgar fiona george hanna ivan julia kevin laura martin nadia oscar paula ralph sofia thomas "
    "vera walter yusuf zara amber boris cecil donna ernest flora gavin hazel isaac janet kurt "
    "linda"
).split()
VARIABLES = (
    "zor kip lum dax fen gub hix jov kem lop miv nuz pog qar rud sef tiv vok wem yad zil bex cor "
    "dum fip gam hol juk kas ler mup nid pax qib rem sol tug vim wok yun zeb bal cif dob fur gid "
    "hep jam kol lin mag nef pid ras sut tal vex wuz yim zan bog cud dep bim cav dof ful gox hud "
    "jed kef lud mig"
).split()
NOUNS = (
    "garden river market harbor bridge castle forest village meadow station library kitchen "
    "window lantern wagon ladder basket mirror carpet blanket candle orchard valley mountain "
    "island tower chapel cottage stable barn mill road path field lake pond shore boat train "
    "engine clock piano violin drum flute painting statue letter parcel book map journal ticket "
    "coin button ribbon hat coat scarf boot glove apple pear plum cherry bread cheese soup cake "
    "table chair bench shelf"
).split()
ADJECTIVES = (
    "old new small large quiet noisy bright dark heavy light narrow wide empty full clean dusty "
    "broken simple strange gentle rough smooth warm cold wet dry tall short young ancient green "
    "red blue yellow white black grey brown golden silver hidden open closed busy distant"
).split()
VERBS = (
    "crossed watched found carried painted repaired visited followed cleaned opened built moved "
    "forgot remembered described admired ignored counted measured bought sold lost kept pushed"
).split()
ADVERBS = "slowly quickly quietly often rarely always never again today yesterday gladly".split()
PLACES = "behind under above beside beyond inside around across".split()
ORDINALS = ("one", "two", "three", "four")

CODE_DIGITS = 5
NAMED_FILLER_SHARE = 0.1

PASS_CODE_FACTS = (
    "the pass code of {key} is this: {value}.",
    "the pass code of {key} is {value}.",
    "{key} has the pass code {value}.",
    "for {key} the pass code is {value}.",
)
PASS_CODE_QUESTIONS = (
    "what is the pass code of {key}?",
    "tell me the pass code of {key}.",
    "which pass code has {key}?",
    "what pass code does {key} have?",
)
NUMBERED_FACTS = (
    "the pass code of {key} number {ordinal}: {value}.",
    "the pass code of {key} number {ordinal} is {value}.",
    "{key} has the pass code number {ordinal}: {value}.",
)
NUMBERED_QUESTIONS = (
    "list the {ordinal} pass codes of {key}.",
    "tell me the {ordinal} pass codes of {key}.",
    "what are the {ordinal} pass codes of {key}?",
)
ASSIGNMENTS = ("{key}= {value};", "let {key}= {value};", "set {key}= {value};")
VALUE_QUESTIONS = (
    "what value has {key}?",
    "what is the value of {key}?",
    "tell me the value of {key}.",
)
PASSAGE_FACTS = (
    "the passage of {key} is this: {value}.",
    "{key} wrote this: {value}.",
    "this is the passage of {key}: {value}.",
)
PASSAGE_QUESTIONS = (
    "repeat the passage of {key}.",
    "what is the passage of {key}?",
    "tell me the passage of {key}.",
)
WORDINGS = (
    *PASS_CODE_FACTS,
    *PASS_CODE_QUESTIONS,
    *NUMBERED_FACTS,
    *NUMBERED_QUESTIONS,
    *ASSIGNMENTS,
    *VALUE_QUESTIONS,
    *PASSAGE_FACTS,
    *PASSAGE_QUESTIONS,
)

_PIECE = re.compile(r" ?[a-z]+|(?: |^)(?=\d)|\d|[^\w\s]")


def vocabulary() -> list[str]:
    """Return every word of the language once, in a fixed order."""
    wording_words = re.findall(r"\b[a-z]+\b", re.sub(r"{\w+}", "", " ".join(WORDINGS)))
    lists = (NAMES, VARIABLES, NOUNS, ADJECTIVES, VERBS, ADVERBS, PLACES, ORDINALS)
    words = [word for listed in lists for word in listed]
    return list(dict.fromkeys([*words, *wording_words, "answer"]))


def split_tokens(text: str) -> list[str]:
    """Split a text of this language into its tokens, the sequence-start token aside.

    A word is one token, the space before it included, and so are a digit and a punctuation mark; a
    number standing after a space, or first, is preceded by a token for that space.
    """
    return _PIECE.findall(text)


def count_tokens(text: str) -> int:
    """Count the tokens of a text of this language, sequence-start token included."""
    return 1 + len(split_tokens(text))


def reword(rng: random.Random, wordings: tuple[str, ...], key: str, value: str = "") -> str:
    """Return one of the wordings of a fact or a question, about a key."""
    return rng.choice(wordings).format(key=key, value=value)


def draw_code(rng: random.Random) -> str:
    """Draw a code whose first digit is not zero."""
    return str(rng.randint(10 ** (CODE_DIGITS - 1), 10**CODE_DIGITS - 1))


def draw_codes(rng: random.Random, number: int) -> list[str]:
    """Draw distinct codes."""
    codes: dict[str, None] = {}
    while len(codes) < number:
        codes[draw_code(rng)] = None
    return list(codes)


def numbered_facts(rng: random.Random, name: str, codes: list[str]) -> list[str]:
    """Write numbered facts about one name."""
    return [
        rng.choice(NUMBERED_FACTS).format(key=name, ordinal=ordinal, value=code)
        for ordinal, code in zip(ORDINALS, codes, strict=False)
    ]


def numbered_question(rng: random.Random, name: str, codes: list[str]) -> tuple[str, str]:
    """Ask for all numbered codes of a name; return the question and its answer."""
    question = rng.choice(NUMBERED_QUESTIONS).format(key=name, ordinal=ORDINALS[len(codes) - 1])
    return question, ", ".join(f"{o}: {c}" for o, c in zip(ORDINALS, codes, strict=False))


def chain_facts(rng: random.Random, variables: list[str], code: str) -> list[str]:
    """Assign a code to the first variable, and to each other one the variable before it."""
    links = [reword(rng, ASSIGNMENTS, variables[0], code)]
    return links + [reword(rng, ASSIGNMENTS, name, source) for source, name in pairwise(variables)]


def chain_question(rng: random.Random, variables: list[str], code: str) -> tuple[str, str]:
    """Ask for the value of the last variable; the answer spells the way to it."""
    trace = " ".join(f"{name}=" for name in reversed(variables))
    return reword(rng, VALUE_QUESTIONS, variables[-1]), f"{trace} {code}"


def passage(rng: random.Random, number: int) -> str:
    """Draw distinct words."""
    return " ".join(rng.sample([*NOUNS, *ADJECTIVES, *VERBS], number))


def filler_sentence(rng: random.Random) -> str:
    """Write one sentence of the filler grammar."""
    named = rng.random() < NAMED_FILLER_SHARE
    subject = rng.choice(NAMES) if named else f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    tail = rng.choice(
        ("", f" {rng.choice(ADVERBS)}", f" {rng.choice(PLACES)} the {rng.choice(NOUNS)}")
    )
    return f"{subject} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}{tail}."
