"""The model card of a ternary folder: what it is, what it was made from, its licence, sizes, scores, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tritflow.hub.licences import Licence
from tritflow.report.formats import interval, signed_interval, size, text

MARK = "<!-- written by tritflow push -->"


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        repo_id: where the model goes.
        base_model: hub id of what it was made from; None: the built-in small FLUX.
        licence: of both.
        meta: the folder's meta.json.
        transformer: `Component.summary()` of the ternary transformer.
        files: bytes of all that is uploaded.
        classes: of transformer and pipeline, in diffusers.
        complete: whether the folder is a whole pipeline.
        generation: the folder's own sampler settings, if any.
        runs: of evaluations of this very model.
    """

    repo_id: str
    base_model: str | None
    licence: Licence
    meta: dict[str, Any]
    transformer: dict[str, Any]
    files: int
    classes: tuple[str, str]
    complete: bool
    generation: dict[str, Any] = field(default_factory=dict)
    runs: Sequence[dict[str, Any]] = ()


def model_card(facts: Facts) -> str:
    """README.md with its YAML head."""
    name = facts.repo_id.partition("/")[2]
    parts = [_head(facts), MARK, f"# {name}", _what(facts), _sizes(facts), _loading(facts), _scores(facts.runs)]
    return "\n\n".join(part for part in [*parts, _recipe(facts), _licence(facts)] if part) + "\n"


def _head(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {
        "license": facts.licence.id,
        "license_name": facts.licence.name or None,
        "license_link": facts.licence.link or None,
        "base_model": facts.base_model,
        "base_model_relation": "quantized" if facts.base_model else None,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["tritflow", "ternary", "1.58-bit", "quantized"],
    }
    return f"---\n{ModelCardData(**{k: v for k, v in data.items() if v is not None}).to_yaml()}\n---"


def _origin(facts: Facts) -> str:
    if facts.base_model is None:
        return "the small FLUX of the tritflow package"
    return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"


def _what(facts: Facts) -> str:
    t = facts.transformer
    trits = t.get("trits")
    shares = f" ({trits['-1']:.1%} are -1, {trits['0']:.1%} are 0, {trits['+1']:.1%} are +1)" if trits else ""
    return (
        f"{facts.base_model or 'The small FLUX of the tritflow package'} with {t['ternary_layers']} linear layers of "
        f"its transformer in {{-1, 0, +1}}: {t['ternary_weights']:,} weights{shares}, made by tritflow after the idea "
        "of [1.58-bit FLUX](https://arxiv.org/abs/2412.18653). Everything else is the base model's."
    )


def _sizes(facts: Facts) -> str:
    t = facts.transformer
    return "\n".join(
        [
            "| | |",
            "|---|---:|",
            f"| transformer on disk | {size(t['file_bytes'])} |",
            f"| the same in bf16 | {size(t['bf16_bytes'])} |",
            f"| smaller | {t['ratio_to_bf16']:.2f}x |",
            f"| bits a ternary weight, without scales | {t['bits_per_ternary_weight']:.3f} |",
            f"| bits a parameter, all of the transformer | {t['bits_per_parameter']:.3f} |",
            f"| all files here | {size(facts.files)} |",
        ]
    )


def _loading(facts: Facts) -> str:
    transformer, pipeline = facts.classes
    settings = "".join(f", {key}={value}" for key, value in facts.generation.items())
    if facts.complete:
        load = [
            f"from diffusers import {pipeline}",
            "",
            f'pipe = {pipeline}.from_pretrained("{facts.repo_id}", torch_dtype=torch.bfloat16).to("cuda")',
        ]
    else:
        load = [
            f"from diffusers import {pipeline}, {transformer}",
            "",
            f"transformer = {transformer}.from_pretrained(",
            f'    "{facts.repo_id}", subfolder="transformer", torch_dtype=torch.bfloat16',
            ")",
            f'pipe = {pipeline}.from_pretrained("{facts.base_model}", transformer=transformer, '
            'torch_dtype=torch.bfloat16).to("cuda")',
        ]
    lines = ["import torch, tritflow  # tritflow teaches diffusers the format", *load]
    lines.append(f'image = pipe("a red cube on a blue sphere"{settings}).images[0]')
    return "## Load it\n\nWith stock diffusers:\n\n```python\n" + "\n".join(lines) + "\n```"


def _scores(runs: Sequence[dict[str, Any]]) -> str:
    if not runs:
        return ""
    lines = [
        "| suite | mode | overall | difference | PSNR (dB) | scored by | pictures |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for run in runs:
        paired = ((run.get("paired") or {}).get("overall") or {}).get("difference")
        cells = [
            text(run["task"]["name"]),
            text(run["settings"]["extra"].get("mode")),
            interval(run["scores"]["overall"]),
            signed_interval(paired),
            interval((run.get("fidelity") or {}).get("psnr"), digits=2),
            text(run["task"]["scored_by"]),
            f"{run['prompts']['count']} x {run['prompts']['samples']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = "Difference and PSNR: to the base model's pictures of the same noise; 95 % intervals by prompt."
    if any(run["task"].get("substitutes") for run in runs):
        note += " Scores by substitutes are not the suite's official metric."
    return "## Scores\n\n" + "\n".join(lines) + f"\n\n{note}"


def _recipe(facts: Facts) -> str:
    recipe, prompts = facts.meta["recipe"], facts.meta.get("prompts")
    taught = "no calibration"
    if prompts:
        used = min(recipe["calibration"]["num_prompts"] or prompts["count"], prompts["count"])
        taught = f"calibrated on {used:,} prompts and no image"
    versions = ", ".join(f"{k} {v}" for k, v in (facts.meta.get("versions") or {}).items())
    lines = [
        f"- recipe `{recipe['name']}`: {recipe['summary']}; {taught}",
        f"- mode {facts.transformer['settings']['mode']}, packing {facts.transformer['settings']['packing']}",
        f"- digest of all tensors `{facts.meta['digest']}`; `tritflow inspect` verifies it",
    ]
    if facts.meta.get("skipped"):
        lines.append(f"- {facts.meta['skipped']} block linears stayed dense")
    if versions:
        lines.append(f"- made with {versions}")
    return "## How it was made\n\n" + "\n".join(lines)


def _licence(facts: Facts) -> str:
    link = f"[{facts.licence}]({facts.licence.link})" if facts.licence.link else str(facts.licence)
    words = f"This model is derived from {_origin(facts)} and is under the same licence: {link}."
    if facts.licence.name.startswith("flux-1-dev"):
        words += (
            " The base model is licensed by Black Forest Labs, Inc., who hold its copyright; it and its derivatives, "
            "this one included, are for non-commercial use."
        )
    return f"## Licence\n\n{words}"
