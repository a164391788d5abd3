"""One process of `test_two_processes_make_one_model`: a tiny leg, and what this process ended with."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from test_training_run import quick
from torch import nn

from tritflow.training import flow, stages
from tritflow.training.__main__ import main
from tritflow.training.loop import rank


def digest(module: nn.Module) -> str:
    values = [v.detach().contiguous().numpy().tobytes() for v in module.state_dict().values()]
    return hashlib.sha256(b"".join(values)).hexdigest()


if __name__ == "__main__":
    facts: dict[str, Any] = {}
    train, make = flow.train_flow, stages.make_vae

    def train_flow(model: Any, data: Any, **options: Any) -> Any:
        trainer = train(model, data, **options)
        facts.update(flow=digest(model), steps=trainer.steps, first=data.t5_ids[0].tolist())
        return trainer

    def make_vae(run: Any) -> Any:
        model, order = make(run)
        facts.update(vae=digest(model), rank=rank())
        return model, order

    with quick() as patch:
        patch.setattr(flow, "train_flow", train_flow)
        patch.setattr(stages, "make_vae", make_vae)
        main(sys.argv[1:])
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    (out / f"rank-{facts['rank']}.json").write_text(json.dumps(facts))
