"""Reading pictures back: true ones pass, wrong ones fail for the right reason, junk neither crashes nor stalls."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from tritflow.scenes import (
    COLORS,
    SHAPES,
    TAGS,
    TEXTURES,
    Clause,
    Object,
    Prompt,
    Scene,
    SceneBatch,
    detect,
    evaluation_prompts,
    judge,
    render,
    scene_of,
)
from tritflow.scenes.detector import MAX_PARTS
from tritflow.scenes.silhouettes import fit, match
from tritflow.scenes.world import HELD_OUT_COUNTS

PER_TAG = 40


def pictures(scenes: list[Scene], size: int = 128) -> np.ndarray:
    batch = (render(SceneBatch.from_scenes(scenes), size).clamp(0, 1) * 255).round().to(torch.uint8)
    return batch.permute(0, 2, 3, 1).numpy()


def picture(*objects: Object, size: int = 128) -> np.ndarray:
    return pictures([Scene(objects, "gray")], size)[0]


def noise(sigma: float, seed: int) -> np.ndarray:
    """Coloured clouds, or with sigma 0 coloured snow."""
    random = np.random.default_rng(seed)
    channels = [ndimage.gaussian_filter(random.standard_normal((128, 128)), sigma) for _ in range(3)]
    clouds = np.stack(channels, -1)
    return ((clouds / clouds.std() * 0.35 + 0.5).clip(0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("tag", TAGS)
def test_true_pictures_pass(tag: str) -> None:
    prompts = evaluation_prompts(PER_TAG, seed=21, tags=(tag,))
    shown = pictures([scene_of(p, i) for i, p in enumerate(prompts)])
    wrong = [(p.text, v.reason) for p, x in zip(prompts, shown, strict=True) if not (v := judge(p, detect(x))).passed]
    assert len(wrong) <= 0.005 * PER_TAG, wrong


def test_every_object_is_read_whatever_its_size() -> None:
    for size in (96, 128, 256):
        for i, shape in enumerate(SHAPES):
            color, texture = COLORS[(3 * i) % 8], TEXTURES[i % 3]
            (found,) = detect(picture(Object(shape, color, texture, 0.45, 0.55, 0.2), size=size))
            assert (found.shape, found.color, found.texture) == (shape, color, texture)
            assert abs((found.box[0] + found.box[2]) / 2 / size - 0.45) < 0.05
            assert abs((found.box[1] + found.box[3]) / 2 / size - 0.55) < 0.05


def test_reading_is_deterministic_and_takes_both_kinds_of_pictures() -> None:
    prompt = evaluation_prompts(1, tags=("occlusion",))[0]
    shown = pictures([scene_of(prompt)])[0]
    assert detect(shown) == detect(shown.copy()) == detect(Image.fromarray(shown))
    assert detect(noise(4, 0)) == detect(noise(4, 0))


RED_STAR = Object("star", "red", "solid", 0.3, 0.5, 0.16)
BLUE_RING = Object("ring", "blue", "solid", 0.7, 0.5, 0.16)


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ((RED_STAR,), "expected blue ring >= 1, found 0"),
        ((BLUE_RING,), "expected red star >= 1, found 0"),
        ((Object("star", "green", "solid", 0.3, 0.5, 0.16), BLUE_RING), "expected red star >= 1, found 0"),
        ((Object("heart", "red", "solid", 0.3, 0.5, 0.16), BLUE_RING), "expected red star >= 1, found 0"),
        (
            (Object("star", "red", "solid", 0.7, 0.5, 0.16), Object("ring", "blue", "solid", 0.3, 0.5, 0.16)),
            "no red star left of blue ring",
        ),
        (
            (Object("star", "red", "solid", 0.5, 0.25, 0.16), Object("ring", "blue", "solid", 0.5, 0.75, 0.16)),
            "no red star left of blue ring",
        ),
    ],
)
def test_wrong_pictures_fail_for_the_right_reason(objects: tuple[Object, ...], reason: str) -> None:
    include = (Clause("star", color="red", relation="left of", target=1), Clause("ring", color="blue"))
    prompt = Prompt("position", "a red star left of a blue ring", include, "")
    assert judge(prompt, detect(picture(RED_STAR, BLUE_RING))).passed
    verdict = judge(prompt, detect(picture(*objects)))
    assert not verdict.passed
    assert verdict.reason == reason


def test_wrong_textures_fail() -> None:
    for shape in SHAPES:
        for drawn in TEXTURES:
            found = detect(picture(Object(shape, "cyan", drawn, 0.5, 0.5, 0.18)))
            for asked in TEXTURES:
                prompt = Prompt("texture", "", (Clause(shape, texture=asked),), "")
                assert judge(prompt, found).passed == (asked == drawn), (shape, drawn, asked)


def test_wrong_counts_fail() -> None:
    places = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
    for shape in sorted({s for s, _ in HELD_OUT_COUNTS}):
        for drawn in range(1, 5):
            found = detect(picture(*[Object(shape, "pink", "solid", x, y, 0.14) for x, y in places[:drawn]]))
            for asked in (2, 3, 4):
                prompt = Prompt("counting", "", (Clause(shape, asked),), "")
                assert judge(prompt, found).passed == (asked == drawn), (shape, drawn, asked)


def test_the_order_of_occlusion_matters() -> None:
    scenes, prompts = [], evaluation_prompts(24, seed=4, tags=("occlusion",))
    for p in prompts:
        true = scene_of(p, 1)
        scenes += [true, Scene(true.objects[::-1], true.background)]
    shown = pictures(scenes)
    for i, p in enumerate(prompts):
        assert judge(p, detect(shown[2 * i])).passed, p.text
        assert not judge(p, detect(shown[2 * i + 1])).passed, p.text


def softened(shown: np.ndarray) -> np.ndarray:
    """Colours run into each other at edges, as a decoder leaves them."""
    return ndimage.gaussian_filter(shown.astype(np.float32), (1.5, 1.5, 0)).round().astype(np.uint8)


@pytest.mark.parametrize("soft", [False, True])
def test_nearly_true_pairs_are_rejected(soft: bool) -> None:
    prompts = evaluation_prompts(60, seed=31, tags=("occlusion",))
    scenes = [scene_of(p, i) for i, p in enumerate(prompts)]
    alone = pictures([Scene(s.objects[i : i + 1], s.background) for s in scenes for i in (0, 1)])
    wrong, asked, right = [], 0, 0
    for i, (p, x) in enumerate(zip(prompts, pictures(scenes), strict=True)):
        found = detect(softened(x) if soft else x)
        right += judge(p, found).passed
        a, b = p.include
        others = [(replace(a, relation=None, target=None), replace(b, relation="in front of", target=0))]
        others += [(replace(a, shape=s), b) for s in SHAPES if s != a.shape]
        others += [(a, replace(b, shape=s)) for s in SHAPES if s != b.shape]
        others += [(replace(a, color=c), b) for c in COLORS if c != a.color]
        others += [(a, replace(b, color=c)) for c in COLORS if c != b.color]
        asked += 1
        if any(judge(replace(p, include=o), found).passed for o in others):
            wrong.append(p.text)
        for missing in (alone[2 * i], alone[2 * i + 1]):
            assert not judge(p, detect(softened(missing) if soft else missing)).passed, p.text
    assert len(wrong) <= 0.01 * asked, wrong
    assert right >= (0.8 if soft else 0.98) * asked


@pytest.mark.parametrize("shape", ["ring", "circle"])
def test_what_a_ring_shows_lies_behind_it(shape: str) -> None:
    behind = Object("heart", "cyan", "solid", 0.45, 0.55, 0.22)
    for x in (0.52, 0.56, 0.6):
        found = detect(picture(behind, Object(shape, "red", "solid", x, 0.42, 0.14)))
        seen = {(d.shape, d.color): d for d in found}
        assert seen.keys() == {(shape, "red"), ("heart", "cyan")}
        assert seen[shape, "red"].won > seen["heart", "cyan"].won


def test_a_mixed_rim_is_no_object_and_an_object_between_two_hues_is_one() -> None:
    left, right = Object("square", "red", "solid", 0.36, 0.5, 0.2), Object("star", "yellow", "solid", 0.62, 0.5, 0.16)
    found = {(d.shape, d.color) for d in detect(softened(picture(left, right)))}
    assert found == {("square", "red"), ("star", "yellow")}
    small = Object("square", "red", "solid", 0.25, 0.5, 0.16), Object("square", "yellow", "solid", 0.75, 0.5, 0.16)
    found = {(d.shape, d.color) for d in detect(picture(*small, Object("circle", "orange", "solid", 0.5, 0.5, 0.16)))}
    assert found == {("square", "red"), ("square", "yellow"), ("circle", "orange")}


def test_hidden_silhouettes_are_completed() -> None:
    axis = np.arange(96) + 0.5
    disc = (axis[None] - 40) ** 2 + (axis[:, None] - 50) ** 2 < 24**2
    cover = np.zeros_like(disc)
    cover[:, 50:] = True
    whole = match(disc)
    assert SHAPES[whole.shape] == "circle"
    assert whole.score > 0.95
    found = fit(disc & ~cover, cover)
    assert SHAPES[found.shape] == "circle"
    assert found.drawn is not None
    assert (found.drawn & disc).sum() / (found.drawn | disc).sum() > 0.93
    assert np.allclose(found.box, (16, 26, 64, 74), atol=2.5)


@pytest.mark.parametrize("gray", [0, 128, 255])
def test_an_empty_picture_shows_nothing(gray: int) -> None:
    assert detect(np.full((128, 128, 3), gray, dtype=np.uint8)) == []
    assert not any(judge(p, []).passed for p in evaluation_prompts(2))


@pytest.mark.parametrize("sigma", [0, 1, 3, 8])
def test_junk_is_read_quickly_and_passes_nothing(sigma: float) -> None:
    shown = [noise(sigma, seed) for seed in range(6)]
    detect(shown[0])  # makes the templates
    prompts = evaluation_prompts(2, tags=("two_object", "counting", "occlusion"))
    seconds = []
    for x in shown:
        begin = time.process_time()
        found = detect(x)
        seconds.append(time.process_time() - begin)
        assert len(found) <= MAX_PARTS
        assert not any(judge(p, found).passed for p in prompts)
    # 25 ms and less where measured; the search without limits took seconds.
    assert sorted(seconds)[3] < 0.2


def test_one_colour_all_over_is_no_crash() -> None:
    (found,) = detect(np.full((64, 96, 3), (255, 0, 0), dtype=np.uint8))
    assert (found.color, found.box) == ("red", (0, 0, 96, 64))


@pytest.mark.parametrize(
    "bad", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_other_arrays_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected a uint8 picture of shape \[H, W, 3\]"):
        detect(bad)
