"""Both suites killed while they are drawn, by SIGKILL and anywhere, and resumed: the bytes of an unbroken run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_fakes import folder_bytes
from suite_fakes import CompBenchTask, GenEvalTask, draw_suite, options

import forked

HERE = str(Path(__file__).parent)

# One process imports everything and forks a child for each run, so that a kill costs milliseconds.
KILLER = """
import json, os, random, signal, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pytest, suite_fakes
import tritflow.evaluation.drawing as drawing
from PIL import Image
Image.init()
suite, out = sys.argv[2], Path(sys.argv[3])
options = suite_fakes.options(suite_fakes.small_suites(out / "prompts", pytest.MonkeyPatch()))
kind = {"geneval": suite_fakes.GenEvalTask, "t2i-compbench": suite_fakes.CompBenchTask}[suite]

kill_at, steps = [None], []
def step(what):
    if kill_at[0] == len(steps):
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(what)
def dying(what):
    return kill_at[0] == len(steps)
# Before a rename, after it, amid a picture's bytes, amid a manifest line, before and after a batch is drawn.
real_replace, real_write, real_note, real_draw = os.replace, drawing.FileSink.write, drawing._note, suite_fakes.draw
def replace(a, b):
    step("before a rename"); real_replace(a, b); step("after a rename")
def write(self, data):
    if dying("bytes"):
        real_write(self, data[: len(data) // 2]); self._file.flush()
    step("amid a picture")
    return real_write(self, data)
def note(waiting, manifest, done):
    if waiting and dying("line"):
        line = drawing.canonical(waiting[0].result()).encode()
        manifest.write(line[: len(line) // 2]); manifest.flush()
    step("amid a line")
    count = real_note(waiting, manifest, done)
    step("batch noted")
    return count
def draw(prompts, seeds):
    step("batch begun")
    found = real_draw(prompts, seeds)
    step("batch drawn")
    return found
os.replace, drawing.FileSink.write, drawing._note, suite_fakes.draw = replace, write, note, draw

def run(folder, at):
    \"\"\"In a child; returns (killed, steps of the run).\"\"\"
    notes = out / "steps.json"
    child = os.fork()
    if child == 0:
        kill_at[0] = at
        suite_fakes.draw_suite(folder, kind(options))
        notes.write_text(json.dumps(steps))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, status
    return killed, None if killed else json.loads(notes.read_text())

steps_of_all = run(out / "counted", None)[1]
r = random.Random(11)
points = r.sample(range(len(steps_of_all)), 20)
points += [i for i, what in enumerate(steps_of_all) if what.startswith("batch")]
points += [steps_of_all.index(what) for what in ("before a rename", "after a rename")]
said = []
for number, at in enumerate(points):
    folder = out / f"killed-{number}"
    killed, _ = run(folder, at)
    assert killed, at
    again = run(folder, r.randrange(len(steps_of_all)))[0]  # the second run may end before it is killed
    run(folder, None)
    said.append([at, steps_of_all[at], again])
print(json.dumps(said))
"""


@pytest.mark.parametrize("suite", [GenEvalTask, CompBenchTask])
def test_killed_at_twenty_random_points_and_at_every_batch(
    suite: type[GenEvalTask] | type[CompBenchTask], tmp_path: Path, prompts: Path
) -> None:
    """Twenty random points, the boundaries of all batches and a rename, each killed, then killed again, then left to
    finish."""
    draw_suite(tmp_path / "whole", suite(options(prompts)))
    wanted = folder_bytes(tmp_path / "whole")
    (tmp_path / "kills").mkdir()
    done = forked.run(["-c", KILLER, HERE, suite.name, tmp_path / "kills"])
    assert done.poll() == 0, done.stderr
    kills = json.loads(done.stdout)
    assert len(kills) > 30
    assert len({at for at, _, _ in kills[:20]}) == 20
    places = {what for _, what, _ in kills}
    assert {"batch begun", "batch drawn", "batch noted", "before a rename", "after a rename"} <= places
    assert sum(again for _, _, again in kills) > 10
    for number in range(len(kills)):
        assert folder_bytes(tmp_path / "kills" / f"killed-{number}") == wanted, kills[number]
