"""What T2I-CompBench's prompts ask for: two objects and a relation, counted objects, noun phrases.

The suite's scripts use spaCy (en_core_web_sm) for this. The fixed forms of the spatial and numeracy prompts need no
tagger. For noun phrases spaCy is taken when it is asked for; otherwise `noun_phrases`, a small rule-based stand-in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

from tritflow.evaluation.api import EvaluationError

SPACY_MODEL = "3.5.0"
"""Version of en_core_web_sm in the suite's requirements; another one is another checkpoint."""

RELATIONS_2D = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
RELATIONS_3D = ("in front of", "behind", "hidden")

_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The nouns that the suite counts (its list of 88, Karine-Huang/T2I-CompBench, MIT), by how their plural is made.
_WITH_S = _words(
    """
    airplane apple backpack bag balloon banana bear bee bicycle bird boat book bottle bowl boy bread cake camel camera
    candle car cat chair chicken clock computer cow cup desk dog drum duck egg flag frog giraffe girl guitar hamburger
    helicopter helmet horse key kite lamp lemon microphone microwave paddle painting pear pen phone pig pillow plate
    printer rabbit refrigerator ship sink sofa stool suitcase swan table television tent toy train truck turtle vase
    """
)
_IRREGULAR = {
    "butterfly": "butterflies",
    "strawberry": "strawberries",
    "knife": "knives",
    "man": "men",
    "woman": "women",
    "mouse": "mice",
    "person": "people",
    **{same: same for same in ("deer", "fish", "goldfish", "sheep", "shrimp")},
}
_PLURALS = {**{w: w + "s" for w in _WITH_S}, **{w: w + "es" for w in ("couch", "peach", "tomato")}, **_IRREGULAR}
_SINGULARS = {plural: word for word, plural in _PLURALS.items()}


def related_objects(prompt: str, relations: tuple[str, ...]) -> tuple[str, str, str]:
    """(relation, first object, second object) of a prompt of the form "a X RELATION a Y".

    The relation is the first of `relations` that the prompt contains. Raises `EvaluationError` for other forms.
    """
    relation = next((r for r in relations if r in prompt), None)
    words = re.findall(r"[\w'-]+", prompt)
    if relation is None or len(words) < 4:
        raise EvaluationError(f"the prompt '{prompt}' relates no two objects (one of {', '.join(relations)})")
    before = re.findall(r"[\w'-]+", prompt.partition(relation)[0])
    if not before:
        raise EvaluationError(f"the prompt '{prompt}' names nothing before '{relation}'")
    return relation, before[-1], words[-1]


def counted_objects(prompt: str) -> list[tuple[str, int]]:
    """[(object in the singular, number)] in the prompt's order: each number word from "a" to "eight" that stands
    before a countable object of the suite, in the form that fits the number.

    Raises `EvaluationError` when there is none.
    """
    words = re.findall(r"[\w'-]+|[^\w\s]", prompt)
    found = []
    for number, noun in pairwise(words):
        if number not in _NUMBERS:
            continue
        if noun in _PLURALS and _NUMBERS[number] == 1:
            found.append((noun, 1))
        elif noun in _SINGULARS:
            found.append((_SINGULARS[noun], _NUMBERS[number]))
    if not found:
        raise EvaluationError(f"the prompt '{prompt}' counts no object that the suite knows")
    return found


_DETERMINERS = frozenset(_words("a an the its his her their this these those one two three"))
_PRONOUNS = frozenset(_words("that which who whom him he she it they them"))
# What ends a noun phrase: prepositions, conjunctions, auxiliaries, and the verbs of the suite's sentences, whose forms
# are no nouns there.
_BREAKS = frozenset(
    _words(
        """
        of in on at by with without from to into onto over under above below behind between against through near next
        for while as and or but nor than both so is are was were be been being has have had do does did could will
        would may might must made make makes sit sits sitting stands standing stood lie lies lying lay hang hangs
        hanging hung hold holds holding held keep kept keeps provide provides provided display displays displayed
        decorate decorates decorated release releases mix mixes serve serves boil boils stir stirs attract attracts
        attracted illuminate illuminates measure measures write writes bake bakes cook cooks pound pounds cut cuts
        beat beats rest rests nap naps perch jot down parked placed mounted stacked neatly nearby shines featuring
        flash reads sparkled propelled controlled floated flowed led created dominated used waving arranged attached
        struggled fascinated left visible up out off away like contrasted sat wearing riding walking looking
        """
    )
)
# Nouns before whatever else ends a phrase ("a slice of", "a lamp stand."), verbs before anything else.
_EITHER = frozenset(_words("slice stand features feature can"))
_COLORS = frozenset(
    _words("black white red green blue yellow brown gray grey gold silver tan pink orange purple beige")
)


def noun_phrases(prompt: str) -> list[str]:
    """Noun phrases in order, with their determiners and adjectives, by rules alone.

    Conjunctions, commas, prepositions and verbs end a phrase; determiners begin one. It finds what spaCy 3.8 with
    en_core_web_sm 3.8 finds on 819 of the suite's 900 attribute prompts; on the others the questions asked differ, and
    with them the scores, which is why results name this function.
    """
    phrases: list[list[str]] = [[]]
    tokens = re.findall(r"[\w'-]+|[^\w\s]", prompt)
    for token, after in zip(tokens, [*tokens[1:], "."], strict=False):
        word, current = token.lower(), phrases[-1]
        if word == "and" and after in _COLORS and current and current[-1] in _COLORS:
            current.append(token)  # "a black and white cat" is one cat
        elif _ends_phrase(word) or (word in _EITHER and not _ends_phrase(after.lower())):
            phrases.append([])
        elif word in _DETERMINERS and phrases[-1]:
            phrases.append([token])
        else:
            phrases[-1].append(token)
    # A determiner, number or time alone is no phrase.
    return [" ".join(p) for p in phrases if any(w.lower() not in _DETERMINERS and not w.isdigit() for w in p)]


def _ends_phrase(word: str) -> bool:
    return not re.match(r"\w", word) or word in _BREAKS or word in _PRONOUNS


def phrase_finder(parser: str) -> tuple[str, str | None, Callable[[str], list[str]]]:
    """(name for results, what it stands in for, function) of the parser "rules" or "spacy".

    spaCy with the model that the suite's requirements pin is the authors' own and stands in for nothing.
    Raises `EvaluationError` for another parser, or when spaCy or its model en_core_web_sm is not installed.
    """
    official = f"spaCy en_core_web_sm {SPACY_MODEL}"
    if parser == "rules":
        return "tritflow noun phrases", official, noun_phrases
    if parser != "spacy":
        raise EvaluationError(f"there is no parser '{parser}' (available: rules, spacy)")
    try:
        import spacy

        nlp = spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        raise EvaluationError(
            "the parser spacy needs the package spacy and its model en_core_web_sm; install both, or take "
            "--scorer parser=rules"
        ) from None
    version = str(nlp.meta["version"])
    name = f"spaCy {spacy.__version__} en_core_web_sm {version}"
    return name, None if version == SPACY_MODEL else official, lambda p: [chunk.text for chunk in nlp(p).noun_chunks]
