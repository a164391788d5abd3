"""The real scorer classes with tiny random weights: shapes, ranges, batching, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_scorers
import torch
from PIL import Image

from tritflow.calibration.prompt_sources import FILES
from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers import blip_vqa, clip_colors, dpt_depth, llava_judge, mask2former, owlv2
from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.scorers.loading import resize
from tritflow.evaluation.tasks.geneval_rules import COLORS

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name in ("mask2former", "clip", "blip", "dpt", "owlv2", "llava"):
        getattr(tiny_scorers, name)(folder / name)
    return folder


def pictures(n: int, height: int = 40, width: int = 40) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def small_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    monkeypatch.setattr(llava_judge, "DESCRIPTION_TOKENS", 4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the suites' own files are not at hand")
def test_the_detectors_classes_are_genevals() -> None:
    names = next(f for f in FILES if f.name == "object_names.txt").read(SHARED).split("\n")
    assert tuple(n for n in names if n) == mask2former.CLASSES


def test_mask2former_finds_the_same_alone_and_in_a_batch(weights: Path) -> None:
    detector = mask2former.Mask2FormerDetector(str(weights / "mask2former"))
    assert re.fullmatch(r"transformers Mask2Former mask2former \([0-9a-f]{16}\)", detector.name)
    shown = pictures(3, 40, 56)
    both = detector.detect(shown, [()] * 3, 0.001)
    for one, found in zip(shown, both, strict=True):
        alone = detector.detect([one], [()], 0.001)[0]
        assert [d.label for d in alone] == [d.label for d in found]
        assert [d.score for d in alone] == pytest.approx([d.score for d in found], abs=1e-5)
        assert 0 < len(found) <= 100
        assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
        for d in found:
            assert d.mask is not None
            assert d.mask.shape == (40, 56)
            rows, columns = np.nonzero(d.mask)
            assert d.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert d.score > 0.001
            assert d.label in mask2former.CLASSES


def test_instances_score_class_times_mask() -> None:
    logits = torch.full((2, 4), -9.0)
    logits[0, 1], logits[1, 3] = 9.0, 9.0  # the second query sees nothing
    masks = torch.full((2, 8, 8), -4.0)
    masks[:, 2:4, 4:8] = 4.0
    found = mask2former.instances(logits, masks, (8, 8), (8, 8), (8, 8), 0.3)
    assert [(d.label, d.box) for d in found] == [("bicycle", (4, 2, 8, 4))]
    assert found[0].score == pytest.approx(float(torch.sigmoid(torch.tensor(4.0))), abs=1e-3)
    # Twice as large a picture than the network saw: boxes follow.
    assert mask2former.instances(logits, masks, (8, 8), (8, 8), (16, 16), 0.3)[0].box == (8, 4, 16, 8)
    # What cannot pass the threshold is left out, whatever its mask.
    assert mask2former.instances(logits, masks, (8, 8), (8, 8), (8, 8), 0.99) == []


def test_leaving_out_the_unlikely_first_changes_nothing(weights: Path) -> None:
    detector = mask2former.Mask2FormerDetector(str(weights / "mask2former"))
    shown = pictures(1)
    every = detector.detect(shown, [()], 0.0)[0]
    bound = every[len(every) // 2].score
    few = detector.detect(shown, [()], bound)[0]
    assert [(d.label, d.box) for d in few] == [(d.label, d.box) for d in every if d.score > bound]


def test_a_detector_of_other_classes_or_kind_is_refused(weights: Path, tmp_path: Path) -> None:
    tiny_scorers.mask2former(tmp_path / "seven", labels=7)
    with pytest.raises(EvaluationError, match="knows 7 classes, COCO has 80"):
        mask2former.Mask2FormerDetector(str(tmp_path / "seven"))
    with pytest.raises(EvaluationError, match="is a 'clip' model; a 'mask2former' model is needed"):
        mask2former.Mask2FormerDetector(str(weights / "clip"))
    with pytest.raises(EvaluationError, match=r"cannot load the detector scorer '.*nowhere'.*--scorer detector=FOLDER"):
        mask2former.Mask2FormerDetector(str(tmp_path / "nowhere"))


def test_pickled_weights_are_never_read(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((weights / "mask2former" / "config.json").read_text())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(EvaluationError, match="safetensors"):
        mask2former.Mask2FormerDetector(str(folder))


def test_cutting_out_hides_the_rest() -> None:
    picture = np.full((10, 10, 3), 7, np.uint8)
    mask = np.zeros((10, 10), bool)
    mask[2:5, 3:6] = True
    crop = np.asarray(clip_colors.cut_out(picture, Detection("cat", 0.9, (2, 2, 6, 5), mask)))
    assert crop.shape == (3, 4, 3)
    assert (crop[:, 0] == 0x99).all()
    assert (crop[:, 1:] == 7).all()
    whole = clip_colors.cut_out(picture, Detection("cat", 0.9, (1, 1, 1, 1)))
    assert whole.size == (1, 1)


def test_colours_do_not_depend_on_the_batch(weights: Path) -> None:
    colors = clip_colors.ClipColors(str(weights / "clip"))
    objects = [
        (p, Detection(name, 0.9, (i, i, 30, 20 + i)))
        for i, (p, name) in enumerate(zip(pictures(5), ("cat", "dog", "cat", "cup", "dog"), strict=True))
    ]
    together = colors.classify(objects)
    assert together == [c for o in objects for c in colors.classify([o])]
    assert together == colors.classify(objects, batch_size=2)
    assert set(together) <= set(COLORS)
    assert colors.classify([]) == []


def test_clip_sees_the_middle_of_the_shorter_side(weights: Path) -> None:
    colors = clip_colors.ClipColors(str(weights / "clip"))
    wide = Image.new("RGB", (96, 32))
    wide.paste((200, 0, 0), (32, 0, 64, 32))
    assert (colors._pixels(wide) == (200, 0, 0)).all()
    assert colors._pixels(Image.new("RGB", (3, 50))).shape == (32, 32, 3)


def test_vqa_gives_each_picture_its_own_answers(weights: Path) -> None:
    vqa = blip_vqa.BlipVqa(str(weights / "blip"))
    shown = pictures(3)
    phrases = [["a red cat", "a dog"], [], ["a blue bowl"]]
    answers = vqa.ask(shown, phrases)
    assert [len(a) for a in answers] == [2, 0, 1]
    assert all(0 < p < 1 for a in answers for p in a)
    for i, mine in enumerate(phrases):
        for phrase, p in zip(mine, answers[i], strict=True):
            assert vqa.ask([shown[i]], [[phrase]])[0][0] == pytest.approx(p, abs=1e-5)
    assert vqa.ask(shown[:1], [[]]) == [[]]


@pytest.mark.parametrize(
    ("phrase", "asked"), [("A red Cat", "a red cat?"), ("a dog's (old) bowl.", "a dog's old bowl?"), ("x!", "x?")]
)
def test_questions_read_as_in_training(phrase: str, asked: str) -> None:
    assert blip_vqa.question(phrase) == asked


def test_depth_fills_its_range_in_256_levels(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpt_depth, "SIDE", 64)
    maps = dpt_depth.DptDepth(str(weights / "dpt")).depth(pictures(2), 20, 30)
    for m in maps:
        assert m.shape == (20, 30)
        assert m.dtype == np.float32
        assert m.min() >= 0
        assert m.max() <= 1
        assert np.allclose(m * 255, np.round(m * 255), atol=1e-4)
        assert m.std() > 0


def test_an_open_detector_finds_what_each_picture_asks_for(weights: Path) -> None:
    detector = owlv2.Owlv2Detector(str(weights / "owlv2"))
    shown = pictures(3, 40, 60)
    wanted = [["cat", "dog", "cat"], [], ["a cup"]]
    found = detector.detect(shown, wanted, 0.01)
    assert found[1] == []
    assert found[0]
    assert {d.label for d in found[0]} <= {"cat", "dog"}
    assert {d.label for d in found[2]} <= {"a cup"}
    for d in [d for mine in found for d in mine]:
        assert 0 <= d.box[0] < d.box[2] <= 60
        assert 0 <= d.box[1] < d.box[3] <= 40
    alone = detector.detect(shown[:1], wanted[:1], 0.01)[0]
    assert [d.label for d in alone] == [d.label for d in found[0]]
    assert [d.score for d in alone] == pytest.approx([d.score for d in found[0]], abs=1e-4)
    assert detector.detect(shown[:1], [[]], 0.01) == [[]]
    assert detector.detect(shown[:1], wanted[:1], 1.0) == [[]]


def test_the_judge_always_grades(weights: Path) -> None:
    judge = llava_judge.LlavaJudge(str(weights / "llava"))
    shown = pictures(3)
    for category in ("non_spatial", "complex"):
        grades = judge.grade(shown, ["a cat", "a dog", "a red cup"], category)
        assert len(grades) == 3
        assert set(grades) <= {1, 2, 3, 4, 5}
        assert grades == judge.grade(shown, ["a cat", "a dog", "a red cup"], category)


def test_the_judge_grades_a_batch_as_it_grades_alone(weights: Path) -> None:
    """Descriptions and prompts of different lengths: what fills up a batch changes nothing."""
    judge = llava_judge.LlavaJudge(str(weights / "llava"))
    shown, prompts = pictures(4), ["a cat", "a red cup and a blue bowl and a dog", "bench", "a red cat"]
    together = judge.grade(shown, prompts, "complex")
    assert together == [judge.grade([p], [t], "complex")[0] for p, t in zip(shown, prompts, strict=True)]
    tokens = [torch.tensor([1, 3, 3, 3, 3, *range(4, 4 + n)]) for n in (2, 9, 5)]
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        batch = judge._last_logits(tokens, pixels)
        for i, mine in enumerate(tokens):
            assert torch.allclose(batch[i], judge._last_logits([mine], pixels[i : i + 1])[0], atol=1e-5)


def test_a_judge_without_digits_is_refused(weights: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(weights / "llava", tmp_path / "mute")
    path = tmp_path / "mute" / "tokenizer.json"
    data = json.loads(path.read_text())
    for digit in "12345":
        data["model"]["vocab"]["z" + digit] = data["model"]["vocab"].pop(digit)
    path.write_text(json.dumps(data))
    with pytest.raises(EvaluationError, match="no tokens of their own for the digits"):
        llava_judge.LlavaJudge(str(tmp_path / "mute"))


@pytest.mark.parametrize(
    ("mode", "kernel"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize("size", [(24, 24), (90, 70)])
def test_resizing_is_pils(mode: str, kernel: Image.Resampling, size: tuple[int, int]) -> None:
    """The suites' scorers scale with PIL; a level of rounding is the difference."""
    # Away from black and white, where PIL cuts overshoots off between its two passes.
    picture = 60 + pictures(1, 50, 64)[0] // 2
    mine = resize(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), *size, mode)
    theirs = np.asarray(Image.fromarray(picture).resize(size[::-1], kernel), dtype=np.float32)
    assert np.abs(mine[0].permute(1, 2, 0).numpy() - theirs).max() <= 1.5
