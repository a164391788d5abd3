"""How a model wants to be sampled, as its folder or hub repository says, or else its kind.

Also the small files that are read without loading a model, from folders and from the hub.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritflow.config import nearest
from tritflow.models import FLUX1

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""`owner/name`."""


class ModelError(ValueError):
    """The named model is missing, incomplete, of another family, or stored as a pickle. Says what to do."""


@dataclass(frozen=True)
class GenerationDefaults:
    """How a model wants to be sampled: pixels, sampler steps, guidance, text tokens.

    The defaults are FLUX.1-dev's; a folder overrides them in its `generation.json`.
    """

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    max_sequence_length: int = 512

    @classmethod
    def read(cls, folder: str | Path) -> GenerationDefaults:
        """From `folder/generation.json`; FLUX.1-dev's when there is none.

        Raises:
            ModelError: the file is not an object of known names and positive numbers.
        """
        path = Path(folder) / "generation.json"
        if not path.is_file():
            return cls()
        data = read_json_file(path)
        known: dict[str, Any] = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        for key, value in data.items():
            if key not in known:
                raise ModelError(f"{path}: unknown setting '{key}'{nearest(key, list(known))}")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value < 0 or (known[key] is int and (value < 1 or value != int(value))):
                raise ModelError(f"{path}: '{key}' must be a positive number, not {value!r}")
        return cls(**{key: known[key](value) for key, value in data.items()})


SCHNELL = GenerationDefaults(num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256)
FLUX2_DEV = GenerationDefaults(num_inference_steps=50, guidance_scale=4.0)
FLUX2_KLEIN = GenerationDefaults(num_inference_steps=4, guidance_scale=1.0)
"""Black Forest Labs' own settings of FLUX.1-schnell, FLUX.2-dev and -klein-base, and of the distilled klein."""


def generation_defaults(pipe: Any) -> GenerationDefaults:
    """How `pipe` is sampled unless asked otherwise, however it was loaded.

    By the `generation.json` of its folder or hub repository; without one, by the kind of its model.
    """
    stored = stored_defaults(str(getattr(pipe, "config", {}).get("_name_or_path") or ""))
    if stored is not None:
        return stored
    transformer: Any = getattr(pipe, "transformer", None)
    if transformer is None:
        return GenerationDefaults()
    if type(transformer).__name__ == FLUX1.transformer_class:
        return GenerationDefaults() if transformer.config.guidance_embeds else SCHNELL
    return FLUX2_KLEIN if pipe.config.get("is_distilled") else FLUX2_DEV


def stored_defaults(origin: str) -> GenerationDefaults | None:
    """From the `generation.json` of a pipeline folder or hub id; None if it has none."""
    if origin and Path(origin).is_dir():
        folder: Path | None = Path(origin)
    else:
        file = hub_file(origin, "generation.json") if HUB_ID.fullmatch(origin) else None
        folder = file.parent if file else None
    found = folder is not None and (folder / "generation.json").is_file()
    return GenerationDefaults.read(folder) if found and folder is not None else None


def hub_file(repository: str, name: str) -> Path | None:
    """One small file of a hub repository, from the cache or fetched; None if there is none, or no way to it."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except (OSError, ValueError):  # all that the hub raises, and names it does not take
        return None


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ModelError` when it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} is not a JSON object")
    return data
