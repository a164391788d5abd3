"""`envs/*/run.sh`: programs that write what the suites' own scorers write, and `--official`'s way back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from suite_fakes import MODEL, SETTINGS, CompBenchTask, GenEvalTask, draw, options

from tritflow.evaluation.drawing import draw_images
from tritflow.evaluation.images import ImageSet, ImageSetError, ModelId

ENVS = Path(__file__).parents[2] / "envs"

GENEVAL = """
import json, os, re, sys
folder, outfile = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
assert os.path.isdir(sys.argv[sys.argv.index("--model-path") + 1])
with open(outfile, "w") as out:
    for sub in os.listdir(folder):
        if not os.path.isdir(os.path.join(folder, sub)) or not sub.isdigit():
            continue
        metadata = json.load(open(os.path.join(folder, sub, "metadata.jsonl")))
        for name in os.listdir(os.path.join(folder, sub, "samples")):
            row = {"filename": os.path.join(folder, sub, "samples", name), "tag": metadata["tag"]}
            row |= {"prompt": metadata["prompt"], "correct": sub != "00000", "reason": "", "details": "{}"}
            out.write(json.dumps({**row, "metadata": json.dumps(metadata)}) + "\\n")
print("scored", folder)
"""

COMPBENCH = """
import json, os, sys
words = " ".join(sys.argv[1:]).replace("=", " ").split()
flag = next(w for w in words if w in ("--out_dir", "--outpath", "--file-path"))
at = words[words.index(flag) + 1]
names = sorted(os.listdir(os.path.join(at, "samples")), key=lambda n: int(n.split("_")[-1].split(".")[0]))
place = {"BLIP_vqa.py": "annotation_blip", "2D_spatial_eval.py": "labels/annotation_obj_detection_2d",
    "3D_spatial_eval.py": "labels/annotation_obj_detection_3d", "numeracy_eval.py": "annotation_num",
    "Share_eval.py": "sharegpt4v"}[os.path.basename(sys.argv[0])]
os.makedirs(os.path.join(at, place), exist_ok=True)
number = lambda i, n: i if place == "annotation_blip" else int(n.split("_")[-1].split(".")[0])
rows = [{"question_id": number(i, n), "answer": 0.25} for i, n in enumerate(names)]
json.dump(rows, open(os.path.join(at, place, "vqa_result.json"), "w"))
print("scored", at)
"""


def pair(out: Path, task: GenEvalTask | CompBenchTask) -> list[ImageSet]:
    found = []
    for name, model in (("student-aaaa", MODEL), ("teacher-bbbb", ModelId("teacher", "bbbb"))):
        images = draw_images(out / name, task, task.prompts(), draw, model, SETTINGS, samples=2, batch_size=4)
        assert images is not None
        found.append(images)
    return found


def run(suite: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **{k: str(v) for k, v in variables.items()}}
    command = ["bash", str(ENVS / suite / "run.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_geneval_out_of_process(prompts: Path, tmp_path: Path) -> None:
    task = GenEvalTask(options(prompts))
    sets = pair(tmp_path / "out", task)
    scorer = tmp_path / "geneval" / "evaluation" / "evaluate_images.py"
    scorer.parent.mkdir(parents=True)
    scorer.write_text(GENEVAL)
    where = {"GENEVAL": tmp_path / "geneval", "DETECTOR": tmp_path}
    done = run("geneval", tmp_path / "out", **where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scored /") == 2
    for images in sets:
        assert sum(not j.passed for j in task.read_official(images)) == 2
    again = run("geneval", tmp_path / "out", **where)
    assert again.stdout.count("is scored") == 2
    assert "scored /" not in again.stdout
    (sets[0].folder / "results.jsonl").write_text("damaged")
    assert run("geneval", tmp_path / "out", **where).stdout.count("scored /") == 1
    assert task.read_official(sets[0])
    for arguments, words in (((tmp_path / "nowhere",), "usage"), ((tmp_path / "geneval",), "no finished picture")):
        refused = run("geneval", *arguments, **where)
        assert refused.returncode == 2
        assert words in refused.stderr


def test_compbench_out_of_process(prompts: Path, tmp_path: Path) -> None:
    task = CompBenchTask(options(prompts))
    sets = pair(tmp_path / "out", task)
    for place, name in (
        ("BLIPvqa_eval", "BLIP_vqa.py"),
        ("UniDet_eval", "2D_spatial_eval.py"),
        ("UniDet_eval", "3D_spatial_eval.py"),
        ("UniDet_eval", "numeracy_eval.py"),
        ("MLLM_eval/ShareGPT4V-CoT_eval", "Share_eval.py"),
    ):
        (tmp_path / "suite" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "suite" / place / name).write_text(COMPBENCH)
    where = {"COMPBENCH": tmp_path / "suite", "JUDGE_PYTHON": sys.executable}
    few = run("t2i-compbench", tmp_path / "out", "color", "numeracy", **where)
    assert few.returncode == 0, few.stderr
    assert few.stdout.count("scored /") == 4
    done = run("t2i-compbench", tmp_path / "out", **where)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("scored /"), done.stdout.count("is there")) == (12, 4)
    for images in sets:
        judged = {j.tag: j.score for j in task.read_official(images)}
        assert judged == {tag: 0.0025 if tag in ("non_spatial", "complex") else 0.25 for tag in task.tags}
    # Half of a category's output from the other model, with its note: refused.
    for name in ("shape/annotation_blip/vqa_result.json", "official.sha256"):
        (sets[0].folder / name).write_bytes((sets[1].folder / name).read_bytes())
    with pytest.raises(ImageSetError, match="is of other pictures"):
        task.read_official(sets[0])
    refused = run("t2i-compbench", tmp_path / "out", "colour", **where)
    assert refused.returncode == 2
    assert "there is no category 'colour'" in refused.stderr


@pytest.mark.parametrize("file", sorted(ENVS.rglob("requirements*.txt")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_requirement_is_pinned(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith(("#", "--"))]
    assert len(lines) > 10
    for line in lines:
        assert re.fullmatch(
            r"[A-Za-z0-9._-]+==[\w.]+|\S+ @ (git\+https://\S+@[0-9a-f]{40}|https://\S+-[\d.]+-\S+whl)", line
        )
