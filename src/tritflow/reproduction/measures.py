"""The paper's Table 3 for this model on this device: bytes on disk, time of a picture, bytes on the device."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

from tritflow.formats.locate import resolve_transformer
from tritflow.models import FLUX1
from tritflow.reproduction.costs import job_of
from tritflow.reproduction.engine import Report
from tritflow.reproduction.request import Request
from tritflow.results import provenance, read


def measure_storage(request: Request) -> list[dict[str, Any]]:
    """Runs of the topic "storage": the dense transformer's folder and the ternary one's."""
    from tritflow.assets import ASSETS, asset_path
    from tritflow.profiling import storage

    model = asset_path(request.model) if request.model in ASSETS else request.model
    dense = storage.measure(resolve_transformer(model), f"{request.name}, dense")
    ternary = storage.measure(resolve_transformer(request.student), f"{request.name}, ternary", dense["bytes"])
    return [{**row, **provenance()} for row in (dense, ternary)]


def measure_latency(request: Request, report: Report) -> dict[str, Any]:
    """A run of the topic "cost": the dense model and the ternary one, one after the other, and their storage.

    Latency is the transformer's share of a picture in seconds (median), memory its weights on the device. FLUX.1 is
    also timed with fused blocks (`tritflow.optimize`), as `optimized`; should that fail, `failed` says how, and the
    rest stands.
    """
    import torch

    from tritflow.profiling import end_to_end

    ternary = str(request.student), request.model
    candidates: list[tuple[str, str, str | None]] = [("dense", request.model, None), ("ternary", *ternary)]
    if job_of(request).family is FLUX1:
        candidates.append(("optimized", *ternary))
    measured, failed = {}, {}
    for name, model, base in candidates:
        try:
            measured[name] = end_to_end.measure(
                model,
                base=base,
                device=request.device,
                dtype=request.dtype,
                optimized=name == "optimized",
                num_inference_steps=request.latency_steps,
                rounds=request.rounds,
                progress=partial(report, f"timing the {name} model"),
            )
        except Exception as error:
            # Hours of drawing and scoring come before this; an extra measurement must not keep the report from them.
            if name != "optimized":
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        gc.collect()  # a pipeline is a ring of references; the next one needs its room
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    stored = {r["label"].rpartition(", ")[2]: r["bytes"] for r in read(request.results / "storage.json", "storage")}
    seconds = {name: run["later"]["transformer"]["p50"] for name, run in measured.items()}
    weights = {name: run["transformer_bytes"] for name, run in measured.items()}
    return {
        "label": request.name,
        "steps": measured["dense"]["settings"]["num_inference_steps"],
        "latency": _with_ratio(seconds),
        "memory": _with_ratio(weights),
        "storage": _with_ratio(stored),
        "end_to_end": measured,
        "failed": failed,
        **provenance(request.on),
    }


def _with_ratio(pair: dict[str, Any]) -> dict[str, Any]:
    return {**pair, "ratio": pair["dense"] / pair["ternary"]}
