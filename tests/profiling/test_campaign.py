"""Campaigns: order, deadlines, machines of one's own, and going on after a kill."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.profiling import campaign
from tritflow.profiling.campaign import Campaign, CampaignError, Job, load_campaign

# Sleeps, or waits for a file to appear; then writes when it began and ended, and which GPUs it saw.
MARK = (
    "import json,os,sys,time; b=time.time(); w=sys.argv[2]; "
    "[time.sleep(.02) for _ in range(2000) if not os.path.exists(w)] if '/' in w else time.sleep(float(w)); "
    "open(sys.argv[1],'a').write(json.dumps([b,time.time(),os.environ['CUDA_VISIBLE_DEVICES'],sys.argv[3:]])+chr(10))"
)


def job(name: str, folder: Path, wait: float | Path = 0.0, **more: Any) -> Job:
    command = f'python -c "{MARK}" {folder / name} {wait} {{results}} {{gpus}}'
    return Job(name, command, more.pop("seconds", 1.0), limit=60.0, **more)


def marks(folder: Path, name: str) -> list[Any]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(
    jobs: list[Job], folder: Path, seconds: float = 60, gpus: tuple[int, ...] = (0,), **more: Any
) -> dict[str, str]:
    ended = Campaign(jobs, folder / "work", folder / "results", gpus, **more).run(seconds)
    return {name: how["how"] for name, how in ended.items()}


def test_two_gpus_share_the_jobs_and_each_job_sees_its_own(tmp_path: Path) -> None:
    # The first waits for what the second writes, so they only end if they run at once.
    jobs = [
        job("a", tmp_path, tmp_path / "b"),
        job("b", tmp_path),
        job("pair", tmp_path, gpus=2),
        job("none", tmp_path, gpus=0),
    ]
    assert run(jobs, tmp_path, gpus=(3, 5)) == dict.fromkeys(("a", "b", "pair", "none"), "done")
    (a,), (b,), (pair,), (none,) = (marks(tmp_path, n) for n in ("a", "b", "pair", "none"))
    assert {a[2], b[2]} == {"3", "5"}
    assert pair[2] == "3,5"
    assert pair[3] == [str(tmp_path / "results"), "2"]
    assert pair[0] > max(a[1], b[1])
    assert none[2] == ""


def test_a_timing_has_the_machine_to_itself(tmp_path: Path) -> None:
    jobs = [job("first", tmp_path, 0.3), job("timing", tmp_path, 0.2, alone=True), job("last", tmp_path, 0.0)]
    assert set(run(jobs, tmp_path, gpus=(0, 1)).values()) == {"done"}
    (first,), (timing,), (last,) = (marks(tmp_path, n) for n in ("first", "timing", "last"))
    assert timing[0] > first[1]
    assert last[0] > timing[1]


def test_what_does_not_fit_into_the_time_gives_way_to_what_does(tmp_path: Path) -> None:
    jobs = [job("long", tmp_path, seconds=100.0), job("short", tmp_path, seconds=1.0)]
    assert run(jobs, tmp_path, seconds=10) == {"short": "done"}
    assert run(jobs, tmp_path, seconds=200) == {"short": "done", "long": "done"}
    assert len(marks(tmp_path, "short")) == 1  # the second call did not repeat it


def test_a_job_past_its_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    script = (
        "import subprocess,sys,time; subprocess.Popen([sys.executable,'-c','import time,sys; time.sleep(2); "
        "open(sys.argv[1],chr(119)).close()',sys.argv[1]]); time.sleep(60)"
    )
    hangs = Job("hangs", f'python -c "{script}" {alive}', 1.0, limit=0.7)
    after = job("after", tmp_path, after=("hangs",))
    assert run([hangs, after, job("free", tmp_path)], tmp_path) == {"hangs": "late", "free": "done"}
    time.sleep(2)
    assert not alive.exists()


def test_failures_are_kept_and_only_run_again_when_asked(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    fails = Job("fails", f"python -c \"import os,sys; print('why'); sys.exit(not os.path.exists('{flag}'))\"", 1.0)
    missing = Job("missing", "no-such-program-here --x", 1.0)
    assert run([fails, missing], tmp_path) == {"fails": "failed", "missing": "failed"}
    assert "why" in (tmp_path / "work" / "fails.log").read_text()
    flag.touch()
    assert run([fails, missing], tmp_path) == {"fails": "failed", "missing": "failed"}
    assert run([fails, missing], tmp_path, again=True) == {"fails": "done", "missing": "failed"}


def test_jobs_that_follow_wait_for_what_they_need(tmp_path: Path) -> None:
    jobs = [job("make", tmp_path, tmp_path / "other"), job("use", tmp_path, after=("make",)), job("other", tmp_path)]
    assert set(run(jobs, tmp_path, gpus=(0, 1)).values()) == {"done"}
    (make,), (use,), (other,) = (marks(tmp_path, n) for n in ("make", "use", "other"))
    assert use[0] > make[1]
    assert other[0] < make[1]


def test_the_end_of_the_time_cuts_what_runs_and_the_next_call_begins_it_again(tmp_path: Path) -> None:
    jobs = [job("slow", tmp_path, 3.0, seconds=0.5)]
    assert run(jobs, tmp_path, seconds=1.0) == {"slow": "cut"}
    assert run(jobs, tmp_path, seconds=30.0) == {"slow": "done"}


def test_a_killed_campaign_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    entry = "[[job]]\nname = \"{0}\"\ncommand = '''python -c \"{1}\" {2} {3}'''\nseconds = 1.0\nlimit = 60.0\n"
    jobs = [("quick", 0.0), ("slow", 2.0)]
    file.write_text("".join(entry.format(n, MARK, tmp_path / n, s) for n, s in jobs))
    words = ["bench", "campaign", str(file), "--gpus", "0", "--minutes", "1", "--workdir", str(tmp_path / "work")]
    first = subprocess.Popen([sys.executable, "-m", "tritflow.cli.main", *words], env=os.environ)
    state = tmp_path / "work" / "campaign.json"
    for _ in range(400):
        if state.exists() and "quick" in state.read_text():
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "slow" in done.stdout
    assert len(marks(tmp_path, "quick")) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no [[job]]"),
        ("[[job", "is not TOML"),
        ('[[job]]\nname = "a"\ncommand = "b"', "has no 'seconds'"),
        ('[[job]]\nname = "a"\ncommand = "b"\nsecond = 1', "unknown setting 'second'; did you mean 'seconds'?"),
        ('[[job]]\nname = "a"\ncommand = "b"\nseconds = 0', "seconds must be positive"),
        ('[[job]]\nname = "a"\ncommand = "b \'"\nseconds = 1', "No closing quotation"),
        ('[[job]]\nname = "a"\ncommand = ""\nseconds = 1', "empty command"),
        ('[[job]]\nname = "a/b"\ncommand = "b"\nseconds = 1', "without '/'"),
        ('[[job]]\nname = "a"\ncommand = "b"\nseconds = 1\nafter = ["c"]', "is after 'c'"),
        ('[[job]]\nname = "a"\ncommand = "b"\nseconds = 1\n' * 2, "two jobs are called 'a'"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(CampaignError) as error:
        load_campaign(file)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names_and_a_damaged_state(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match="tables"):
        load_campaign("table")
    with pytest.raises(CampaignError, match="No such file"):
        load_campaign(tmp_path / "none.toml")
    (tmp_path / "campaign.json").write_text("[")
    with pytest.raises(CampaignError, match="delete it"):
        Campaign([], tmp_path, tmp_path, [0])
    wrong = CliRunner().invoke(app, ["bench", "campaign", "tables", "--only", "nothing", "--gpus", "0"])
    assert wrong.exit_code == 2
    wrong = CliRunner().invoke(app, ["bench", "campaign", "tables", "--gpus", "x"])
    assert wrong.exit_code == 2


def test_the_campaigns_of_the_package_name_commands_that_exist() -> None:
    for name in campaign.campaign_names():
        summary, jobs = load_campaign(name)
        assert summary
        for one in jobs:
            words = one.command.split()
            if words[1:3] == ["-m", "torch.distributed.run"]:
                words = ["tritflow", *words[words.index("tritflow.cli.main") + 1 :]]
            options = [w.split("=")[0] for w in words if w.startswith("--")]
            help_of = [*(words[1:3] if words[1] == "bench" else words[1:2]), "--help"]
            shown = CliRunner().invoke(app, help_of).stdout if words[0] == "tritflow" else module_help(words[2])
            assert shown, one
            for option in options:
                assert option in shown, (one.name, option)


@cache
def module_help(module: str) -> str:
    """What `python -m MODULE --help` prints."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit):
        found.main(["--help"])
    return printed.getvalue()


def test_what_a_job_made_is_packed_at_once_and_nothing_else_with_it(tmp_path: Path) -> None:
    make = "import os,sys; os.chdir(sys.argv[1]);os.mkdir('student'); [open('student/'+n,'w') for n in ('weights','x')]"
    command = f'python -c "{make}" {{workdir}}'
    kept = ("{workdir}/student/weights", "{workdir}/nowhere")
    told: list[str] = []
    jobs = [Job("student", command, 1.0, limit=60.0, keep=kept), Job("broken", 'python -c "1/0"', 1.0, keep=kept)]
    assert run(jobs, tmp_path, tell=told.append) == {"student": "done", "broken": "failed"}
    with tarfile.open(tmp_path / "work" / "kept" / "student.tar") as archive:
        assert archive.getnames() == ["student/weights"]
    assert [p.name for p in (tmp_path / "work" / "kept").iterdir()] == ["student.tar"]
    (line,) = [t for t in told if "kept" in t]
    assert line.endswith(f"student.tar; not there: {tmp_path / 'work' / 'nowhere'}")
