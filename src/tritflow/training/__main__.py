"""`python -m tritflow.training`: train the small FLUX from nothing. See `--help`."""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tritflow.scenes.held_out import evaluation_prompts
from tritflow.training import data, flow, models, vae
from tritflow.training.export import export_pipeline
from tritflow.training.loop import rank, world_size
from tritflow.training.score import draw, score

# Seeds of prompts that are only looked at while training; the reported scores use others.
PROGRESS_SEED = 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tritflow.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and the pipeline")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--examples", type=int, default=300_000, help="scenes rendered and encoded a GPU")
    parser.add_argument("--vae-seconds", type=float, default=300)
    parser.add_argument("--probe-seconds", type=float, default=0, help="two GPUs: AdamW and Muon side by side first")
    parser.add_argument("--flow-seconds", type=float, default=1200)
    parser.add_argument("--guidance-seconds", type=float, default=180)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--batch", type=int, default=512, help="pictures a step and GPU")
    parser.add_argument("--peak", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a flow-*.safetensors checkpoint to go on from")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="default of the written pipeline")
    parser.add_argument("--score-every", type=float, default=0, help="seconds between scores while training (0: never)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-graph", action="store_true", help="do not capture the step in CUDA graphs")
    return parser.parse_args()


class Run:
    """One training run: what all stages share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begin = time.monotonic()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
            # cuDNN's attention backward reads out of bounds in compiled blocks (torch 2.11, H100); flash does not.
            torch.backends.cuda.enable_cudnn_sdp(False)
        torch.set_float32_matmul_precision("high")
        args.out.mkdir(parents=True, exist_ok=True)
        self.workers = max(1, (os.cpu_count() or 2) // world_size() - 1)
        self.pool = ProcessPoolExecutor(min(12, self.workers), mp_context=get_context("spawn"))
        self.compile = not args.no_compile and self.device.type == "cuda"
        self.curve: list[dict[str, Any]] = []
        self.words = data.training_words()
        self.tokenizers = models.build_tokenizers(self.words)
        self.prompts = evaluation_prompts(32, PROGRESS_SEED)

    def log(self, text: str) -> None:
        line = f"[{time.monotonic() - self.begin:7.1f}s rank {rank()}] {text}"
        print(line, flush=True)
        with (self.args.out / f"log-{rank()}.txt").open("a") as f:
            f.write(line + "\n")

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if rank() == 0:
            path = self.args.out / name
            save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, str(path) + ".tmp")
            os.replace(str(path) + ".tmp", path)


def train_vae(run: Run, scenes: Any) -> Any:
    """The VAE from this run's folder, or trained now."""
    torch.manual_seed(run.args.seed)
    model = models.build_vae()
    kept = run.args.out / "vae.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept))
        model.to(run.device)
        statistics = json.loads((run.args.out / "vae.json").read_text())
        model.register_to_config(shift_factor=statistics["shift"], scaling_factor=statistics["scale"])
        return model.eval()
    torch.manual_seed(run.args.seed + 17 + rank())
    vae.train_vae(
        model,
        scenes[slice(0, 60_000)],
        seconds=run.args.vae_seconds,
        size=run.args.size,
        device=run.device,
        compile=run.compile,
        log=run.log,
    )
    model.eval()
    run.save("vae.safetensors", model.state_dict())
    if rank() == 0:
        statistics = {"shift": model.config.shift_factor, "scale": model.config.scaling_factor}
        (run.args.out / "vae.json").write_text(json.dumps(statistics))
    if world_size() > 1:
        # One VAE for all: rounding may differ between GPUs.
        for p in model.parameters():
            dist.broadcast(p.data, 0)
        shared = [model.config.shift_factor, model.config.scaling_factor]
        dist.broadcast_object_list(shared, 0)
        model.register_to_config(shift_factor=shared[0], scaling_factor=shared[1])
    run.log(f"vae: latents shift {model.config.shift_factor} scale {model.config.scaling_factor}")
    if rank() == 0:
        run.log(f"vae: detector after the round trip {vae.detector_scores(model, 8, run.args.size)}")
    return model


def build(run: Run) -> flow.SmallFlux:
    """The text encoders and the transformer with this run's seed, the same on every GPU."""
    torch.manual_seed(run.args.seed + 1)
    size = models.SmallFluxSize()
    clip, t5 = models.build_text_encoders(size, *run.tokenizers)
    model = flow.SmallFlux(clip, t5, models.build_transformer(size)).to(run.device)
    torch.manual_seed(run.args.seed + 1000 + rank())
    return model


def reporter(run: Run, model: flow.SmallFlux, autoencoder: Any, name: str, trainer_box: list[Any], every: float) -> Any:
    """A report callback that logs, and on GPU 0 scores the averaged weights and keeps them, every so often."""
    shadow = copy.deepcopy(model).eval().requires_grad_(False)
    state = {"told": time.monotonic()}

    def report(steps: int, value: float, rate: float) -> None:
        if rank() != 0:
            return
        run.log(f"{name}: step {steps} loss {value:.4f} rate {rate:.2f}")
        if not every or time.monotonic() - state["told"] < every or not trainer_box:
            return
        trainable = [p for p in model.parameters() if p.requires_grad]
        mirror = dict(zip(trainable, trainer_box[0].average, strict=True))
        for p, q in zip(model.parameters(), shadow.parameters(), strict=True):
            q.copy_(mirror.get(p, p))
        scores = score(
            shadow, autoencoder, run.tokenizers, run.prompts, size=run.args.size, pool=run.pool, true_guidance=2.5
        )
        run.curve.append({"stage": name, "steps": steps, "seconds": time.monotonic() - run.begin, **scores})
        (run.args.out / "curve.json").write_text(json.dumps(run.curve, indent=1))
        run.log(f"{name}: guided 2.5 {rounded(scores)}")
        run.save(f"{name}-last.safetensors", shadow.state_dict())
        state["told"] = time.monotonic()

    return report


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 3) for k, v in scores.items()}


def probe(run: Run, model: flow.SmallFlux, latents: data.LatentSet, autoencoder: Any) -> tuple[bool, flow.SmallFlux]:
    """Two GPUs, two optimisers, the same time; everybody goes on with the better one's optimiser and weights."""
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
    scores = score(
        model, autoencoder, run.tokenizers, run.prompts, size=run.args.size, pool=run.pool, true_guidance=2.5
    )
    run.log(f"probe muon={muon}: {rounded(scores)}")
    overall = torch.tensor([scores["overall"]], device=run.device)
    everybody = [torch.zeros_like(overall) for _ in range(world_size())]
    dist.all_gather(everybody, overall)
    winner = int(torch.cat(everybody).argmax())
    for p in model.parameters():
        dist.broadcast(p.data, winner)
    run.log(f"probe: goes on with {'muon' if winner == 1 else 'adamw'}")
    return winner == 1, model


def main() -> None:
    args = arguments()
    run = Run(args)
    run.log(f"{world_size()} x {run.device}, torch {torch.__version__}, {len(run.words)} words")
    captions, scenes = data.make_examples(args.examples, seed=1 + rank(), workers=run.workers)
    run.log(f"{len(captions)} examples")
    autoencoder = train_vae(run, scenes)
    latents = data.encode_set(captions, scenes, autoencoder, run.tokenizers, args.size, run.device)
    run.log(f"encoded {tuple(latents.latents.shape)} std {float(latents.latents[:10000].float().std()):.3f}")
    model = build(run)
    run.log(f"transformer {models.parameter_count(model.transformer):,} parameters")
    muon = args.optimizer == "muon"
    if args.probe_seconds and world_size() == 2:
        muon, model = probe(run, model, latents, autoencoder)
    if args.resume:
        model.load_state_dict(load_file(args.resume))
    side = args.size // 16
    box: list[Any] = []
    flow.train_flow(
        model,
        latents,
        seconds=args.flow_seconds,
        side=side,
        batch=args.batch,
        peak=args.peak,
        muon=muon,
        compile=run.compile,
        graph=not args.no_graph,
        log=reporter(run, model, autoencoder, "flow", box, every=args.score_every),
        box=box,
    )
    run.save("flow.safetensors", model.state_dict())
    if args.guidance_seconds:
        flow.distil_guidance(
            model,
            latents,
            seconds=args.guidance_seconds,
            side=side,
            batch=args.batch,
            muon=muon,
            compile=run.compile,
            graph=not args.no_graph,
            log=lambda s, value, rate: run.log(f"guidance: step {s} loss {value:.4f}") if rank() == 0 else None,
        )
    run.save("guided.safetensors", model.state_dict())
    if rank() == 0:
        finish(run, model, autoencoder)
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()
    run.pool.shutdown(cancel_futures=True)


def finish(run: Run, model: flow.SmallFlux, autoencoder: Any) -> None:
    """Draw a sheet of progress prompts and write the pipeline."""
    from PIL import Image

    size, guidance = run.args.size, run.args.guidance_scale
    texts = [p.text for i, p in enumerate(run.prompts) if i % 32 < 8]
    pixels = draw(model, autoencoder, run.tokenizers, texts, size=size, guidance=guidance).numpy()
    rows = pixels.reshape(-1, 8, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 8 * size, 3)
    Image.fromarray(rows).save(run.args.out / "sheet.png")
    export_pipeline(run.args.out / "pipeline", model, autoencoder, run.tokenizers, size, guidance, shift=1.0)
    run.log("written")


if __name__ == "__main__":
    main()
