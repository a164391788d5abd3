"""What CompBench's prompts ask for."""

from __future__ import annotations

import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from tritflow.calibration.prompts import suite_prompts
from tritflow.evaluation.api import EvaluationError, TaskOptions
from tritflow.evaluation.tasks import compbench_language as language
from tritflow.evaluation.tasks.t2i_compbench import CompBenchTask

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the suites' own files are not at hand")


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a cat on the top of a sofa", ("on the top of", "cat", "sofa")),
        ("a bird on side of a airplane", ("on side of", "bird", "airplane")),
        ("a cat next to a dog", ("next to", "cat", "dog")),
    ],
)
def test_two_objects_and_a_relation(prompt: str, found: tuple[str, str, str]) -> None:
    assert language.related_objects(prompt, language.RELATIONS_2D) == found


def test_relations_in_depth() -> None:
    assert language.related_objects("a car hidden by a plate", language.RELATIONS_3D) == ("hidden", "car", "plate")
    for bad in ("a cat", "near a dog by", "a cat with a dog"):
        with pytest.raises(EvaluationError, match=r"relates no two objects|names nothing before"):
            language.related_objects(bad, language.RELATIONS_2D)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("seven cups", [("cup", 7)]),
        ("a chicken, four birds, and four microphones sang", [("chicken", 1), ("bird", 4), ("microphone", 4)]),
        ("two sheep and one fish", [("sheep", 2), ("fish", 1)]),
        ("six people gathered for a picnic", [("person", 6)]),
        ("two mice, three butterflies and two tomatoes", [("mouse", 2), ("butterfly", 3), ("tomato", 2)]),
    ],
)
def test_counted_objects(prompt: str, found: list[tuple[str, int]]) -> None:
    assert language.counted_objects(prompt) == found


def test_nothing_to_count() -> None:
    with pytest.raises(EvaluationError, match="counts no object"):
        language.counted_objects("a lively tune")


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
        ("rubber sole shoes and fluffy clouds", ["rubber sole shoes", "fluffy clouds"]),
        ("a triangular slice of pizza and a pizza box.", ["a triangular slice", "pizza", "a pizza box"]),
        ("A black and white cat sits in a white sink.", ["A black and white cat", "a white sink"]),
        (
            "The glass vase and metallic stand display the wooden flowers on the fabric dresser.",
            ["The glass vase", "metallic stand", "the wooden flowers", "the fabric dresser"],
        ),
        ("", []),
    ],
)
def test_noun_phrases(prompt: str, found: list[str]) -> None:
    assert language.noun_phrases(prompt) == found


@needs_files
def test_every_prompt_of_the_suite_can_be_read() -> None:
    val = suite_prompts("t2i_compbench", SHARED).select(split="val")
    relations = Counter()
    for p in val.select(category="spatial"):
        relation, first, second = language.related_objects(p.text, language.RELATIONS_2D)
        assert p.text.split()[1] == first
        assert p.text.endswith(second)
        relations[relation] += 1
    assert sum(relations.values()) == 300
    assert "on top of" not in relations
    for p in val.select(category="3d_spatial"):
        language.related_objects(p.text, language.RELATIONS_3D)
    numbers = [len(language.counted_objects(p.text)) for p in val.select(category="numeracy")]
    assert (len(numbers), min(numbers), max(numbers)) == (300, 1, 5)
    phrases = [
        len(language.noun_phrases(p.text)) for c in ("color", "shape", "texture") for p in val.select(category=c)
    ]
    assert len(phrases) == 900
    assert min(phrases) >= 1
    assert max(phrases) <= 9


def test_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    name, stands_for, find = language.phrase_finder("rules")
    assert (name, stands_for) == ("tritflow noun phrases", "spaCy en_core_web_sm 3.5.0")
    assert find("a red cup") == ["a red cup"]
    with pytest.raises(EvaluationError, match="no parser 'nltk'"):
        language.phrase_finder("nltk")
    monkeypatch.setitem(sys.modules, "spacy", None)  # as if it were not installed
    with pytest.raises(EvaluationError, match=r"needs the package spacy.*--scorer parser=rules"):
        language.phrase_finder("spacy")


@pytest.mark.parametrize(("version", "stands_for"), [("3.5.0", None), ("3.8.0", "spaCy en_core_web_sm 3.5.0")])
def test_spacy_stands_in_for_nothing_but_another_version_of_its_model(
    version: str, stands_for: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spacy = types.ModuleType("spacy")
    nlp = types.SimpleNamespace(meta={"version": version})
    spacy.load, spacy.__version__ = lambda name: nlp, "3.5.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    name, found, _ = language.phrase_finder("spacy")
    assert name == f"spaCy 3.5.3 en_core_web_sm {version}"
    assert found == stands_for
    # In a suite's run the authors' own parser is a scorer and no substitute.
    task = CompBenchTask(TaskOptions(scorers={"parser": "spacy"}))
    task.use(vqa=types.SimpleNamespace(name="scripted"))
    task._attributes()
    assert task.scorers["parser"] == name
    assert ("parser" in task.substitutes) == (stands_for is not None)
    assert "vqa" in task.substitutes
