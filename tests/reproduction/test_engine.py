"""Stages known by what lies there: what is skipped, continued, and done again, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tritflow.reproduction.engine import Engine, ReproductionError, Stage


class Kitchen:
    """Two files made of words, the second from the first, and a log of what was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words = {"dough": "flour", "bread": "oven"}
        self.log: list[str] = []
        self.dies = ""

    def stage(self, name: str, needs: tuple[str, ...] = (), mends: bool = False) -> Stage:
        path = self.folder / f"{name}.txt"

        def run(report: Any) -> None:
            self.log.append(name)
            if self.dies == name:
                raise KeyboardInterrupt
            before = [(self.folder / f"{n}.txt").read_text() for n in needs]
            path.write_text(" ".join([*before, self.words[name]]))

        return Stage(
            name,
            f"making {name}",
            needs,
            lambda: {"word": self.words[name]},
            lambda: {"text": path.read_text()} if path.exists() else None,
            run,
            lambda: [path],
            mends=mends,
        )

    def engine(self) -> Engine:
        return Engine(self.folder, [self.stage("dough"), self.stage("bread", ("dough",))])

    def run(self) -> tuple[list[str], list[str]]:
        said: list[str] = []
        return self.engine().run(lambda *_: None, said.append), said


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path / "run")


def kinds(kitchen: Kitchen) -> list[str]:
    return [s.kind for s in kitchen.engine().states().values()]


def test_what_is_done_stays_done(kitchen: Kitchen) -> None:
    assert kinds(kitchen) == ["new", "waiting"]
    assert kitchen.run() == (["dough", "bread"], ["making dough", "making bread"])
    assert kinds(kitchen) == ["done", "done"]
    assert kitchen.run() == ([], [])
    assert kitchen.log == ["dough", "bread"]


def test_changed_inputs_redo_what_depends_on_them_and_say_so(kitchen: Kitchen) -> None:
    kitchen.run()
    kitchen.words["bread"] = "stone"
    assert kitchen.run() == (["bread"], ["making bread (again: word was oven, now stone)"])
    kitchen.words["dough"] = "rye"
    assert kinds(kitchen) == ["changed", "waiting"]
    done, said = kitchen.run()
    assert done == ["dough", "bread"]
    assert said[1] == "making bread (again: dough left something else)"
    assert (kitchen.folder / "bread.txt").read_text() == "rye stone"


def test_a_flag_is_not_believed(kitchen: Kitchen) -> None:
    kitchen.run()
    (kitchen.folder / "bread.txt").write_text("mould")
    assert kinds(kitchen) == ["done", "damaged"]
    done, said = kitchen.run()
    assert done == ["bread"]
    assert "was changed or removed" in said[0]
    (kitchen.folder / "dough.txt").unlink()
    # What it makes again is what was there: the bread does not have to be baked once more.
    assert kitchen.run()[0] == ["dough"]


def test_a_killed_stage_goes_on_and_keeps_its_half(kitchen: Kitchen) -> None:
    kitchen.dies = "bread"
    with pytest.raises(KeyboardInterrupt):
        kitchen.run()
    half = kitchen.folder / "bread.txt"
    half.write_text("half")
    assert kinds(kitchen) == ["done", "begun"]
    kitchen.dies = ""
    assert kitchen.run() == (["bread"], ["making bread (goes on)"])
    # Begun with other inputs, the half is of no use.
    kitchen.dies, kitchen.words["bread"] = "bread", "stone"
    with pytest.raises(KeyboardInterrupt):
        kitchen.run()
    half.write_text("half")
    kitchen.words["bread"] = "pan"
    kitchen.dies = "bread"
    with pytest.raises(KeyboardInterrupt):
        kitchen.run()
    assert not half.exists()


def test_a_stage_that_mends_itself_keeps_what_is_left(tmp_path: Path) -> None:
    kitchen = Kitchen(tmp_path)
    engine = Engine(tmp_path, [kitchen.stage("dough", mends=True)])
    engine.run(lambda *_: None)
    (tmp_path / "dough.txt").write_text("old")
    seen = []
    stage = engine.stages[0]
    engine.stages[0] = Stage(
        **{**vars(stage), "run": lambda r: (seen.append((tmp_path / "dough.txt").read_text()), stage.run(r))}
    )
    engine.run(lambda *_: None)
    assert seen == ["old"]


def test_nothing_outside_is_removed(kitchen: Kitchen) -> None:
    kitchen.run()
    outside = kitchen.folder.parent / "precious"
    outside.mkdir()
    record = kitchen.folder / "stages" / "bread.json"
    data = json.loads(record.read_text())
    for bad in ("../precious", ".", ""):
        record.write_text(json.dumps({**data, "owns": [bad]}))
        kitchen.words["bread"] = f"stone {bad}"
        with pytest.raises(ReproductionError, match="lies outside of"):
            kitchen.run()
    assert outside.exists()
    assert (kitchen.folder / "dough.txt").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"key": {}}'])
def test_a_broken_record_is_named(kitchen: Kitchen, text: str) -> None:
    kitchen.run()
    (kitchen.folder / "stages" / "dough.json").write_text(text)
    with pytest.raises(ReproductionError, match=r"dough\.json: is not a stage's record; delete it"):
        kitchen.run()


def test_two_runs_at_once_are_refused(kitchen: Kitchen) -> None:
    kitchen.run()
    with kitchen.engine()._alone(), pytest.raises(ReproductionError, match="another process is at work"):
        kitchen.run()


def test_a_stage_without_a_result_is_an_error(tmp_path: Path) -> None:
    stage = Stage("s", "s", (), dict, lambda: None, lambda r: None, list)
    with pytest.raises(ReproductionError, match="stage s ended without its result"):
        Engine(tmp_path, [stage]).run(lambda *_: None)
