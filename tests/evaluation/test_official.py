"""What the suites' own scorers leave is read back, and what is not of this very folder is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from suite_fakes import MODEL, SETTINGS, CompBenchTask, GenEvalTask, draw, options

from tritflow.evaluation import official
from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.drawing import draw_images
from tritflow.evaluation.images import ImageSet, ImageSetError, ModelId


def drawn(folder: Path, task: Any, model: ModelId = MODEL, base_seed: int = 0) -> ImageSet:
    images = draw_images(
        folder, task, task.prompts(), draw, model, SETTINGS, samples=2, batch_size=4, base_seed=base_seed
    )
    assert images is not None
    return images


def stamp(folder: Path, *left: str) -> None:
    """As the scripts in envs/ do, after scoring."""
    done = subprocess.run(["sha256sum", "manifest.jsonl", *left], cwd=folder, capture_output=True, check=True)
    with (folder / official.STAMP).open("ab") as file:
        file.write(done.stdout)


def geneval_rows(images: ImageSet, root: str | None = None) -> list[dict[str, Any]]:
    """What evaluate_images.py writes, in the order of a folder's listing."""
    metadata = {r.id: r.metadata for r in images.records}
    return [
        {
            "filename": f"{root or images.folder}/{e['path']}",
            "tag": e["tag"],
            "prompt": e["prompt"],
            "correct": e["sample"] == 0,
            "reason": "" if e["sample"] == 0 else "expected\n cow",
            "metadata": json.dumps(metadata[e["prompt_id"]]),
            "details": json.dumps({"cow": [[0, 0, 1, 1, 0.9]]}),
        }
        for e in reversed(images.entries)
    ]


def write_rows(images: ImageSet, rows: list[dict[str, Any]]) -> None:
    (images.folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def geneval(prompts: Path, tmp_path: Path) -> tuple[GenEvalTask, ImageSet]:
    task = GenEvalTask(options(prompts))
    return task, drawn(tmp_path / "student-aaaa", task)


def test_genevals_output_is_read_back(geneval: tuple[GenEvalTask, ImageSet]) -> None:
    task, images = geneval
    with pytest.raises(EvaluationError, match=r"official scorer's output is not there"):
        task.read_official(images)
    # The folder may have lain elsewhere when it was scored, under its own name.
    for root in (None, "/scratch/pictures/student-aaaa", "runs/student-aaaa", "student-aaaa", "C:\\runs\\student-aaaa"):
        write_rows(images, geneval_rows(images, root))
        judgements = task.read_official(images)
        assert [j.passed for j in judgements] == [e["sample"] == 0 for e in images.entries]
        assert {j.reason for j in judgements} == {"", "expected cow"}
        assert [j.seed for j in judgements] == [e["seed"] for e in images.entries]
    stamp(images.folder, "results.jsonl")
    assert len(task.read_official(images)) == 14
    for text in ("not json", '{"file": 1}', "[1]"):
        (images.folder / "results.jsonl").write_text(text + "\n")
        with pytest.raises(EvaluationError, match="is not the output of GenEval's scorer"):
            task.read_official(images)


def changed(key: str, value: object) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[-1].update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop(), r"no verdict on 00000/samples/0000.png \(13 of 14 are there\)"),
        (lambda rows: rows.append(rows[3]), r"two verdicts on 0000\d/samples"),
        (
            lambda rows: rows.append({**rows[0], "filename": rows[0]["filename"].replace("00006", "00099")}),
            r"verdict on 00099/samples/0001.png, which is no picture of this folder",
        ),
        (
            changed("prompt", "another"),
            r"0000.png has the prompt 'another', here it is 'a photo of a bench'",
        ),
        (changed("prompt", None), "is of other pictures"),
        (changed("tag", "counting"), "has the tag 'counting', here it is 'single_object'"),
        (changed("metadata", '{"tag": "colors"}'), "judged by other clauses"),
        (changed("correct", None), "no verdict on 00000/samples/0000.png"),
        (changed("correct", 1), "no verdict on 00000/samples/0000.png"),
        (changed("filename", "00000/samples/0000.png"), "does not say of which folder"),
        (changed("filename", "./00000/samples/0000.png"), "does not say of which folder"),
        (
            changed("filename", "runs/teacher-bbbb/00000/samples/0000.png"),
            r"in runs/teacher-bbbb, not of those",
        ),
    ],
)
def test_genevals_output_of_something_else_is_refused(
    change: Callable[[list[dict[str, Any]]], None], words: str, geneval: tuple[GenEvalTask, ImageSet]
) -> None:
    task, images = geneval
    rows = geneval_rows(images)
    change(rows)
    write_rows(images, rows)
    with pytest.raises(ImageSetError, match=words):
        task.read_official(images)


def test_another_models_output_is_refused(geneval: tuple[GenEvalTask, ImageSet], tmp_path: Path) -> None:
    """The same prompts, seeds and file names: only where the pictures lay, and the stamp, tell the two apart."""
    task, images = geneval
    teacher = drawn(tmp_path / "teacher-bbbb", task, ModelId("teacher", "bbbb"))
    write_rows(teacher, geneval_rows(teacher))
    shutil.copy(teacher.folder / "results.jsonl", images.folder)
    with pytest.raises(ImageSetError, match=r"is of the pictures in .*teacher-bbbb, not of those in .*student-aaaa"):
        task.read_official(images)
    # A folder of the same name in another run, which is there to be looked at.
    other = drawn(tmp_path / "again" / "student-aaaa", task, base_seed=5)
    write_rows(other, geneval_rows(other))
    shutil.copy(other.folder / "results.jsonl", images.folder)
    with pytest.raises(ImageSetError, match=r"is of the pictures in .*again/student-aaaa"):
        task.read_official(images)


def test_a_stamp_outdoes_names(geneval: tuple[GenEvalTask, ImageSet], tmp_path: Path) -> None:
    task, images = geneval
    write_rows(images, geneval_rows(images, "/gone/student-aaaa"))
    stamp(images.folder, "results.jsonl")
    assert task.read_official(images)
    # Drawn again from other noise, under the same name: the verdicts are of pictures that are gone.
    other = drawn(tmp_path / "other" / "student-aaaa", task, base_seed=5)
    for name in ("results.jsonl", official.STAMP):
        shutil.copy(images.folder / name, other.folder)
    with pytest.raises(ImageSetError, match=r"official.sha256: is of other pictures"):
        task.read_official(other)
    write_rows(images, [{**r, "correct": True} for r in geneval_rows(images, "/gone/student-aaaa")])
    with pytest.raises(ImageSetError, match=r"results.jsonl: is not the file that official.sha256 names"):
        task.read_official(images)
    stamp(images.folder, "results.jsonl")  # scored again: the last line counts
    assert all(j.passed for j in task.read_official(images))
    (images.folder / official.STAMP).write_text("something\n")
    with pytest.raises(ImageSetError, match="line 1 is not what sha256sum writes"):
        task.read_official(images)
    stamp_of_another_file = subprocess.run(
        ["sha256sum", "manifest.jsonl"], cwd=images.folder, capture_output=True, check=True
    ).stdout
    (images.folder / official.STAMP).write_bytes(stamp_of_another_file)
    with pytest.raises(ImageSetError, match=r"nothing says which pictures it is of.*sha256sum manifest.jsonl results"):
        task.read_official(images)


def compbench_rows(images: ImageSet, scale: float = 0.5) -> list[str]:
    """What the suite's scripts leave: BLIP's numbers its files in order, the others say the file's number."""
    left = []
    tags = dict.fromkeys(e["tag"] for e in images.entries)
    for tag in tags:
        mine = [e for e in images.entries if e["tag"] == tag]
        numbers = sorted(int(e["path"].rsplit("_", 1)[1][:-4]) for e in mine)
        path, ids = {
            "color": ("annotation_blip", range(len(numbers))),
            "shape": ("annotation_blip", range(len(numbers))),
            "texture": ("annotation_blip", range(len(numbers))),
            "spatial": ("labels/annotation_obj_detection_2d", numbers),
            "3d_spatial": ("labels/annotation_obj_detection_3d", numbers),
            "numeracy": ("annotation_num", numbers),
        }.get(tag, ("sharegpt4v", numbers))
        folder = images.folder / tag / path
        folder.mkdir(parents=True, exist_ok=True)
        unit = 100 if tag in ("non_spatial", "complex") else 1  # the judge's script writes per cent
        rows = [{"question_id": q, "answer": f"{unit * scale * n / 30:.4f}"} for q, n in zip(ids, numbers, strict=True)]
        (folder / "vqa_result.json").write_text(json.dumps(rows))
        left.append(f"{tag}/{path}/vqa_result.json")
    seen = [{"image": f"{images.folder}/{e['path']}"} for e in images.entries if e["tag"] == "color"]
    (images.folder / "color" / "annotation1_blip").mkdir(exist_ok=True)
    (images.folder / "color" / "annotation1_blip" / "color_test.json").write_text(json.dumps(seen))
    seen = [{"image": e["path"].split("/")[-1]} for e in images.entries if e["tag"] == "spatial"]
    (images.folder / "spatial/labels/annotation_obj_detection_2d/mapping.json").write_text(json.dumps(seen))
    return left


@pytest.fixture
def compbench(prompts: Path, tmp_path: Path) -> tuple[CompBenchTask, ImageSet]:
    task = CompBenchTask(options(prompts))
    return task, drawn(tmp_path / "student-aaaa", task)


def test_compbenchs_output_is_read_back(compbench: tuple[CompBenchTask, ImageSet]) -> None:
    task, images = compbench
    with pytest.raises(EvaluationError, match=r"color/annotation_blip/vqa_result.json.*is not there"):
        task.read_official(images)
    left = compbench_rows(images)
    with pytest.raises(ImageSetError, match=r"vqa_result.json: nothing says which pictures it is of.*sha256sum"):
        task.read_official(images)
    stamp(images.folder, *left)
    for j, e in zip(task.read_official(images), images.entries, strict=True):
        assert j.score == pytest.approx(int(e["path"].rsplit("_", 1)[1][:-4]) / 60, abs=1e-4)
        assert j.seed == e["seed"]
    stamp(images.folder, *compbench_rows(images, scale=9))
    with pytest.raises(ImageSetError, match=r"no score in 0\.\.1"):
        task.read_official(images)


def test_another_models_compbench_output_is_refused(compbench: tuple[CompBenchTask, ImageSet], tmp_path: Path) -> None:
    task, images = compbench
    teacher = drawn(tmp_path / "teacher-bbbb", task, ModelId("teacher", "bbbb"))
    left = compbench_rows(teacher)
    stamp(teacher.folder, *left)
    stamp(images.folder, *compbench_rows(images, 0.4))
    assert task.read_official(images)
    numeracy = "numeracy/annotation_num/vqa_result.json"  # which says nothing of any picture
    shutil.copy(teacher.folder / numeracy, images.folder / numeracy)
    with pytest.raises(ImageSetError, match=r"annotation_num/vqa_result.json: is not the file that"):
        task.read_official(images)
    shutil.copy(teacher.folder / official.STAMP, images.folder)
    with pytest.raises(ImageSetError, match=r"official.sha256: is of other pictures"):
        task.read_official(images)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("numeracy/annotation_num/vqa_result.json", lambda rows: rows[1:], r"no verdict on numeracy/samples/two cats"),
        ("numeracy/annotation_num/vqa_result.json", lambda rows: [*rows, rows[0]], r"two verdicts on numeracy/samples"),
        (
            "spatial/labels/annotation_obj_detection_2d/vqa_result.json",
            lambda rows: [{**rows[0], "question_id": 99}, *rows[1:]],
            r"verdict on question 99, which is no picture",
        ),
        (
            "color/annotation_blip/vqa_result.json",
            lambda rows: [*rows, {"question_id": len(rows), "answer": 0.5}],
            r"no picture of this folder",
        ),
        (
            "color/annotation1_blip/color_test.json",
            lambda rows: [{"image": r["image"].replace("student-aaaa", "teacher-bbbb")} for r in rows],
            r"color_test.json: is of the pictures in .*teacher-bbbb",
        ),
        (
            "spatial/labels/annotation_obj_detection_2d/mapping.json",
            lambda rows: [{"image": "a cow near a cup_000000.png"}, *rows[1:]],
            r"mapping.json: holds a verdict on spatial/samples/a cow near a cup_000000.png",
        ),
        ("color/annotation1_blip/color_test.json", lambda rows: [{}], "a list of pictures that is not"),
        ("shape/annotation_blip/vqa_result.json", lambda rows: [3], "is not the output of T2I-CompBench's scripts"),
    ],
)
def test_compbenchs_output_of_something_else_is_refused(
    file: str,
    change: Callable[[list[Any]], list[Any]],
    words: str,
    compbench: tuple[CompBenchTask, ImageSet],
) -> None:
    task, images = compbench
    left = compbench_rows(images)
    path = images.folder / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    stamp(images.folder, *left)
    with pytest.raises(EvaluationError, match=words):
        task.read_official(images)
