"""A kept VAE trained further: with or without its encoder, from a run or a pipeline, and a worse one is not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritflow.scenes.world import COLORS, GRAY_LEVEL, HELD_OUT_COLORS, SHAPES, TEXTURES
from tritflow.training import autoencoder, data, models, vae


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(models.build_vae().state_dict(), tmp_path / "vae.safetensors")
    (tmp_path / "vae.json").write_text(json.dumps({"shift": 0.25, "scale": 2.0}))
    return tmp_path


OPTIONS = ["--seconds", "1", "--examples", "32", "--size", "32", "--batch", "4", "--per-tag", "1", "--workers", "1"]


def scores(monkeypatch: pytest.MonkeyPatch, *values: float, weakest: tuple[float, ...] = (20.0, 20.0)) -> None:
    """The detector's scores, in turn: the picture size of this test is too small for the real one."""
    left, worst = list(values), list(weakest)
    monkeypatch.setattr(vae, "detector_scores", lambda *a: {"texture": left.pop(0), "psnr": 30.0, "ghosts": 0.0})
    monkeypatch.setattr(autoencoder, "weakest", lambda *a: [(worst.pop(0), "green checkered black")])


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(autoencoder, "ProcessPoolExecutor", lambda n, **options: ThreadPoolExecutor(1))


def test_only_the_decoder_moves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(monkeypatch, 0.98, 0.99)
    first = load_file(run / "vae.safetensors")
    autoencoder.main([str(run), *OPTIONS])
    then = load_file(run / "vae.safetensors")
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], then[name])}
    assert moved == {"decoder"}
    assert json.loads((run / "vae.json").read_text()) == {"shift": 0.25, "scale": 2.0}
    assert json.loads((run / "autoencoder.json").read_text())["after"]["texture"] == 0.99


def test_the_encoder_moves_too_and_the_latents_statistics_with_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores(monkeypatch, 0.98, 0.98)
    first = load_file(run / "vae.safetensors")
    autoencoder.main([str(run), "--encoder", *OPTIONS])
    then = load_file(run / "vae.safetensors")
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], then[name])}
    assert moved == {"encoder", "decoder"}
    statistics = json.loads((run / "vae.json").read_text())
    assert statistics != {"shift": 0.25, "scale": 2.0}
    assert "train the flow on" in capsys.readouterr().out
    loaded = autoencoder.load(run)
    assert (loaded.config.shift_factor, loaded.config.scaling_factor) == (statistics["shift"], statistics["scale"])


@pytest.mark.parametrize("encoder", [False, True])
def test_a_worse_one_is_not_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoder: bool
) -> None:
    scores(monkeypatch, 0.98, 0.96)
    before = (run / "vae.safetensors").read_bytes(), (run / "vae.json").read_bytes()
    autoencoder.main([str(run), *(["--encoder"] if encoder else []), *OPTIONS])
    assert before == ((run / "vae.safetensors").read_bytes(), (run / "vae.json").read_bytes())
    out = capsys.readouterr().out
    assert "stays as it was" in out
    assert "train the flow on" not in out


def test_one_that_draws_a_texture_worse_is_not_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The detector reads slanted stripes as checkers; the pixels' error does not.
    scores(monkeypatch, 0.98, 0.99, weakest=(21.0, 20.9))
    autoencoder.main([str(run), *OPTIONS])
    assert "stays as it was" in capsys.readouterr().out
    report = json.loads((run / "autoencoder.json").read_text())
    assert report["after"]["weakest"] == 20.9
    assert not report["kept"]


def test_the_built_in_one_goes_into_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(monkeypatch, 0.98, 0.5)
    autoencoder.main(["small", "--out", str(tmp_path / "new"), *OPTIONS])
    kept = autoencoder.load(tmp_path / "new")
    assert kept.config.scaling_factor == 1.07457  # no better than before: the shipped one as it is
    from tritflow.assets import asset_path

    shipped = load_file(asset_path("small") / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, shipped[k].float()) for k, v in kept.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], "train the VAE first"),
        (["small"], "--out is missing: 'small' is a pipeline"),
        (["nothing-here"], "'nothing-here' is no pipeline folder"),
        (["small", "--out", "x", "--overlapping", "2"], "--overlapping 2.0: give a share from 0 to 1"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        autoencoder.main([str(tmp_path) if a == "EMPTY" else a for a in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_edges_between_two_hues_are_found_and_others_are_not() -> None:
    from tritflow.scenes import Object, Scene, SceneBatch, render

    def edges(*objects: Object) -> torch.Tensor:
        return vae.two_hue_edges(render(SceneBatch.from_scenes([Scene(objects, "gray")]), 64) * 2 - 1)[0, 0]

    alone = edges(
        Object("square", "red", "checkered", 0.3, 0.5, 0.2), Object("circle", "blue", "striped", 0.75, 0.5, 0.15)
    )
    assert not alone.any()
    meeting = edges(
        Object("square", "red", "striped", 0.4, 0.5, 0.2), Object("square", "orange", "solid", 0.6, 0.5, 0.2)
    )
    rows, columns = meeting.nonzero().T
    assert 20 <= len(set(rows.tolist())) <= 28
    edge = (0.6 - 0.2 * 0.88) * 64
    assert (columns.float() + 0.5 - edge).abs().max() <= 3.5
    same = edges(Object("square", "red", "striped", 0.4, 0.5, 0.2), Object("square", "red", "solid", 0.6, 0.5, 0.2))
    assert not same.any()


def test_an_error_at_such_an_edge_counts_more() -> None:
    image = -torch.ones(1, 3, 16, 16)
    image[:, 0, :, :8] = 1
    image[:, 2, :, 8:] = 1
    at_edge, elsewhere = image.clone(), image.clone()
    at_edge[:, :, :, 7:9] += 0.2
    elsewhere[:, :, :, 2:4] += 0.2
    assert vae.reconstruction_loss(image, at_edge) > 1.5 * vae.reconstruction_loss(image, elsewhere)
    plain = [vae.reconstruction_loss(image, x, edges=0) for x in (at_edge, elsewhere)]
    assert plain[0] < 1.05 * plain[1]


def test_a_mark_that_is_seen_on_the_ground_counts_more_than_absolute_error() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, 0, 4:12, 4:12] = 0.9  # an object
    spot, faint, beside = image.clone(), image.clone(), image.clone()
    spot[:, :, 20:24, 20:24] += 0.2
    faint += 0.2 * 16 / 32**2  # as much in all, spread out
    beside[:, :, 4:8, 12:13] += 0.8  # a soft edge
    plain = {
        name: float(vae.reconstruction_loss(image, x, marks=0)) for name, x in (("faint", faint), ("beside", beside))
    }
    assert float(vae.reconstruction_loss(image, faint)) == pytest.approx(plain["faint"])
    assert float(vae.reconstruction_loss(image, beside)) == pytest.approx(plain["beside"])
    assert vae.reconstruction_loss(image, spot) > 5 * vae.reconstruction_loss(image, spot, marks=0)


def test_the_most_stained_pictures_are_half_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = data.make_examples(40, 3, 1).scenes
    pictures = data.render_all(scenes, 32, torch.device("cpu"))
    bad = {3, 17}

    def spotted(model: object, images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        for i in bad:  # all of the ground
            images[i] = images[i] * 0.8
        return images

    seen: list[torch.Tensor] = []
    real = vae.reconstruction_loss

    def loss(image: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(image)
        return real(image, *rest)

    monkeypatch.setattr(vae, "round_trip", spotted)
    monkeypatch.setattr(vae, "reconstruction_loss", loss)
    said: list[str] = []
    vae.train_vae(
        models.build_vae(), scenes, seconds=0.5, size=32, device=torch.device("cpu"), batch=8, compile=False,
        decoder_only=True, stained=0.05, log=said.append,
    )  # fmt: skip
    assert "stains of 2 pictures" in said[0]
    known = {pictures[i].numpy().tobytes() for i in bad}
    for image in seen:
        drawn = [((x + 1) * 127.5).round().to(torch.uint8).numpy().tobytes() in known for x in image]
        assert all(drawn[::2])
    assert seen


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"texture": 0.97}, False),
        ({"weakest": 27.9}, False),  # nothing is won by it
        ({"weakest": 27.9, "ghosts": 0.0}, True),
        ({"weakest": 27.0, "ghosts": 0.0}, False),
        ({"ghosts": 0.09}, False),
    ],
)
def test_what_a_vae_must_not_lose(change: dict[str, float], kept: bool) -> None:
    before = {"texture": 1.0, "occlusion": 0.99, "psnr": 41.0, "weakest": 28.3, "ghosts": 0.06}
    assert autoencoder._kept(before, before | change) is kept


def test_ghosts_of_a_round_trip_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def stained(model: object, images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        images[::2, :, :6, :] += 0.1 * (1 - 2 * (images[::2, :, :6, :] > 0.5).float())
        return images

    monkeypatch.setattr(vae, "round_trip", stained)
    assert 0.3 < vae.detector_scores("stains", 4, 64)["ghosts"] <= 0.7
    monkeypatch.setattr(vae, "round_trip", lambda model, images: images)
    assert vae.detector_scores("keeps", 4, 64)["ghosts"] < 0.1
    assert "ghosts" not in vae.detector_scores(None, 1, 64)


def test_focus_shows_every_second_scene_as_told_but_nothing_that_is_held_out() -> None:
    scenes = data.make_examples(64, 3, 1, data.Mixture(tinted=0.5, blended=0.5)).scenes
    seen = autoencoder.focused(scenes, "green checkered black")
    there = seen.kind[..., 0] >= 0
    rows = (torch.arange(64) % 2 == 0)[:, None].expand_as(there)
    assert (seen.ground[::2] == GRAY_LEVEL["black"]).all()
    assert (seen.kind[..., 2][rows & there] == TEXTURES.index("checkered")).all()
    green = (seen.kind[..., 1] == COLORS.index("green")) & rows & there
    assert seen.turn is not None
    assert not seen.turn[green].any()
    names = {SHAPES[s] for s in seen.kind[..., 0][green & (scenes.kind[..., 1] != COLORS.index("green"))].tolist()}
    assert names  # some became green
    assert not any((name, "green") in HELD_OUT_COLORS for name in names)
    for field in ("kind", "ground", "place"):
        assert torch.equal(getattr(seen, field)[1::2], getattr(scenes, field)[1::2])
    with pytest.raises(ValueError, match="'grene' is no colour"):
        autoencoder.focused(scenes, "grene")


def test_part_of_the_way_lies_between_the_old_decoder_and_the_new_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = load_file(run / "vae.safetensors")
    results = {}
    for way in ("1", "0.5", "0"):
        scores(monkeypatch, 0.9, 0.9)
        autoencoder.main([str(run), "--out", str(run / way), "--way", way, *OPTIONS])
        results[way] = load_file(run / way / "vae.safetensors")
    name = "decoder.conv_in.weight"
    assert torch.equal(results["0"][name], old[name])
    assert not torch.equal(results["0.5"][name], old[name])
    assert all(torch.equal(results["0.5"][k], old[k]) for k in old if k.startswith("encoder."))
    with pytest.raises(SystemExit):
        autoencoder.main([str(run), "--way", "0.5", "--encoder", *OPTIONS])
