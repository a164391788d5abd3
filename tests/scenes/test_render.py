"""Drawing: what is drawn is where, in which colour, in which order, at every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tritflow.scenes import COLORS, SHAPES, TEXTURES, Object, Scene, SceneBatch, object_mask, render
from tritflow.scenes.world import DARK, GRAY_LEVEL, RGB


def draw(*scenes: Scene, size: int = 128) -> torch.Tensor:
    return render(SceneBatch.from_scenes(scenes), size)


def one(shape: str = "circle", color: str = "red", texture: str = "solid", radius: float = 0.2) -> Scene:
    return Scene((Object(shape, color, texture, 0.5, 0.5, radius),), "white")


def test_edges_are_anti_aliased_and_insides_are_pure() -> None:
    picture = draw(one())[0]
    ground, paint = torch.full((3,), GRAY_LEVEL["white"]), torch.tensor(RGB["red"])
    assert torch.allclose(picture[:, 64, 64], paint)
    assert torch.allclose(picture[:, 2, 2], ground)
    green = picture[1]
    between = (green > RGB["red"][1] + 0.01) & (green < GRAY_LEVEL["white"] - 0.01)
    # One ring of mixed pixels about the circumference, no blur beyond it.
    assert 2 * np.pi * 25.6 * 0.5 < int(between.sum()) < 2 * np.pi * 25.6 * 2
    # Mixed pixels carry the area: the sum of covers is the circle's.
    cover = (GRAY_LEVEL["white"] - green) / (GRAY_LEVEL["white"] - RGB["red"][1])
    assert float(cover.sum()) == pytest.approx(np.pi * 25.6**2, rel=2e-3)


def test_shapes_are_distinct() -> None:
    pictures = draw(*[one(s, radius=0.25) for s in SHAPES])
    masks = (pictures[:, 1] < 0.5).flatten(1)
    for a in range(len(SHAPES)):
        for b in range(a):
            iou = float((masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum())
            assert iou < 0.87, (SHAPES[a], SHAPES[b], iou)


def test_colors_and_textures_are_what_they_are_called() -> None:
    for color in COLORS:
        assert torch.allclose(draw(one(color=color))[0, :, 64, 64], torch.tensor(RGB[color]))
    solid, striped, checkered = (draw(one("square", texture=t, radius=0.3))[0, 0, 40:88, 40:88] for t in TEXTURES)
    assert float(solid.max() - solid.min()) < 1e-6
    # Bands across y: constant along x, and two tones along y.
    assert float(striped.std(1).max()) < 1e-6
    assert float(striped.min()) == pytest.approx(RGB["red"][0] * DARK)
    assert float(striped.max()) == pytest.approx(RGB["red"][0])
    assert float(checkered.std(0).min()) > 0.1
    assert float(checkered.std(1).min()) > 0.1


def test_the_last_object_is_in_front() -> None:
    a, b = Object("square", "red", "solid", 0.45, 0.5, 0.2), Object("square", "blue", "solid", 0.55, 0.5, 0.2)
    under, over = draw(Scene((a, b)), Scene((b, a)))
    assert torch.allclose(under[:, 64, 64], torch.tensor(RGB["blue"]))
    assert torch.allclose(over[:, 64, 64], torch.tensor(RGB["red"]))


def test_a_scene_is_the_same_at_every_size() -> None:
    scene = Scene(
        (Object("star", "green", "checkered", 0.3, 0.3, 0.2), Object("ring", "pink", "solid", 0.7, 0.65, 0.18)), "gray"
    )
    large, small = draw(scene, size=256), draw(scene, size=128)
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert float((shrunk - small).abs().mean()) < 0.004
    a, b = (object_mask((p[0].permute(1, 2, 0) * 255).byte().numpy()) for p in (shrunk, small))
    assert (a == b).mean() > 0.995


def test_a_scene_draws_alike_alone_and_in_a_batch() -> None:
    scenes = [one("heart"), one("cross", "cyan", "striped"), Scene((), "black")]
    together = draw(*scenes)
    for i, scene in enumerate(scenes):
        assert torch.equal(together[i], draw(scene)[0])
    assert torch.equal(together[2], torch.full((3, 128, 128), GRAY_LEVEL["black"]))


def test_too_many_objects_are_refused() -> None:
    crowd = Scene(one().objects * 5)
    with pytest.raises(ValueError, match="holds 5 objects; at most 4"):
        SceneBatch.from_scenes([crowd])
