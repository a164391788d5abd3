"""What all stages of one training run share: processes, device, folder, log, words and prompts."""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tritflow.scenes.held_out import evaluation_prompts
from tritflow.training import data, start
from tritflow.training.loop import rank, world_size

# Seeds of prompts that are only looked at while training; the reported scores use others.
PROGRESS_SEED = 1000


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
        self.pool = ProcessPoolExecutor(min(24, self.workers), mp_context=get_context("spawn"))
        self.compile = not args.no_compile and self.device.type == "cuda"
        self.tokenizers = data.word_tokenizers()
        self.prompts = evaluation_prompts(32, PROGRESS_SEED)
        self.mixture = args.mixture
        # The stream of examples: each process has its own; a further leg with another seed sees new ones.
        self.stream = 1 + rank() + 1000 * args.seed
        self.start = start.folder_of(args.start) if args.start else None

    def close(self) -> None:
        """Wait for the other processes and let go of the workers."""
        if world_size() > 1:
            dist.barrier()
            dist.destroy_process_group()
        self.pool.shutdown(cancel_futures=True)

    def meet(self) -> None:
        """Wait for the other processes: what all have looked for, one may write from here on."""
        if world_size() > 1:
            dist.barrier()

    def log(self, text: str) -> None:
        """One line with the time and the process, to the screen and to `log-RANK.txt`."""
        line = f"[{time.monotonic() - self.begin:7.1f}s rank {rank()}] {text}"
        print(line, flush=True)
        with (self.args.out / f"log-{rank()}.txt").open("a") as f:
            f.write(line + "\n")

    def save(self, name: str, tensors: dict[str, torch.Tensor], facts: dict[str, Any] | None = None) -> None:
        """Process 0 writes safetensors into the run's folder, whole or not at all; `facts` go into the metadata."""
        if rank() == 0:
            path = self.args.out / name
            metadata = {k: str(v) for k, v in (facts or {}).items()}
            save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, str(path) + ".tmp", metadata)
            os.replace(str(path) + ".tmp", path)
