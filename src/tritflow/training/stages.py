"""The stages of a training run: VAE, text encoders, transformer, guidance, pipeline."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from tritflow.formats.atomic import write_atomic
from tritflow.scenes import SceneBatch
from tritflow.training import autoencoder, data, flow, models, reading, start, vae
from tritflow.training.export import export_pipeline
from tritflow.training.loop import rank, world_size
from tritflow.training.run import Run
from tritflow.training.score import draw, score
from tritflow.training.supply import Supply
from tritflow.training.words import InventedWords

# Text encoders of a new model alone, in seconds; and the share of the learning rate at which kept ones are refreshed.
READING_SECONDS, KEPT_RATE = 45, 0.1
# Learning rate of a VAE that is trained further.
FURTHER_PEAK = 5e-4
# Held-out prompts a tag that decide whether it is kept.
PER_TAG = 200
# Scenes a GPU that a kept VAE is trained further on, and the share of them in which one object is in front of another.
FURTHER, OVERLAPPING = 40_000, 0.5
# What it draws worst (`scenes.weakest`), and one of how many scenes shows it.
FOCUS = (("gray", 3), ("checkered", 4), ("green checkered black", 8))


def make_vae(run: Run) -> tuple[Any, data.Order]:
    """The VAE of this run's folder, of the model it starts from, or one trained now; then trained further unless it was
    before or that is not asked for. It lies in the folder afterwards. And the run's examples, which workers make
    meanwhile."""
    kept = (run.args.out / "vae.safetensors").is_file()
    done = kept and (run.args.out / "autoencoder.json").is_file()
    run.meet()  # before anybody writes them
    model = autoencoder.load(run.args.out) if kept else start.vae_of(run.start) if run.start else None
    before = further = None
    if run.args.vae_further_seconds and not done:
        mixture = replace(run.mixture, overlapping=OVERLAPPING)
        further = data.Order(run.pool, min(FURTHER, run.args.examples), autoencoder.SEED + rank(), mixture)
        if model is not None:  # now: in a moment all workers are busy with examples
            model.to(run.device)
            before = autoencoder.scores(model, PER_TAG, run.args.size, run.pool)
    order = data.Order(run.pool, run.args.examples, run.stream, run.mixture)
    if model is None:
        model = _new_vae(run, order.first(60_000).scenes)
    model.to(run.device)
    report = None
    if further is not None:
        torch.manual_seed(run.args.seed + 29 + rank())
        scenes = further.all().scenes
        for words, every in FOCUS:
            scenes = autoencoder.focused(scenes, words, every)
        report = autoencoder.train_further(
            model,
            scenes,
            usual=order.first(4096).scenes,
            seconds=run.args.vae_further_seconds,
            size=run.args.size,
            device=run.device,
            encoder=True,
            before=before,
            per_tag=PER_TAG,
            pool=run.pool,
            peak=FURTHER_PEAK,
            compile=run.compile,
            log=run.log,
        )
    if rank() == 0 and (report is not None or not kept):
        autoencoder.save(model, run.args.out)
        if report is not None:
            write_atomic(run.args.out / "autoencoder.json", (json.dumps(report, indent=1) + "\n").encode())
    run.log(f"vae: latents shift {model.config.shift_factor} scale {model.config.scaling_factor}")
    return model.eval(), order


def _new_vae(run: Run, scenes: SceneBatch) -> Any:
    torch.manual_seed(run.args.seed)
    model = models.build_vae()
    torch.manual_seed(run.args.seed + 17 + rank())
    vae.train_vae(
        model,
        scenes,
        seconds=run.args.vae_seconds,
        size=run.args.size,
        device=run.device,
        compile=run.compile,
        log=run.log,
    )
    autoencoder.share(model.eval())
    return model


def build(run: Run) -> flow.SmallFlux:
    """Text encoders and transformer: those that the run starts from, or new ones with this run's seed, the same on
    every GPU."""
    torch.manual_seed(run.args.seed + 1)
    if run.start is not None:
        model = start.model_of(run.start, run.tokenizers)
    else:
        size = models.SmallFluxSize()
        clip, t5 = models.build_text_encoders(size, *run.tokenizers)
        model = flow.SmallFlux(clip, t5, models.build_transformer(size))
    torch.manual_seed(run.args.seed + 1000 + rank())
    return model.to(run.device)


def learn_to_read(run: Run, model: flow.SmallFlux, latents: data.LatentSet, seconds: float, *, kept: bool) -> None:
    """The text encoders, before anything is drawn; `kept` ones have learned before and are stepped gently."""
    reader = reading.Reader(model.t5.config.d_model, model.clip.config.hidden_size, run.tokenizers).to(run.device)
    error = reading.learn_to_read(
        model.clip,
        model.t5,
        reader,
        latents,
        seconds=seconds,
        encoder_rate=KEPT_RATE if kept else 1.0,
        batch=min(1024, 4 * run.args.batch),
        graph=not run.args.no_graph,
        log=lambda s, value, rate: run.log(f"reading: step {s} loss {value:.4f} rate {rate:.2f}"),
    )
    right = reading.reads(model.t5, reader, latents, run.tokenizers[1])
    right["unseen"] = reading.reads_unseen(model.t5, reader, run.prompts, run.tokenizers)
    if world_size() > 1:  # one verdict for all: each has read captions of its own
        verdicts = [right]
        dist.broadcast_object_list(verdicts, 0)
        right = verdicts[0]
    run.log(f"reading: error {error:.4f}, read rightly: {rounded(right)}")
    # A second chance of a reader that is blind to word order costs minutes; a transformer trained on it costs the run.
    if min(right.values()) < run.args.reading_floor:
        raise RuntimeError(
            f"the text encoders did not learn to read ({rounded(right)}, at least {run.args.reading_floor} wanted): "
            "give --reading-seconds more, or another --seed"
        )


def resume(model: flow.SmallFlux, path: Path) -> bool:
    """Weights of an earlier leg, in any float type; returns whether text encoders were among them."""
    found = load_file(path)
    missing, unexpected = model.load_state_dict(found, strict=False)
    if unexpected or any(name.startswith("transformer.") for name in missing):
        wrong = (list(unexpected) or list(missing))[0]
        raise ValueError(f"{path} holds another model's weights ('{wrong}'); give a flow-*.safetensors of this size")
    return any(name.startswith("t5.") for name in found)


def reporter(
    run: Run, model: flow.SmallFlux, name: str, trainer_box: list[Any], renew: Callable[[], int] | None = None
) -> Callable[[int, float, float], None]:
    """A report callback that renews the examples and logs; on GPU 0 it keeps the averaged weights every so often in
    `NAME-last.safetensors`, for `python -m tritflow.training.watch` to score beside the training."""
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    state = {"told": time.monotonic()}

    def report(steps: int, value: float, rate: float) -> None:
        fresh = renew() if renew is not None else 0
        if rank() != 0:
            return
        run.log(f"{name}: step {steps} loss {value:.4f} rate {rate:.2f}, {fresh} fresh examples")
        if run.args.keep_every and trainer_box and time.monotonic() - state["told"] > run.args.keep_every:
            average = dict(zip(trained, trainer_box[0].average, strict=False))  # heads of training alone come last
            seconds = time.monotonic() - run.begin
            run.save(f"{name}-last.safetensors", model.state_dict() | average, {"steps": steps, "seconds": seconds})
            state["told"] = time.monotonic()

    return report


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 3) for k, v in scores.items()}


def probe(run: Run, model: flow.SmallFlux, latents: data.LatentSet, vae_model: Any) -> bool:
    """Two GPUs, two optimisers, the same time; everybody goes on with the better one's optimiser and weights.
    Returns whether that is Muon."""
    muon = rank() == 1
    flow.train_flow(
        model,
        latents,
        seconds=run.args.probe_seconds,
        side=run.args.size // 16,
        batch=run.args.batch,
        peak=run.args.peak,
        muon=muon,
        decay=0.3,
        synchronize=False,
        compile=run.compile,
        log=lambda s, value, rate: run.log(f"probe muon={muon}: step {s} loss {value:.4f}"),
    )
    scores = score(model, vae_model, run.tokenizers, run.prompts, size=run.args.size, pool=run.pool, true_guidance=2.5)
    run.log(f"probe muon={muon}: {rounded(scores)}")
    overall = torch.tensor([scores["overall"]], device=run.device)
    everybody = [torch.zeros_like(overall) for _ in range(world_size())]
    dist.all_gather(everybody, overall)
    winner = int(torch.cat(everybody).argmax())
    for p in model.parameters():
        dist.broadcast(p.data, winner)
    run.log(f"probe: goes on with {'muon' if winner == 1 else 'adamw'}")
    return winner == 1


def train_flow(run: Run, model: flow.SmallFlux, latents: data.LatentSet, vae_model: Any) -> None:
    """The flow, then its guidance distilled into the embedding; both results are kept in the run's folder."""
    args = run.args
    muon = args.optimizer == "muon"
    if args.probe_seconds and world_size() == 2:
        muon = probe(run, model, latents, vae_model)
    kept = (bool(args.resume) and resume(model, args.resume)) or run.start is not None
    seconds = args.reading_seconds if args.reading_seconds is not None else 0 if kept else READING_SECONDS
    if seconds:
        learn_to_read(run, model, latents, seconds, kept=kept)
    # From here on as in FLUX: the encoders know language and stay. Trained along, T5's attention collapses to single
    # tokens within a few thousand steps, and what is red or left of what can no longer be told.
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)
    common = {
        "side": args.size // 16,
        "batch": args.batch,
        "muon": muon,
        "compile": run.compile,
        "graph": not args.no_graph,
    }
    box: list[Any] = []
    supply = Supply(run.pool, run.stream, len(latents.latents), run.mixture)
    report = reporter(
        run,
        model,
        "flow",
        box,
        renew=lambda: supply.refill(latents, vae_model, args.size),
    )
    words = InventedWords(*run.tokenizers).to(run.device)
    flow.train_flow(
        model,
        latents,
        seconds=args.flow_seconds,
        peak=args.peak,
        decay=args.decay,
        words=words,
        # Where scenes are blended or tinted, invented nouns and colours mean something.
        nouns=args.blended == 0,
        colors=args.tinted == 0,
        log=report,
        box=box,
        **common,
    )
    supply.close()
    run.log(f"flow: {supply.total} examples beyond the first {len(latents.latents)}")
    run.save("flow.safetensors", model.state_dict())
    if args.guidance_seconds:
        report = reporter(run, model, "guidance", [])
        flow.distil_guidance(model, latents, seconds=args.guidance_seconds, log=report, **common)
    run.save("guided.safetensors", model.state_dict())


def finish(run: Run, model: flow.SmallFlux, vae_model: Any) -> None:
    """Draw a sheet of progress prompts and write the pipeline."""
    # Read again: `python -m tritflow.training.autoencoder` may have bettered the decoder meanwhile.
    vae_model.load_state_dict(load_file(run.args.out / "vae.safetensors"))
    size, guidance = run.args.size, run.args.guidance_scale
    texts = [p.text for i, p in enumerate(run.prompts) if i % 32 < 8]
    pixels = draw(model, vae_model, run.tokenizers, texts, size=size, guidance=guidance).numpy()
    rows = pixels.reshape(-1, 8, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 8 * size, 3)
    Image.fromarray(rows).save(run.args.out / "sheet.png")
    export_pipeline(run.args.out / "pipeline", model, vae_model, run.tokenizers, size, guidance)
    run.log("written")
