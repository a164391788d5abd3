"""From a model's name on the command line to a `Contender`: which files, which settings, how it draws."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritflow.evaluation.api import Draw, EvaluationError
from tritflow.evaluation.images import ModelId, Settings
from tritflow.evaluation.models import fingerprint
from tritflow.evaluation.run import Contender
from tritflow.results import digest

if TYPE_CHECKING:
    from PIL.Image import Image

    from tritflow.pipelines.rivals import Rival


def contender(
    model: str,
    *,
    base: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    mode: str | None = None,
    backend: str | None = None,
    rival: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    optimized: bool = False,
) -> Contender:
    """A model ready to be evaluated; its weights are loaded only when pictures are missing.

    Settings left out are the model folder's own (`generation.json`). `mode` and `backend` are for ternary models.
    `rival` names another quantizer (`pipelines.rivals`) that a dense model goes through in memory. `optimized` draws
    by `tritflow.optimize`'s forward, the one that is timed.

    Raises `ModelError` and `DeviceError` of `pipelines.loading` when the model is not there, `EvaluationError`
    when a mode is asked of a dense model or a rival of a ternary one, `RivalError` when the rival cannot run here.
    """
    from tritflow.pipelines.loading import GenerationDefaults, pick_device, pick_dtype, resolve_model

    source = resolve_model(model, base)
    on = pick_device(device)
    as_type = pick_dtype(dtype, on)
    pipeline = _local(source.pipeline)
    # A bare transformer borrows the other components, so both folders decide what it draws.
    parts = [pipeline] if source.transformer is None else [source.transformer, pipeline]
    stored = stored_mode(source.transformer or pipeline / "transformer")
    if mode is not None and stored is None:
        raise EvaluationError(f"'{model}' is a dense model; --mode {mode} is for ternary ones")
    if optimized and stored is None:
        raise EvaluationError(f"'{model}' is a dense model; --optimize is for ternary ones")
    other = None if rival is None else _usable_rival(rival, model, stored, on, as_type)
    defaults = GenerationDefaults.read(pipeline)
    extra: dict[str, Any] = {
        "mode": mode or stored,
        "dtype": str(as_type).removeprefix("torch."),
        "max_sequence_length": defaults.max_sequence_length,
        "backend": backend,
        "rival": None if other is None else other.name,
        "optimized": True if optimized else None,
    }
    settings = Settings(
        height or defaults.height,
        width or defaults.width,
        num_inference_steps or defaults.num_inference_steps,
        defaults.guidance_scale if guidance_scale is None else guidance_scale,
        {k: v for k, v in extra.items() if v is not None},
    )

    @functools.cache
    def loaded() -> tuple[Any, dict[str, Any]]:
        from tritflow.pipelines.loading import load_pipeline, quiet

        with quiet():
            pipe = load_pipeline(
                model, base=base, device=str(on), dtype=as_type, mode=mode, backend=backend, optimized=optimized
            )
        return pipe, {} if other is None else _quantized_by(other, pipe, pipeline)

    def load() -> Draw:
        from tritflow.pipelines.generate import generate

        pipe, _ = loaded()

        def draw(prompts: list[str], seeds: list[int]) -> list[Image]:
            return generate(
                pipe,
                prompts,
                seeds,
                height=settings.height,
                width=settings.width,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                batch_size=len(prompts),
            )

        return draw

    def path() -> dict[str, Any]:
        from tritflow.pipelines.flags import flags

        return flags(loaded()[0], on)

    name = Path(model).resolve().name if Path(model).is_dir() else model
    found = fingerprint(parts)
    if other is None:
        where = source.transformer or pipeline / "transformer"
        facts = None if stored is None else functools.partial(_ternary_facts, Path(where))
        return Contender(ModelId(name, found), settings, load, str(on), facts, path)
    from tritflow.pipelines.rivals import rival_identity

    identity = ModelId(f"{name}-{other.name}", digest({"model": found, **rival_identity(other)}))
    return Contender(identity, settings, load, str(on), lambda: loaded()[1], path)


def _usable_rival(name: str, model: str, stored: str | None, device: Any, dtype: Any) -> Rival:
    from tritflow.pipelines.rivals import RivalError, find_rival

    rival = find_rival(name)
    if stored is not None:
        raise EvaluationError(f"'{model}' is ternary already; --rival {name} starts from a dense model")
    reason = rival.why_not(device, dtype)
    if reason:
        raise RivalError(reason)
    return rival


def _quantized_by(rival: Rival, pipe: Any, folder: Path) -> dict[str, Any]:
    from tritflow.models import family_of
    from tritflow.pipelines.rivals import apply_rival_

    config = {"_class_name": type(pipe.transformer).__name__, **pipe.transformer.config}
    names = list(family_of(config).block_linears(config))
    return apply_rival_(rival, pipe.transformer, names, pipe=pipe, folder=folder)


def _ternary_facts(transformer: Path) -> dict[str, Any]:
    """As a rival's, of a ternary folder: what its linears take as stored, scales included."""
    from tritflow.formats.accounting import ternary_bytes
    from tritflow.formats.checkpoint import TernaryFolder

    folder = TernaryFolder(transformer)
    shapes = [(folder.entry(f"{name}.weight").shape[0], width) for name, width in folder.linears.items()]
    weights, size = ternary_bytes(shapes, folder.ternary.packing, folder.ternary.column_scale)
    return {
        "name": "tritflow",
        "title": "tritflow",
        "simulated": False,
        "weights": weights,
        "bytes": size,
        "bits_per_weight": round(8 * size / weights, 4),
    }


def stored_mode(transformer: str | Path) -> str | None:
    """The mode in a ternary transformer's config.json; None for a dense one."""
    path = Path(transformer) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise EvaluationError(f"{path}: is missing or is not JSON, so the model's mode is not known") from None
    quantization = config.get("quantization_config") or {}
    return str(quantization.get("mode", "w2a16")) if quantization.get("quant_method") == "tritflow" else None


def trained_prompts(model: str, given: str | Path | None = None, suites: str | Path | None = None) -> list[str] | None:
    """Prompts a model was trained or calibrated on; None when nobody knows, which results then say.

    They come from `given` (.txt, .jsonl or folder), else from a `prompts.jsonl` in the model's folder, else from its
    meta.json: that names a set by SHA-256, which is looked for among the built-in world's captions where it is called
    `scenes:N`, in the base pipeline's `calibration_prompts.txt`, with the shipped teacher, and among the paper's
    prompts (in `suites`, or where they were fetched to). A meta.json that says no prompts were used gives none.

    Raises `PromptsError` for a bad file.
    """
    from tritflow.calibration.prompts import load_prompts

    if given is not None:
        return load_prompts(given).texts
    from tritflow.assets import ASSETS, asset_path

    folder = asset_path(model) if model in ASSETS else Path(model)
    if (folder / "prompts.jsonl").is_file():
        return load_prompts(folder / "prompts.jsonl").texts
    meta = _meta(folder)
    if meta.get("kind") != "ternary" or "prompts" not in meta:
        return None
    recorded = meta["prompts"]
    return [] if recorded is None else _known_set(recorded, folder, meta.get("base"), suites)


def _meta(folder: Path) -> dict[str, Any]:
    for path in (folder / "meta.json", folder.parent / "meta.json" if folder.name == "transformer" else None):
        if path is not None and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
    return {}


def _known_set(recorded: dict[str, Any], folder: Path, base: str | None, suites: str | Path | None) -> list[str] | None:
    """The texts of a set that meta.json describes, when a set with its SHA-256 can be found."""
    from tritflow import assets
    from tritflow.assets import ASSETS, asset_path
    from tritflow.calibration.prompt_sources import PromptsError
    from tritflow.calibration.prompts import load_prompts, paper_prompts
    from tritflow.pipelines.scene_prompts import scene_prompts

    scenes = scene_prompts(str(recorded.get("name")))
    if scenes is not None and scenes.sha256 == recorded.get("sha256"):
        return scenes.texts
    places = [folder]
    if base:
        places.append(asset_path(base) if base in ASSETS else folder / base)
    else:
        # A complete folder names no base. The set is known by its hash, so looking with the shipped teacher, whose
        # prompts the shipped student and the demo's were made from, cannot find a wrong one.
        places.append(Path(assets.__file__).parent / ASSETS["small"])
    for place in places:
        path = place / "calibration_prompts.txt"
        if path.is_file():
            found = load_prompts(path)
            if found.sha256 == recorded.get("sha256"):
                return found.texts
    try:
        paper = paper_prompts(suites)
    except PromptsError:
        return None
    return paper.texts if paper.sha256 == recorded.get("sha256") else None


def _local(pipeline: str) -> Path:
    """The pipeline's folder; for a hub id the snapshot in the cache, downloaded when it is not there yet."""
    if Path(pipeline).is_dir():
        return Path(pipeline)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    # Single-file copies at the top of hub repositories are not what a pipeline reads.
    return Path(snapshot_download(pipeline, allow_patterns=wanted, ignore_patterns=["flux*.safetensors"]))
