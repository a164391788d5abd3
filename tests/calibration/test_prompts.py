import hashlib
import io
import urllib.error
from pathlib import Path

import pytest

from tritflow.calibration import prompt_sources
from tritflow.calibration.prompt_sources import FILES, PromptsError, SourceFile, fetch
from tritflow.calibration.prompts import (
    PAPER_COUNT,
    Prompt,
    PromptSet,
    from_texts,
    load_prompts,
    normalise,
    overlap,
    paper_prompts,
    suite_prompts,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the suites' own files are not at hand")


@needs_files
def test_the_papers_set_is_7232():
    prompts = paper_prompts(SHARED)
    assert len(prompts) == PAPER_COUNT
    assert prompts.counts == {"partiprompts/train": 1632, "t2i_compbench/train": 5600}
    compbench = prompts.select(source="t2i_compbench")
    assert {c: len(compbench.select(category=c)) for c in prompt_sources.CATEGORIES} == dict.fromkeys(
        prompt_sources.CATEGORIES, 700
    )
    assert len({p.text for p in compbench}) == 5559
    assert all(p.text == p.text.strip() and p.text for p in prompts)


@needs_files
def test_suites_and_their_overlap():
    compbench = suite_prompts("t2i_compbench", SHARED)
    train, val = compbench.select(split="train"), compbench.select(split="val")
    assert (len(train), len(val)) == (5600, 2400)
    shared = overlap(train, val)
    found = {c: len(overlap(train.select(category=c), val.select(category=c))) for c in ("shape", "spatial")}
    assert found == {"shape": 4, "spatial": 2}
    assert len(shared) == 6
    assert len(suite_prompts("geneval", SHARED)) == 553
    with pytest.raises(PromptsError, match="did you mean 'geneval'"):
        suite_prompts("geneva", SHARED)


def test_jsonl_round_trip(tmp_path):
    prompts = PromptSet("x", (Prompt("a «red» cube", "s", "color"), Prompt("two dogs", "s", split="val")))
    path = prompts.write(tmp_path / "prompts.jsonl")
    again = load_prompts(tmp_path)
    assert again.prompts == prompts.prompts
    assert again.sha256 == prompts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert prompts.sha256 != PromptSet("x", prompts.prompts[::-1]).sha256


def test_user_files(tmp_path):
    plain = tmp_path / "mine.txt"
    plain.write_text("a red cube\n\n  a blue ball  \n")
    assert load_prompts(plain).texts == ["a red cube", "a blue ball"]
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"prompt": "a dog", "category": "animals"}\n')
    assert load_prompts(lines)[0] == Prompt("a dog", "mine", "animals")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("bad.jsonl", b'{"text": "ok"}\nnot json\n', r"bad.jsonl:2 is not JSON"),
        ("bad.jsonl", b'{"caption": "x"}\n', 'no "text"'),
        ("bad.jsonl", b"[1]\n", 'no "text"'),
        ("latin.txt", b"caf\xe9\n", "not UTF-8"),
        ("absent.txt", None, "No such file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptsError, match=message):
        load_prompts(tmp_path / name)


def test_overlap_is_normalised():
    assert normalise("  A red\tcube. ") == "a red cube"
    assert overlap(["A red cube.", "x"], [Prompt("a  red cube", "s"), Prompt("y", "s")]) == ["a red cube"]


def test_sample_is_stable_and_ordered():
    prompts = from_texts([f"p{i}" for i in range(50)])
    chosen = prompts.sample(10, seed=1)
    assert chosen.texts == prompts.sample(10, seed=1).texts
    assert chosen.texts != prompts.sample(10, seed=2).texts
    assert [int(t[1:]) for t in chosen.texts] == sorted(int(t[1:]) for t in chosen.texts)
    assert prompts.sample(0) is prompts
    with pytest.raises(PromptsError, match="blank"):
        from_texts(["a", " "])


def _file(content: bytes) -> SourceFile:
    return SourceFile("suite", "f.txt", "owner/name", "0" * 40, "f.txt", hashlib.sha256(content).hexdigest(), "MIT", 1)


def test_fetch_checks_what_came_and_fetches_once(tmp_path, monkeypatch):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(b"one prompt\n")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    good = _file(b"one prompt\n")
    states = []
    for _ in range(2):
        fetch(tmp_path, files=[good], on_file=lambda f, s: states.append(s))
    assert states == ["fetched", "present"]
    assert asked == [good.url]
    assert good.read(tmp_path) == "one prompt\n"
    good.at(tmp_path).write_bytes(b"changed")
    with pytest.raises(PromptsError, match="fetch it again"):
        good.read(tmp_path)
    with pytest.raises(PromptsError, match="not kept"):
        fetch(tmp_path, files=[_file(b"something else")])
    assert sorted(p.name for p in (tmp_path / "suite").iterdir()) == ["f.txt"]


def test_offline_is_one_clear_line(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(PromptsError, match=r"cannot fetch PartiPrompts\.tsv") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert "--prompts" in str(caught.value)
    with pytest.raises(PromptsError, match="tritflow prompts fetch"):
        paper_prompts(tmp_path)


def test_files_are_pinned():
    assert len({f.at(Path()) for f in FILES}) == len(FILES) == 19
    assert all(len(f.commit) == 40 and len(f.sha256) == 64 and f.commit in f.url for f in FILES)


@needs_files
def test_what_compbench_shares_with_the_papers_prompts():
    """The paper trains on CompBench's train prompts and scores on its val prompts: six are in both."""
    val = suite_prompts("t2i-compbench", SHARED).select(split="val")
    assert len(overlap(val, paper_prompts(SHARED))) == 6
    assert overlap(suite_prompts("geneval", SHARED), paper_prompts(SHARED)) == []
