"""`tritflow bench campaign`: many measurements on the GPUs at hand, within the minutes that they are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Json
from tritflow.cli.console import FAILURE, print_json, say

_CAMPAIGN = """Examples:

\b
  tritflow bench campaign --list                        # what there is, and what it takes
  tritflow bench campaign tables --minutes 25           # every table of the pages, the most wanted first
  tritflow bench campaign tables --minutes 9 --gpus 0,1 # again: goes on with what is not done
  tritflow bench campaign mine.toml --only kernels --only lora
"""


@app.command(epilog=_CAMPAIGN)
def campaign(
    name: Annotated[str, typer.Argument(help="A campaign of the package, or a .toml file.")] = "tables",
    minutes: Annotated[float, typer.Option(min=0.01, help="How long the GPUs may be used.")] = 25.0,
    gpus: Annotated[str, typer.Option(help="Numbers of the GPUs, with commas (default: all).")] = "",
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this job; may be repeated.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Run jobs again that failed or took too long.")] = False,
    workdir: Annotated[Path, typer.Option("--workdir", help="Logs and state.")] = Path("runs/campaign"),
    results: Annotated[Path, typer.Option("--results", help="Folder that results append to.")] = Path(
        "benchmarks/results"
    ),
    listing: Annotated[
        bool, typer.Option("--list", help="Show the jobs with their expected seconds, run none.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a list of measuring commands within the minutes given, the most wanted first; killed, it goes on.

    Timings have the machine to themselves, everything else shares the GPUs. Nothing begins that is not expected to end
    in time.
    """
    from tritflow.profiling import campaign as room

    summary, jobs = room.load_campaign(name)
    names = [job.name for job in jobs]
    for wanted in only or ():
        if wanted not in names:
            raise room.CampaignError(f"campaign {name} has no job '{wanted}' (it has: {', '.join(names)})")
    if only:
        jobs = [job for job in jobs if job.name in only]
    if listing:
        print(summary)
        for job in jobs:
            print(f"{job.seconds:6.0f} s  {job.name:<24} {job.command}")
        return
    run = room.Campaign(jobs, workdir, results, _numbers(gpus), again=again, tell=say)
    ended = {name: how for name, how in run.run(60 * minutes).items() if name in {job.name for job in jobs}}
    left = [job.name for job in run.waiting()]
    if json:
        print_json({"jobs": ended, "left": left})
    else:
        for job in jobs:
            how = ended.get(job.name)
            print(f"{job.name:<24} " + (f"{how['how']:<7} {how['seconds']:7.0f} s" if how else "not run"))
    if any(e["how"] in (room.FAILED, room.LATE) for e in ended.values()):
        say(f"a job did not end well; its output is in {workdir}/NAME.log, --again runs it once more")
        raise typer.Exit(FAILURE)


def _numbers(gpus: str) -> list[int]:
    """The GPUs' numbers: those given, else all that PyTorch sees."""
    from tritflow.profiling.campaign import CampaignError

    if not gpus:
        import torch

        return list(range(torch.cuda.device_count()))
    try:
        return [int(word) for word in gpus.split(",")]
    except ValueError:
        raise CampaignError(f"--gpus {gpus}: give numbers with commas, such as 0,1") from None
