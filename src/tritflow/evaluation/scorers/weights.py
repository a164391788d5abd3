"""Loading a scorer's model: from a folder or the hub, safetensors alone, with one clear line when it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.models import fingerprint

UNUSED = 0.05
"""Share of a model's weights that may be missing: published depth models lack layers that are never run."""


def load_model(kind: Any, source: str, role: str, device: str, dtype: Any = None) -> Any:
    """`kind.from_pretrained(source)` in `dtype` (float32 by default) and eval mode on `device`, from safetensors.

    Raises `EvaluationError`, naming the role, when it is not there, is of another kind, has no safetensors, or lacks
    weights: from_pretrained itself only warns of the last, and random weights would score.
    """
    import torch

    from tritflow.pipelines.loading import quiet

    try:
        with quiet():
            stored = kind.config_class.get_config_dict(source)[0].get("model_type")
            wanted = kind.config_class.model_type
            if stored != wanted:
                raise EvaluationError(
                    f"the {role} scorer '{source}' is a '{stored}' model; a '{wanted}' model is needed"
                )
            model, info = kind.from_pretrained(
                source, use_safetensors=True, dtype=dtype or torch.float32, output_loading_info=True
            )
    except EvaluationError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EvaluationError(_unusable(source, role, error)) from None
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    missing = sum(sizes.get(name, 0) for name in info["missing_keys"]) / sum(sizes.values())
    if missing > UNUSED:
        raise EvaluationError(f"the {role} scorer '{source}' lacks {missing:.0%} of its weights; fetch it again")
    return model.to(device).eval()


def load_tokenizer(source: str, role: str) -> Any:
    """The tokenizer beside a scorer's model. Raises `EvaluationError` when there is none."""
    from transformers import AutoTokenizer

    from tritflow.pipelines.loading import quiet

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(_unusable(source, role, error)) from None


def identity(source: str) -> str:
    """How a scorer's weights are named in results: a hub id as it is, a folder by name and hash of its files."""
    path = Path(source)
    return f"{path.resolve().name} ({fingerprint([path])})" if path.is_dir() else source


def _unusable(source: str, role: str, error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"cannot load the {role} scorer '{source}': {first[:200]}; "
        f"give a folder with its safetensors weights: --scorer {role}=FOLDER"
    )
