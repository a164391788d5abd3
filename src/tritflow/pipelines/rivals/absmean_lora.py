"""Frozen absmean trits with a trained low-rank branch: how the open reproduction of 1.58-bit FLUX works.

    python -m tritflow.pipelines.rivals.absmean_lora SRC OUT --recipe balanced
    tritflow evaluate scenes --model SRC --rival absmean-lora=OUT --against SRC

Trits are BitNet's and never move; a LoRA in bfloat16 beside every linear and the row scales are distilled on the
teacher's velocity, on the very states, for the very steps and by the very schedule of the recipe that it is compared
with. The branch's peak rate is its own: AdamW's for a LoRA, whatever the recipe's optimiser takes for weights. All else
stays the teacher's, biases too, and the loss is the plain mean square. The rank keeps the reproduction's share of the
width, 64 of 3072.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tritflow.calibration.artifacts import file_sha256, provenance, read_json, write_json, write_tensors
from tritflow.distillation.state import ParameterGroup
from tritflow.distillation.step import training_attention
from tritflow.distillation.velocity import distill_
from tritflow.pipelines.dense import whole_teacher
from tritflow.pipelines.online import online_states
from tritflow.pipelines.quantize import Job, plan
from tritflow.pipelines.rivals.registry import RivalError
from tritflow.pipelines.teacher import record_trajectories
from tritflow.quantization.ternarize import absmean

WIDTH_PER_RANK = 48  # 3072 / 64
BRANCH_RATE = 1e-3
ADAPTER = "adapter.safetensors"


class AbsmeanLora(nn.Module):
    """y = x (s T)^T + x D^T U^T + bias: T and bias frozen, log s, D [r, K] and U [N, r] trained.

    Args:
        linear: gives weight and bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        trits, scale = absmean(linear.weight.detach())
        rank = max(1, round(min(linear.weight.shape) / WIDTH_PER_RANK))
        device = linear.weight.device
        self.register_buffer("trits", trits)
        self.log_scale = nn.Parameter(scale.clamp_min(1e-8).log())
        # Usual for LoRA: one side random, the other zero, so that training starts from the trits alone.
        generator = torch.Generator().manual_seed(linear.weight.numel())
        down = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        self.bias = linear.bias

    trits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N] in x.dtype."""
        weight = self.log_scale.exp()[:, None] * self.trits
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = F.linear(x, weight.to(x.dtype), bias)
        return out + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    @property
    def stored_bytes(self) -> int:
        """Two bits a trit; scales and both sides of the branch in bfloat16."""
        return -(-self.trits.numel() // 4) + 2 * (self.log_scale.numel() + self.down.numel() + self.up.numel())


def insert_(model: nn.Module, names: Sequence[str]) -> dict[str, AbsmeanLora]:
    """Put an untrained `AbsmeanLora` in the place of every named linear."""
    layers = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = AbsmeanLora(linear)
        setattr(model.get_submodule(parent), leaf, layers[name])
    return layers


def apply(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype, folder: str | None) -> int:
    """What `train` left in `folder`, put into a dense model; see `Rival.apply`."""
    if folder is None:
        raise RivalError(f"absmean-lora is trained first: python -m {__name__} SRC OUT, then --rival absmean-lora=OUT")
    layers = insert_(model, names)
    try:
        with safe_open(Path(folder) / ADAPTER, framework="pt") as stream, torch.no_grad():
            for name, layer in layers.items():
                for part in ("log_scale", "down", "up"):
                    layer.get_parameter(part).copy_(stream.get_tensor(f"{name}/{part}"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RivalError(f"{folder} holds no adapter for this model ({error}); train it again") from None
    for layer in layers.values():
        layer.requires_grad_(False)
    return sum(layer.stored_bytes for layer in layers.values())


def train(
    job: Job,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    *,
    learning_rate: float = BRANCH_RATE,
) -> dict[str, Any]:
    """Distil the branch on the recipe's states; resumes. Returns `out/meta.json`.

    Args:
        job: the teacher, the prompts and the recipe.
        out: the folder to write.
        progress: called as (stage, done, total).
        learning_rate: peak, of the branch.

    Raises:
        RivalError: the recipe trains nothing.
        DiskFullError: no space left; the same call resumes.
    """
    config = dataclasses.replace(job.recipe.distillation, weight_decay=0.0)
    if not config.steps or job.prompts is None:
        raise RivalError(f"recipe '{job.recipe.name}' has no distillation to train a LoRA by; take balanced or best")
    identity = {"job": job.id, "rival": "absmean-lora", "width_per_rank": WIDTH_PER_RANK, "branch_rate": learning_rate}
    if (out / "meta.json").is_file():
        found: dict[str, Any] = read_json(out / "meta.json")
        if found.items() >= identity.items():
            return found
    pipe = whole_teacher(job)
    trajectories = record_trajectories(
        pipe, job.prompts, out / "trajectories", job.recipe.calibration,
        parents={"source": job.source.fingerprint()}, on_progress=lambda d, n: progress("record", d, n),
    )  # fmt: skip
    model = pipe.transformer.float().requires_grad_(False)
    layers = insert_(model, list(job.linears))

    def part(name: str) -> dict[str, nn.Parameter]:
        return {f"{n}.{name}": layer.get_parameter(name) for n, layer in layers.items()}

    groups = [
        ParameterGroup("branch", part("down") | part("up"), learning_rate),
        ParameterGroup("scales", part("log_scale"), config.scale_learning_rate),
    ]
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    states = online_states(job)[0] if job.recipe.online.pool else None
    with training_attention(job.device):
        result = distill_(
            lambda **kwargs: model(**kwargs, return_dict=False)[0],
            groups,
            trajectories,
            config,
            out / "distilled",
            states=states,
            device=job.device,
            identity=identity,
            on_progress=lambda done, total, loss: progress("distill", done, total),
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}/down"] = layer.down.detach().bfloat16()
        tensors[f"{name}/up"] = layer.up.detach().bfloat16()
        # The scale itself is what two bytes are counted for; its logarithm would lose more.
        tensors[f"{name}/log_scale"] = layer.log_scale.detach().exp().bfloat16().float().log()
    write_tensors(out / ADAPTER, tensors)
    meta = {
        "kind": "absmean-lora",
        **identity,
        "recipe": job.recipe.name,
        "adapter_sha256": file_sha256(out / ADAPTER),
        "validation_mse": {str(k): v for k, v in sorted(result.validation.items())},
        **provenance(job.device),
    }
    write_json(out / "meta.json", meta)
    return meta


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tritflow.pipelines.rivals.absmean_lora")
    parser.add_argument("src", help="a dense pipeline folder, or small")
    parser.add_argument("out", help="the folder to write; an unfinished run resumes")
    parser.add_argument("--recipe", default="balanced", help="whose states, steps and schedule (balanced)")
    parser.add_argument("--prompts", help="calibration prompts (the model folder's own)")
    parser.add_argument("--learning-rate", type=float, default=BRANCH_RATE, help=f"of the branch ({BRANCH_RATE})")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    try:
        job = plan(args.src, args.recipe, prompts=args.prompts, device=args.device)
        meta = train(job, Path(args.out), learning_rate=args.learning_rate)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps({"out": args.out, "validation_mse": meta["validation_mse"]}))


if __name__ == "__main__":
    main()
