"""What a step of FLUX.1-dev's transformer should take on GPUs that nobody measured here: predictions, marked as such.

A step is products, attention, and passes over activations. Their operations and bytes follow from the config; a GPU's
datasheet gives rates; how much of a rate is reached is taken from one measured GPU (`Reached`) and assumed alike on
the others. That assumption is what the measured GPU cannot check.

`EXPECTED` was written down before any optimized step had run on a GPU. `reached_by` reads the same shares out of a
measured run, and a run of predictions tells both: what was expected of that GPU, and what it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tritflow import results
from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.models import FLUX1
from tritflow.models.flux1 import is_modulation

_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2")


@dataclass(frozen=True)
class Gpu:
    """A GPU's datasheet: dense rates with 32-bit accumulation, no sparsity.

    Attributes:
        bf16: TFLOP/s.
        int8: TOP/s.
        bandwidth: GB/s.
        memory: GB.
    """

    bf16: float
    int8: float
    bandwidth: float
    memory: float


GPUS: dict[str, Gpu] = {
    "A100 80GB": Gpu(312, 624, 2039, 80),
    "L20": Gpu(119.5, 239, 864, 48),
    "A10": Gpu(125, 250, 600, 24),
    "RTX 3060": Gpu(25.5, 102, 360, 12),
    "RTX 4070": Gpu(58.3, 233, 504, 12),
    "RTX 4090": Gpu(165.2, 660.6, 1008, 24),
    "H100 SXM": Gpu(989, 1979, 3352, 80),
    "H200": Gpu(989, 1979, 4800, 141),
    "B200": Gpu(2250, 4500, 8000, 180),
}
"""From NVIDIA's datasheets and architecture papers."""


@dataclass(frozen=True)
class Reached:
    """Shares of a datasheet's rates that kernels reach.

    Attributes:
        bf16: dense products.
        int8: ternary products with int8 activations.
        attention: of the bf16 rate.
        bandwidth: of passes over activations.
    """

    bf16: float
    int8: float
    attention: float
    bandwidth: float


EXPECTED = Reached(bf16=0.72, int8=0.66, attention=0.62, bandwidth=0.75)
"""Of one H200: compiled bf16's products and attention as traced there; the others are what this project aimed at."""

DENSE = "bf16 compiled"
"""The contender of the transformer bench whose products say how much of the bf16 rate is reached."""
_ATTENTION = ("sdpa", "flash", "fmha", "attention")
_PRODUCTS = ("nvjet", "gemm", "cutlass", "w2a8_kernel", "w2a16_kernel", "expand")


@dataclass(frozen=True)
class Work:
    """One step's work.

    Attributes:
        products: TFLOP in linear layers, modulation excepted.
        attention: TFLOP.
        fused: GB that the optimized forward reads and writes between products.
        unfused: the same of the stock forward, its elementwise chains fused by a compiler.
        modulation: GB of bf16 modulation weights, which the stock forward reads every step.
        latents: image and text tokens.
    """

    products: float
    attention: float
    fused: float
    unfused: float
    modulation: float
    latents: int


def work(config: Mapping[str, Any] = FLUX1_DEV, size: int = 1024, batch: int = 1, text_tokens: int = 512) -> Work:
    """Count a step of `batch` pictures of `size` x `size` pixels.

    Bytes between products, in elements a token and hidden feature D of 2 bytes (1 when quantized):
    a single block reads x for the norm (1) and writes it quantized (1/2), reads and writes q and k (4), reads
    attention and the MLP's 4 D and writes both quantized (5 + 5/2), and adds the residual (3). A double block does
    the norm twice (3), q and k (4), copies v (2), quantizes attention (3/2) and the MLP (6), and has two residuals (6).
    Unfused and compiled, nothing is quantized but the concatenations of text with image and of attention with
    the MLP are copies of their own: 24 a single block, 32 a double block.
    """
    image = (size // 16) ** 2 * batch
    text = text_tokens * batch
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    products = modulation = 0.0
    for name, (rows, columns) in FLUX1.block_linears(config).items():
        if is_modulation(name):
            modulation += 2.0 * rows * columns
            continue
        tokens = image + text
        if not name.startswith("single_"):
            tokens = text if name.endswith(_TEXT) else image
        products += 2.0 * tokens * rows * columns
    dense = sum(
        2.0 * shape[0] * shape[1] * (text if name.startswith("context_embedder") else image)
        for name, shape in flux1_shapes(config).items()
        if name.startswith(("x_embedder", "context_embedder", "proj_out")) and len(shape) == 2
    )
    double, single = config["num_layers"], config["num_single_layers"]
    both = (image + text) // batch
    attention = 4.0 * both * both * hidden * batch * (double + single)
    unit = 2.0 * (image + text) * hidden
    return Work(
        products=(products + dense) / 1e12,
        attention=attention / 1e12,
        fused=unit * (single * 16 + double * 22.5) / 1e9,
        unfused=unit * (single * 24 + double * 32) / 1e9,
        modulation=modulation / 1e9,
        latents=image + text,
    )


def parts(contender: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a measured step by what its kernels are: `products` (with expanding weights for them),
    `attention`, and `between`, which is all the rest.

    Args:
        contender: of a run of the transformer bench, traced.

    Raises:
        ValueError: it was not traced.
    """
    if not contender.get("kernels") or "kernel_milliseconds" not in contender:
        raise ValueError("this contender has no list of kernels; measure it where tracing works")
    found = {"products": 0.0, "attention": 0.0}
    for kernel in contender["kernels"]:
        name = kernel["name"].lower()
        if any(word in name for word in _ATTENTION):
            found["attention"] += kernel["milliseconds"]
        elif any(word in name for word in _PRODUCTS):
            found["products"] += kernel["milliseconds"]
    found["between"] = contender["kernel_milliseconds"] - sum(found.values())
    return found


def fastest(run: Mapping[str, Any]) -> str:
    """The optimized W2A8 contender of a transformer run with the smallest median that was traced.

    Raises:
        ValueError: there is none.
    """
    good = {
        name: c["milliseconds"]["p50"]
        for name, c in run["contenders"].items()
        if name.startswith("W2A8") and "optimized" in name and c.get("kernels") and "milliseconds" in c
    }
    if not good:
        raise ValueError("the run has no optimized W2A8 contender with a list of kernels")
    return min(good, key=lambda name: good[name])


def reached_by(run: Mapping[str, Any], gpu: Gpu) -> Reached:
    """The shares of a GPU's datasheet that a run of the transformer bench reached.

    Args:
        run: with `DENSE` and an optimized W2A8 contender, both traced.
        gpu: which it was.

    Raises:
        ValueError: a contender is missing or was not traced.
    """
    if DENSE not in run["contenders"]:
        raise ValueError(f"the run has no contender '{DENSE}'")
    step = work(size=run["settings"]["size"], batch=run["settings"]["batch"])
    dense, ternary = parts(run["contenders"][DENSE]), parts(run["contenders"][fastest(run)])
    return Reached(
        bf16=1e3 * step.products / (gpu.bf16 * dense["products"]),
        int8=1e3 * step.products / (gpu.int8 * ternary["products"]),
        attention=1e3 * step.attention / (gpu.bf16 * ternary["attention"]),
        bandwidth=1e3 * step.fused / (gpu.bandwidth * ternary["between"]),
    )


def check(run: Mapping[str, Any], name: str) -> dict[str, dict[str, float]]:
    """What `EXPECTED` says of a measured GPU against what it did, in milliseconds: part -> expected, measured.

    Args:
        run: of the transformer bench.
        name: of `GPUS`.
    """
    settings, best = run["settings"], fastest(run)
    step = work(size=settings["size"], batch=settings["batch"])
    expected = predict(GPUS[name], step, EXPECTED)
    measured = parts(run["contenders"][best])
    measured |= {"w2a8": run["contenders"][best]["milliseconds"]["p50"]}
    measured |= {"bf16": run["contenders"][DENSE]["milliseconds"]["p50"]}
    measured["speed"] = measured["bf16"] / measured["w2a8"]
    return {
        part: {"expected": round(expected[part], 3), "measured": round(measured[part], 3)}
        for part in ("bf16", "w2a8", "speed", "products", "attention", "between")
    }


def predict(gpu: Gpu, step: Work, reached: Reached = EXPECTED) -> dict[str, float]:
    """Milliseconds of a step: compiled dense bf16, and optimized W2A8 with int8 activations; parts and ratio."""
    attention = step.attention / (gpu.bf16 * reached.attention)
    bandwidth = gpu.bandwidth * reached.bandwidth / 1e3
    dense = step.products / (gpu.bf16 * reached.bf16)
    ternary = step.products / (gpu.int8 * reached.int8)
    bf16 = dense + attention + (step.unfused + step.modulation) / 1e3 / bandwidth
    w2a8 = ternary + attention + step.fused / 1e3 / bandwidth
    return {
        "bf16": bf16 * 1e3,
        "w2a8": w2a8 * 1e3,
        "speed": bf16 / w2a8,
        "products": ternary * 1e3,
        "attention": attention * 1e3,
        "between": step.fused / bandwidth,
    }


def predictions(size: int = 1024, batch: int = 1, reached: Reached = EXPECTED) -> dict[str, dict[str, Any]]:
    """`predict` for every GPU of `GPUS`, with whether bf16 (24 GB of weights) fits its memory at all."""
    step = work(size=size, batch=batch)
    return {
        name: {
            **{key: round(value, 3) for key, value in predict(gpu, step, reached).items()},
            "bf16 fits": gpu.memory > 25,
        }
        for name, gpu in GPUS.items()
    }


def known(device: str) -> str | None:
    """The name in `GPUS` of a device as PyTorch calls it ("NVIDIA H100 80GB HBM3"), or None."""
    words = device.split()
    return next((name for name in GPUS if all(word in words for word in name.removesuffix(" SXM").split())), None)


def run(size: int = 1024, batch: int = 1, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The predictions as a run for `tritflow.results`, topic `roofline`; its device says that nothing was measured.

    Args:
        size: of the pictures, in pixels.
        batch: pictures at once.
        measured: a run of the transformer bench on a GPU of `GPUS`, whose shares are then assumed of all; without it
            those of `EXPECTED`.

    Raises:
        ValueError: `measured` is of an unknown GPU, or lacks a contender.
    """
    reached, source, checked = EXPECTED, None, None
    if measured is not None:
        name = known(measured["device"])
        if name is None:
            raise ValueError(f"no datasheet of {measured['device']} is known; one of {', '.join(GPUS)} is")
        reached = reached_by(measured, GPUS[name])
        checked = {"gpu": name, "contender": fastest(measured), "parts": check(measured, name)}
        source = measured.get("id")
    return {
        **results.provenance("cpu"),
        "device": "datasheets",
        "measured": False,
        "settings": {"size": size, "batch": batch},
        "reached": {key: round(value, 4) for key, value in asdict(reached).items()},
        "expected": asdict(EXPECTED),
        "check": checked,
        "source": source,
        "work": {key: round(value, 4) for key, value in asdict(work(size=size, batch=batch)).items()},
        "gpus": predictions(size, batch, reached),
    }


def table(run: Mapping[str, Any]) -> str:
    """The predictions in plain text."""
    lines = [
        f"PREDICTED, {run['settings']['size']}x{run['settings']['size']}, batch {run['settings']['batch']}: ms a step",
        f"{'':10} {'bf16':>9} {'W2A8':>9} {'speed':>7}   products, attention, between",
    ]
    for name, p in run["gpus"].items():
        lines.append(
            f"{name:10} {p['bf16']:9.1f} {p['w2a8']:9.1f} {p['speed']:6.2f}x   "
            f"{p['products']:.1f}, {p['attention']:.1f}, {p['between']:.1f}"
            f"{'' if p['bf16 fits'] else '   (bf16 does not fit)'}"
        )
    if run.get("check"):
        checked = run["check"]
        lines.append(f"expected of {checked['gpu']} before it was measured, and measured ({checked['contender']}):")
        for part, values in checked["parts"].items():
            lines.append(f"  {part:10} {values['expected']:8.2f} {values['measured']:8.2f}")
    return "\n".join(lines)
