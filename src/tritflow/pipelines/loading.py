"""From a name on the command line to a ready pipeline, with every missing thing said in one line.

A model is named by a folder, by a hub id (`owner/name`), or by `small` / `small-student`, which ship inside the
package. A folder is either a whole pipeline (model_index.json) or a ternary transformer alone, which takes its
other components from a base pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tritflow.assets import ASSETS, asset_path
from tritflow.config import TernaryConfig, nearest
from tritflow.formats.locate import fetch
from tritflow.models import FAMILIES
from tritflow.pipelines.defaults import HUB_ID, ModelError, hub_file, read_json_file
from tritflow.pipelines.defaults import GenerationDefaults as GenerationDefaults
from tritflow.pipelines.defaults import generation_defaults as generation_defaults

if TYPE_CHECKING:
    from tritflow.pipelines.memory_plan import MemoryPlan

PIPELINE_CLASSES = ("FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline")
"""Text to picture; diffusers' other FLUX pipelines take a ternary transformer by its own `from_pretrained`."""
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DeviceError(ValueError):
    """The named device is not there, or not known to this PyTorch."""


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`None` or "auto": cuda, else mps, else cpu. Raises `DeviceError` for one that is not available."""
    if device is None or str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise DeviceError(
            f"unknown device '{device}'; use cpu, cuda, cuda:N or mps{nearest(str(device), ['cpu', 'cuda', 'mps'])}"
        ) from None
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                f"--device {device}: PyTorch {torch.__version__} sees no CUDA device here; use --device cpu, "
                "or install a CUDA build of PyTorch and its driver"
            )
        if (found.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"--device {device}: there are only {torch.cuda.device_count()} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device mps: this PyTorch has no Metal device; use --device cpu")
    return found


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """A dtype by name; `None` or "auto": bfloat16 on accelerators, float32 on the CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype '{dtype}'; use one of {', '.join(_DTYPES)}{nearest(dtype, list(_DTYPES))}")
    return _DTYPES[dtype]


@dataclass(frozen=True)
class ModelSource:
    """Where a named model lies.

    Attributes:
        pipeline: folder or hub id of the whole pipeline that gives every component not given by `transformer`.
        transformer: folder of a transformer that replaces the pipeline's own, or None.
    """

    pipeline: str
    transformer: Path | None = None


def resolve_model(model: str | Path, base: str | Path | None = None) -> ModelSource:
    """Find out what `model` is, without loading weights.

    Args:
        model: a pipeline folder, a transformer folder (or a folder holding only `transformer/`), a hub id,
            `small` or `small-student`.
        base: pipeline for the components that a bare transformer lacks; by default the one recorded in its
            `meta.json`.

    Raises:
        ModelError: nothing usable is there; the message says what was found and what to do.
        AssetError: the built-in model is not installed.
    """
    name = str(model)
    if name in ASSETS:
        folder = asset_path(name)
        return resolve_model(folder, base or (asset_path("small") if name != "small" else None))
    path = Path(name).expanduser()
    if path.is_dir():
        return _resolve_folder(path, base)
    if path.is_file():
        if path.suffix in _PICKLES:
            raise ModelError(f"{path} is a pickle, which tritflow never loads; convert it to safetensors first")
        raise ModelError(f"{path} is a single file; `tritflow quantize {path} OUT` makes a model folder of it")
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return ModelSource(name)
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(path.name, [*siblings, *ASSETS])
    raise ModelError(f"no model '{name}': neither a folder, a hub id (owner/name) nor a built-in name{hint}")


def locate_model(model: str | Path, base: str | Path | None = None) -> ModelSource:
    """As `resolve_model`, and a hub repository that holds a transformer alone is fetched.

    Whole pipelines are left to diffusers, which fetches what its class needs. Errors as in `resolve_model`, and
    `CheckpointError` for a hub that cannot be reached.
    """
    source = resolve_model(model, base)
    name = source.pipeline
    whole = source.transformer is not None or Path(name).is_dir() or hub_file(name, "model_index.json")
    if whole or not any(hub_file(name, place) for place in ("config.json", "transformer/config.json")):
        return source
    return _resolve_folder(fetch(name), base)


def _resolve_folder(path: Path, base: str | Path | None) -> ModelSource:
    index = path / "model_index.json"
    if index.is_file():
        name = read_json_file(index).get("_class_name")
        if name not in PIPELINE_CLASSES:
            raise ModelError(_other_pipeline(str(path), name))
        check_weights(path)
        return ModelSource(str(path))
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            name = read_json_file(folder / "config.json").get("_class_name")
            known = [family.transformer_class for family in FAMILIES.values()]
            if name not in known:
                raise ModelError(f"{folder} is a {name}; tritflow runs {', '.join(known)}")
            check_weights(folder)
            return ModelSource(_base_of(path, base), folder)
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{path} holds a pickle ({pickles[0]}) and no model_index.json; tritflow reads safetensors only"
        )
    raise ModelError(f"{path} is no model folder: it has neither model_index.json nor transformer/config.json")


def _other_pipeline(model: str, name: Any) -> str:
    return f"{model} is a {name}; tritflow runs {', '.join(PIPELINE_CLASSES)}"


def _base_of(path: Path, base: str | Path | None) -> str:
    """The pipeline that completes a bare transformer: named by the caller, or recorded when it was made."""
    if base is None:
        for meta in (path / "meta.json", path.parent / "meta.json"):
            recorded = read_json_file(meta).get("base") if meta.is_file() else None
            if recorded:
                base = recorded if recorded in ASSETS or Path(recorded).is_absolute() else meta.parent / recorded
                if not (str(base) in ASSETS or Path(base).is_dir()):
                    base = recorded
                break
    if base is None:
        raise ModelError(
            f"{path} holds only a transformer; name the pipeline with its text encoders and VAE: --base FLUX_DIR"
        )
    source = resolve_model(base)
    if source.transformer is not None:
        raise ModelError(f"--base {base}: holds only a transformer too; name a whole pipeline folder")
    return source.pipeline


def check_weights(folder: Path) -> None:
    """Refuse pickles without safetensors beside them, and files cut short, before anything is loaded.

    Raises:
        ModelError: names the file.
        CheckpointError: a safetensors header does not fit its file.
    """
    from tritflow.formats.safetensors_file import SafetensorsFile

    for place in [folder, *(p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[:1] != ".")]:
        files = sorted(place.glob("*.safetensors"))
        pickles = sorted(p for p in place.iterdir() if p.suffix in _PICKLES)
        if pickles and not files:
            raise ModelError(f"{pickles[0]} is a pickle, which tritflow never loads; convert it to safetensors")
        for file in files:
            SafetensorsFile(file)


def load_transformer(folder: Path, dtype: torch.dtype, device: str | None = None, *, optimized: bool = False) -> Any:
    """A transformer alone, as diffusers loads it.

    Args:
        folder: a dense or ternary transformer folder.
        dtype: of whatever is not ternary.
        device: load straight there, which is several times faster than through host memory; None: to host memory.
        optimized: call `tritflow.optimize` without a scheduler, too, see `load_pipeline`; `device` is needed.

    Raises:
        ModelError: `optimized` without a device.
        OptimizeError: the model cannot be optimized.
    """
    import diffusers

    if optimized and device is None:
        raise ModelError("an optimized transformer needs a device to be loaded to")
    name = read_json_file(folder / "config.json")["_class_name"]
    where = {} if device is None or optimized else {"device_map": device}
    with _for_optimize(torch.device(device or "cpu"), optimized):
        model = getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, **where)
    if not optimized:
        return model
    from tritflow.pipelines.optimize import optimize

    return optimize(model, device=device)


def import_for(folder: Path) -> None:
    """Import all that loading and optimizing the transformer in a folder needs, for whoever times the loading alone."""
    import diffusers

    import tritflow.pipelines.optimize
    import tritflow.pipelines.quantizer  # noqa: F401

    getattr(diffusers, read_json_file(folder / "config.json")["_class_name"])  # imported when it is first asked for


def _for_optimize(device: torch.device, optimized: bool) -> AbstractContextManager[None]:
    """While this lasts, ternary weights are loaded to where the optimized forward wants them."""
    if not optimized:
        return nullcontext()
    from tritflow.models.flux1 import is_modulation
    from tritflow.pipelines.quantizer import straight_to

    return straight_to(device, is_modulation)


def load_pipeline(
    model: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    mode: str | None = None,
    backend: str | None = None,
    plan: MemoryPlan | None = None,
    optimized: bool = False,
) -> Any:
    """Load a dense or ternary FLUX.1 or FLUX.2 pipeline with stock diffusers classes.

    Args:
        model: see `resolve_model`.
        base: see `resolve_model`.
        device: `auto` (default), `cpu`, `cuda`, `cuda:N`, `mps`.
        dtype: of everything that is not ternary; default bfloat16 on accelerators, float32 on the CPU.
        mode: overrides the checkpoint's `w2a16` or `w2a8`.
        backend: overrides the checkpoint's kernel choice.
        plan: where components lie, from `plan_memory`; None: all on the device.
        optimized: call `tritflow.optimize`, too. Ternary weights then go to the device at once, and those of the
            modulation layers into pinned host memory, never to the device.

    Returns:
        A diffusers pipeline of one of `PIPELINE_CLASSES` on the device.

    Raises:
        ModelError, DeviceError, CheckpointError, AssetError, MemoryPlanError, OptimizeError: one line each, naming
            what is wrong.
    """
    if optimized and plan is not None:
        raise ModelError("the optimized forward takes no offloading; give either a memory plan or optimize")
    on = pick_device(device)
    as_type = pick_dtype(dtype, on)
    overrides = {key: value for key, value in (("mode", mode), ("backend", backend)) if value is not None}
    TernaryConfig.from_dict(overrides)  # refused before gigabytes are read
    from tritflow.pipelines.fallback import warn_of_fallback
    from tritflow.pipelines.offloading import apply_plan, keep_plan

    source = locate_model(model, base)
    if plan is not None:
        keep_plan(plan, on)
    import diffusers

    with _one_line(model), _for_optimize(on, optimized):
        parts: dict[str, Any] = {}
        if source.transformer is not None:
            parts["transformer"] = load_transformer(source.transformer, as_type)
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
            source.pipeline, torch_dtype=as_type, use_safetensors=True, **parts
        )
    if type(pipe).__name__ not in PIPELINE_CLASSES:  # a hub id told nothing beforehand
        raise ModelError(_other_pipeline(str(model), type(pipe).__name__))
    if overrides:
        configure_(pipe, **overrides)
    warn_of_fallback(pipe, on)
    if plan is not None:
        apply_plan(pipe, plan, on)
        return pipe
    if optimized:
        from tritflow.pipelines.optimize import optimize

        return optimize(pipe, device=on)
    return pipe.to(on)


def configure_(
    model: Any, *, mode: str | None = None, backend: str | None = None, activation_dtype: str | None = None
) -> int:
    """Change how a ternary model computes, in place; what is stored does not change.

    Args:
        model: a pipeline or a module holding `TernaryLinear`s.
        mode: `w2a16` or `w2a8`.
        backend: `auto`, `reference`, `cpu`, `triton` or `hopper`.
        activation_dtype: the 8-bit type of `w2a8`.

    Returns:
        How many linears were changed.

    Raises:
        ConfigError: a value that is not allowed.
        ModelError: the model has no ternary linear.
    """
    from tritflow.modules.ternary_linear import TernaryLinear

    given = {"mode": mode, "backend": backend, "activation_dtype": activation_dtype}
    given = {key: value for key, value in given.items() if value is not None}
    TernaryConfig.from_dict(given)
    module = getattr(model, "transformer", model)
    linears = [m for m in module.modules() if isinstance(m, TernaryLinear)]
    if not linears:
        raise ModelError(
            f"this model is dense: {' and '.join(given) or 'its mode'} can be set on ternary models only; "
            "make one with `tritflow quantize`"
        )
    for linear in linears:
        for key, value in given.items():
            setattr(linear, key, value)
    return len(linears)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the libraries underneath while models load; the caller shows its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, enabled in zip(libraries, shown, strict=True):
            if enabled:
                library.enable_progress_bar()


@contextmanager
def _one_line(model: str | Path) -> Iterator[None]:
    """Library errors about files and the hub, shortened to the line that matters and the model's name."""
    try:
        yield
    except (OSError, ValueError) as error:
        if type(error).__module__.startswith("tritflow"):
            raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"cannot load '{model}': {first}") from error
