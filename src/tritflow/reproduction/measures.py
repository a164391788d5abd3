"""The paper's Table 3 for this model on this device: bytes on disk, time of a picture, bytes on the device."""

from __future__ import annotations

import gc
from typing import Any

from tritflow.formats.locate import resolve_transformer
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

    Latency is the transformer's share of a picture in seconds (median), memory its weights on the device.
    """
    import torch

    from tritflow.profiling import end_to_end

    measured = {}
    for name, model, base in (("dense", request.model, None), ("ternary", str(request.student), request.model)):
        measured[name] = end_to_end.measure(
            model,
            base=base,
            device=request.device,
            dtype=request.dtype,
            num_inference_steps=request.latency_steps,
            rounds=request.rounds,
            progress=lambda done, total, name=name: report(f"timing the {name} model", done, total),  # type: ignore[misc]
        )
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
        **provenance(request.on),
    }


def _with_ratio(pair: dict[str, Any]) -> dict[str, Any]:
    return {**pair, "ratio": pair["dense"] / pair["ternary"]}
