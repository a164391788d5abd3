"""Fidelity measures against their definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from evaluation_fakes import draw, draw_set, noise_picture
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.signal import convolve2d

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.images import ModelId
from tritflow.evaluation.tasks import fidelity
from tritflow.evaluation.tasks.detail import Detail, edge_sharpness
from tritflow.scenes import object_mask


@pytest.fixture
def photo() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.normal(size=(64, 48, 3)), (3, 3, 0)) * 400 + 128
    return (smooth + rng.normal(size=smooth.shape) * 12).clip(0, 255).astype(np.uint8)


def test_psnr_by_hand() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[:2] = 10
    assert fidelity.psnr(b, a) == pytest.approx(10 * np.log10(255**2 / 50))
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    assert fidelity.psnr(b, a, mask) == pytest.approx(20 * np.log10(25.5))
    mask[:] = False
    assert fidelity.psnr(b, a, mask) is None
    assert fidelity.psnr(a, a) == fidelity.PSNR_CEILING


def test_ssim_is_the_papers_formula(photo: np.ndarray) -> None:
    other = np.clip(photo.astype(int) + np.random.default_rng(1).normal(0, 20, photo.shape), 0, 255).astype(np.uint8)
    t = np.arange(-5, 6)
    g = np.exp(-(t**2) / (2 * 1.5**2))
    window = np.outer(g, g) / np.outer(g, g).sum()
    x, y = fidelity.luma(photo), fidelity.luma(other)

    def mean(v: np.ndarray) -> np.ndarray:
        return convolve2d(v, window, mode="valid")

    mx, my = mean(x), mean(y)
    sx, sy, sxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 6.5025, 58.5225
    expected = ((2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))).mean()
    assert fidelity.ssim(photo, other) == pytest.approx(expected, abs=1e-9)
    assert fidelity.ssim(photo, photo) == pytest.approx(1.0)


def test_bands_read_blur_noise_and_unrelated_detail(photo: np.ndarray) -> None:
    energy, coherence = fidelity.bands(photo, photo)
    assert energy == pytest.approx([1.0] * 5)
    assert coherence == pytest.approx([1.0] * 5)
    blurred = gaussian_filter(photo.astype(float), (2, 2, 0)).astype(np.uint8)
    energy, _ = fidelity.bands(blurred, photo)
    assert energy[-1] < 0.1
    assert energy[0] > 0.85  # exp(-(2 pi sigma f)^2) at the band's upper edge, f = 1/32
    half = (128 + (photo.astype(float) - 128) / 2).astype(np.uint8)
    energy, coherence = fidelity.bands(half, photo)
    assert energy[0] == pytest.approx(0.25, abs=0.02)
    assert coherence[0] > 0.99
    unrelated = np.random.default_rng(9).integers(0, 255, photo.shape).astype(np.uint8)
    assert abs(fidelity.bands(unrelated, photo)[1][-1]) < 0.2


@pytest.mark.parametrize(("period", "band"), [(2.5, 4), (6, 3), (12, 2), (24, 1), (64, 0)])
def test_a_grating_falls_into_its_octave(period: float, band: int) -> None:
    x = np.arange(192)
    wave = 128 + 60 * np.sin(2 * np.pi * x / period)
    flat = np.full((192, 192), 128.0)
    grating = np.repeat((flat * 0 + wave)[..., None], 3, -1).astype(np.uint8)
    window, index, twice = fidelity._spectrum_plan(192, 192)
    y = fidelity.luma(grating)
    power = np.abs(np.fft.rfft2((y - y.mean()) * window)) ** 2 * twice
    totals = [power[index == k].sum() for k in range(5)]
    assert int(np.argmax(totals)) == band
    assert totals[band] > 0.9 * sum(totals)


@pytest.mark.parametrize("shape", [(16, 16), (17, 15), (12, 31)])
def test_spectrum_accounts_for_all_energy(shape: tuple[int, int]) -> None:
    """Parseval: the bands' energies and the mean's add up to the windowed picture's."""
    y = np.random.default_rng(2).normal(size=shape)
    window, index, twice = fidelity._spectrum_plan(*shape)
    power = np.abs(np.fft.rfft2(y * window)) ** 2 * twice
    assert power.sum() / y.size == pytest.approx(((y * window) ** 2).sum())
    assert (index >= 0).sum() == index.size - 1


def test_flat_teacher_has_no_bands() -> None:
    flat = np.full((32, 32, 3), 77, np.uint8)
    noisy = np.asarray(noise_picture(0, 32))
    energy, coherence = fidelity.bands(noisy, flat)
    assert energy == coherence == (None,) * 5
    energy, coherence = fidelity.bands(flat, noisy)
    assert energy == pytest.approx([0.0] * 5)
    assert coherence == (0.0,) * 5


def test_measure_and_summary(tmp_path: Path) -> None:
    def brighter(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [
            Image.fromarray(np.where(np.asarray(p) < 245, np.asarray(p) + 10, np.asarray(p)).astype(np.uint8))
            for p in draw(prompts, seeds)
        ]

    teacher = draw_set(tmp_path / "t")
    student = draw_set(tmp_path / "s", draw=brighter, model=ModelId("student", "s"))
    assert teacher is not None
    assert student is not None
    measured = fidelity.measure(student, teacher, mask=lambda p: p[..., 0] > 300)
    result = fidelity.summary(measured)
    assert result["psnr"]["value"] == pytest.approx(20 * np.log10(25.5), abs=1e-4)
    assert result["psnr"]["n"] == 18
    assert result["psnr"]["prompts"] == 9
    assert result["psnr_object"] is None
    assert result["bands"]["top"]["coherence"]["value"] > 0.99


def brightness(picture: np.ndarray) -> float:
    return float(picture.mean())


def nothing(picture: np.ndarray) -> None:
    return None


def test_details_are_the_pictures_own_and_the_teachers(tmp_path: Path) -> None:
    teacher, student = draw_set(tmp_path / "t"), draw_set(tmp_path / "s", model=ModelId("student", "s"))
    assert teacher is not None
    assert student is not None
    tag = student.entries[0]["tag"]
    details = (Detail("mean", brightness), Detail("one tag", brightness, (tag,)), Detail("never", nothing))
    measured = fidelity.measure(student, teacher, details=details)
    pictures = {(e["prompt_id"], e["sample"]): float(p.mean()) for e, p in student.pixels()}
    for m in measured:
        assert m.details["mean"][0] == pictures[m.prompt_id, m.sample]
        assert ("one tag" in m.details) == (m.tag == tag)
        assert "never" not in m.details
    found = fidelity.summary(measured)["details"]
    assert set(found) == {"mean", "one tag"}
    assert found["mean"]["own"]["value"] == pytest.approx(np.median(list(pictures.values())), abs=1e-5)
    assert found["mean"]["ratio"]["n"] == len(measured) > found["one tag"]["ratio"]["n"] > 0


def test_edge_sharpness_falls_with_blur_and_not_with_contrast() -> None:
    step = np.zeros((48, 48, 3))
    step[:, 24:] = 200.0
    sharp = [edge_sharpness(gaussian_filter(step, (s, s, 0)).round().astype(np.uint8)) for s in (0, 0.5, 1, 2, 3)]
    assert sharp[0] == 1.0
    assert sharp == sorted(sharp, reverse=True)
    assert sharp[2] == pytest.approx(0.64, abs=0.02)
    assert sharp[3] == pytest.approx(0.44, abs=0.02)
    faint = gaussian_filter(step / 4, (1, 1, 0)).round().astype(np.uint8)
    assert edge_sharpness(faint) == pytest.approx(sharp[2], abs=0.05)
    turned = gaussian_filter(step, (1, 1, 0)).round().astype(np.uint8).swapaxes(0, 1)
    assert edge_sharpness(turned) == sharp[2]
    assert edge_sharpness(np.full((32, 32, 3), 90, np.uint8)) is None


def test_processes_measure_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = draw_set(tmp_path / "t"), draw_set(tmp_path / "s", model=ModelId("student", "s"))
    assert teacher is not None
    assert student is not None
    alone = fidelity.measure(student, teacher, mask=object_mask)
    monkeypatch.setattr(fidelity, "POOL_FROM", 1)
    monkeypatch.setattr(fidelity, "_CHUNK", 7)
    heard: list[tuple[int, int]] = []
    together = fidelity.measure(student, teacher, object_mask, lambda *done: heard.append(done), workers=2)
    assert together == alone
    assert [m.sample for m in together] == [e["sample"] for e in student.entries]
    assert heard == [(7, 18), (14, 18), (18, 18)]

    class Darkness:
        def distance(self, pictures: list[np.ndarray], references: list[np.ndarray]) -> list[float]:
            return [float(pictures[0].sum()) - float(references[0].sum()) + int(pictures[0][0, 0, 0])]

    perceived = fidelity.measure(student, teacher, object_mask, perceptual=Darkness(), workers=2)  # type: ignore[arg-type]
    assert [m.lpips for m in perceived] == [int(p[0, 0, 0]) for _, p in student.pixels()]
    assert [dataclasses.replace(m, lpips=None) for m in perceived] == alone


def test_sizes_must_agree(photo: np.ndarray) -> None:
    for function in (fidelity.psnr, fidelity.ssim, fidelity.bands):
        with pytest.raises(EvaluationError, match="do not compare"):
            function(photo, photo[:-1])
