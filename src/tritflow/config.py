"""Frozen, versioned settings. They travel inside checkpoints and results, so a field is never renamed silently.

Each class round-trips through plain JSON with `to_dict` / `from_dict`; unknown keys and newer versions are
refused by name instead of being dropped, because a setting that is ignored is a wrong model.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args, get_origin

FORMAT_VERSION = 1

Mode = Literal["w2a16", "w2a8"]
Backend = Literal["auto", "reference", "cpu", "triton", "scratch", "hopper"]
Packing = Literal["2bit", "base3"]
ActivationDtype = Literal["int8", "float8_e4m3fn"]
Ternarizer = Literal["absmean", "mse"]


ActivationStore = Literal["auto", "ram", "disk"]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


class ConfigError(ValueError):
    """A setting is unknown, out of range or from a newer version. The message names it and what is allowed."""


class MemorySizeError(ConfigError):
    """A text is no amount of memory."""


def parse_bytes(text: str) -> int:
    """Bytes of "6GiB", "6 GB", "800MiB", "1.5G" (10^9) or a plain number.

    Raises:
        MemorySizeError: not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]I?)?B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise MemorySizeError(f"'{text}' is no amount of memory; write for example 6GiB, 800MiB or 6GB")
    return size


def bytes_text(size: int) -> str:
    """As people say it: "12.3 GB", or "12.3 MB" below 1 GB (10^9)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def nearest(word: str, choices: list[str]) -> str:
    """`; did you mean 'x'?` for a misspelt word, or an empty string when nothing is close."""
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


# Of fields with these annotations: which types their values may have, and how a message calls them.
_PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}


class _Config:
    """JSON round trip and validation shared by every config class (a mixin for frozen dataclasses)."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            types, what = _PLAIN.get(str(entry.type), ((object,), ""))
            value = getattr(self, entry.name)
            if not isinstance(value, types) or (isinstance(value, bool) and what in ("a whole number", "a number")):
                raise ConfigError(f"{type(self).__name__}.{entry.name}: {what} is expected, not {value!r}")
        hints = _literal_fields(type(self))
        for name, allowed in hints.items():
            value = getattr(self, name)
            if value not in allowed:
                options = [str(a) for a in allowed]
                raise ConfigError(
                    f"{type(self).__name__}.{name}: '{value}' is not one of {', '.join(options)}"
                    f"{nearest(str(value), options)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; tuples become lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `ConfigError` on unknown keys and newer versions."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise ConfigError(f"{cls.__name__} has no setting '{unknown[0]}'{nearest(unknown[0], list(fields))}")
        version = data.get("version", FORMAT_VERSION)
        if "version" in fields and (not isinstance(version, int) or version > FORMAT_VERSION or version < 1):
            raise ConfigError(
                f"{cls.__name__}: version {version!r} is not supported by this tritflow, which reads 1 to "
                f"{FORMAT_VERSION}; upgrade tritflow"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON: the name of this config in meta.json."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _literal_fields(cls: type) -> dict[str, tuple[Any, ...]]:
    import typing

    hints = typing.get_type_hints(cls)
    return {name: get_args(h) for name, h in hints.items() if get_origin(h) is Literal}


@dataclass(frozen=True)
class TernaryConfig(_Config):
    """How a checkpoint's linears are stored and run. Written into the checkpoint's config.json.

    A linear is ternary when its module name matches one of `targets` and none of `skip`
    (`fnmatch` patterns over names such as `transformer_blocks.0.attn.to_q`).

    Attributes:
        mode: `w2a16` computes in the activations' dtype, `w2a8` quantizes activations to 8 bits per token.
        activation_dtype: the 8-bit type of `w2a8`.
        backend: which kernels run; `auto` takes the fastest that this device has.
        packing: how `weight` lies on disk: two bits a trit, or five trits a byte (expanded on loading).
        column_scale: whether an `input_scale` of length `in_features` is stored beside the row scale.
        targets: which modules are ternary.
        skip: exceptions from `targets`, kept dense.
    """

    version: int = FORMAT_VERSION
    mode: Mode = "w2a16"
    activation_dtype: ActivationDtype = "int8"
    backend: Backend = "auto"
    packing: Packing = "2bit"
    column_scale: bool = False
    targets: tuple[str, ...] = ("transformer_blocks.*", "single_transformer_blocks.*")
    skip: tuple[str, ...] = ()

    def matches(self, name: str) -> bool:
        """Whether the linear called `name` is ternary under this config."""
        from fnmatch import fnmatchcase

        return any(fnmatchcase(name, p) for p in self.targets) and not any(fnmatchcase(name, p) for p in self.skip)


@dataclass(frozen=True)
class CalibrationConfig(_Config):
    """Which trajectories of the teacher are recorded. No image is ever read: prompts and noise only.

    Attributes:
        num_prompts: how many trajectories, a prompt each (0: as many as the calibration set has). Where the set has
            fewer prompts, they come again, with other noise.
        num_inference_steps: sampler steps a trajectory.
        guidance_scales: drawn per trajectory, for guidance-embedded models.
        seed: of the noise and of the choice of prompts.
        batch_size: trajectories recorded at once.
        height: of the pictures in pixels (0: the model folder's own default).
        width: of the pictures in pixels (0: the model folder's own default).
        max_sequence_length: text tokens (0: the model folder's own default).
        timestep_jitter: shifts each trajectory's sigmas by up to this share of a step, so that all times are seen.
    """

    version: int = FORMAT_VERSION
    num_prompts: int = 0
    num_inference_steps: int = 28
    guidance_scales: tuple[float, ...] = (3.5,)
    seed: int = 0
    batch_size: int = 16
    height: int = 0
    width: int = 0
    max_sequence_length: int = 0
    timestep_jitter: float = 1.0


@dataclass(frozen=True)
class DistillationConfig(_Config):
    """Velocity distillation of a ternary student on the teacher's recorded trajectories.

    Attributes:
        steps: optimiser steps (0: no distillation).
        batch_size: (x_t, v) pairs a step, drawn over all trajectories.
        optimizer: of latent weights; `muon` (orthogonalised momentum) learns twice as fast as `adamw`.
        learning_rate: peak of the cosine schedule for latent weights, in trits a step (0: trits stand still and take a
            byte each; scales, biases and the dense rest learn around them).
        scale_learning_rate: peak for the log row scales and biases.
        column_learning_rate: peak for the log column scales; nothing holds them, so a long run wants little (0: they
            stay as calibration gave them).
        damp_columns: columns with a scale c above 1 take steps of 1 / c trits, so that no column of the weight moves
            further than one of scale 1 (muon alone).
        rest_learning_rate: peak for all that stays dense: embedders, norms, output layer (0: they stay as they are).
        freeze_share: of the steps, the last ones, in which trits stand still and only scales, biases and the dense
            rest are trained; the cosine of the latent weights ends before.
        warmup_steps: linear warm-up.
        weight_decay: of latent weights.
        grad_clip: global norm of what AdamW trains.
        activation_bits: 8 puts fake-quantized activations inside the loop, 16 leaves them alone.
        train_scales: whether row (and column) scales are tuned.
        train_biases: whether the linears' biases are tuned.
        checkpoint_every: steps between resumable checkpoints, each with a validation (0: only the last).
        detail_weight: how much more the highest frequency of the velocity's error weighs than the lowest, minus 1.
        early_weight: how much more its first timestep weighs than its last, minus 1 (falling by the eighth power).
        feature_weight: of the distance between the student's and the teacher's hidden states behind every block but the
            last, beside the velocity's error; needs online states (`features.distance`).
        retreats: how often a run that diverges goes back to its best checkpoint, each time with half the rate.
        retreat_above: it diverges where the validation error is so many times the best one, or not finite.
        seed: of the batch order.
        compile_blocks: `torch.compile` the blocks first (CUDA alone; it takes a minute, which long runs win back).
        lean: 4 bytes a latent weight instead of 12, for a model that barely fits its GPU (muon alone): bf16, rounded by
            chance; each matrix steps as soon as its gradient is there; blocks run again in the backward pass.
    """

    version: int = FORMAT_VERSION
    steps: int = 0
    batch_size: int = 64
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    scale_learning_rate: float = 1e-3
    column_learning_rate: float = 1e-3
    damp_columns: bool = False
    rest_learning_rate: float = 0.0
    freeze_share: float = 0.0
    warmup_steps: int = 20
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    activation_bits: int = 16
    train_scales: bool = True
    train_biases: bool = True
    checkpoint_every: int = 200
    detail_weight: float = 0.0
    early_weight: float = 0.0
    feature_weight: float = 0.0
    retreats: int = 2
    retreat_above: float = 4.0
    seed: int = 0
    compile_blocks: bool = False
    lean: bool = False


@dataclass(frozen=True)
class OnlineConfig(_Config):
    """States that are made while the student trains, the teacher giving the velocity at each: none is seen twice.

    Needs the teacher beside the student, and its prompts encoded, on one device.

    Attributes:
        pool: trajectories under way, in batches (0: train on recorded ones instead).
        num_inference_steps: sampler steps of each; jittered as calibration's, with its guidance values.
        student_share: of the trajectories that follow the student's velocity instead of the teacher's, so that it
            learns to come back from where its own errors lead.
        early_share: of the pool's places, whose trajectories end after `early_steps`, so that more states lie where
            layout is decided and errors grow most.
        early_steps: of those.
        mixed_share: of the trajectories whose text lies between two prompts, at a random place on the way from one's
            encoded states to the other's: what no caption says, but the teacher answers all the same.
    """

    version: int = FORMAT_VERSION
    pool: int = 0
    num_inference_steps: int = 28
    student_share: float = 0.0
    early_share: float = 0.0
    early_steps: int = 7
    mixed_share: float = 0.0


@dataclass(frozen=True)
class ReconstructionConfig(_Config):
    """Block reconstruction: trits and scales of a window of blocks learn the teacher's output of that window.

    Attributes:
        steps: optimiser steps a window (0: no reconstruction).
        window: blocks trained together.
        stride: blocks finished by each window; below `window`, windows overlap.
        samples: recorded (x_t, v) pairs whose activations are kept, teacher's and student's.
        batch_size: samples a step.
        optimizer: of latent weights, as in distillation.
        importance_samples: pairs from which channels and streams are weighed by the velocity's gradient (0: every
            stream counts alike, by what a window adds to it).
        importance_batch: of those, how many run at once; activations of all blocks are alive then.
        learning_rate: peak of the cosine schedule for latent weights, in trits a step.
        scale_learning_rate: peak for the log row scales, log column scales and biases.
        warmup_steps: linear warm-up.
        grad_clip: global norm.
        activation_bits: 8 puts fake-quantized activations inside the loop, 16 leaves them alone.
        train_scales: whether row (and column) scales are tuned.
        train_biases: whether the linears' biases are tuned.
        seed: of the sample order.
    """

    version: int = FORMAT_VERSION
    steps: int = 0
    window: int = 1
    stride: int = 1
    samples: int = 512
    batch_size: int = 16
    optimizer: Literal["adamw", "muon"] = "adamw"
    importance_samples: int = 64
    importance_batch: int = 4
    learning_rate: float = 0.01
    scale_learning_rate: float = 1e-3
    warmup_steps: int = 20
    grad_clip: float = 1.0
    activation_bits: int = 16
    train_scales: bool = True
    train_biases: bool = True
    seed: int = 0


@dataclass(frozen=True)
class StreamingConfig(_Config):
    """What stages that cannot have the whole model on the device may take, and where they keep what they need.

    Sizes are texts such as "32GiB" or "800MiB".

    Attributes:
        activation_budget: bytes that the streams of teacher and student may take together. Where a stage's samples
            would take more, it uses a spread of fewer and writes which (`calibration_records.jsonl`).
        activation_store: where streams lie: `ram`, `disk` (in the job's work folder), or `auto`: on the GPU where they
            take less than 40 % of what is free there, else in memory.
        block_cache: bytes of dense blocks that stay on the device between two uses ("0": none).
        latent_store: where a lean distillation keeps latent weights and momenta: on the `device`, or in `ram`, 4 bytes
            a weight, of which a block's are on the device while it runs. The result is the same.
    """

    version: int = FORMAT_VERSION
    activation_budget: str = "32GiB"
    activation_store: ActivationStore = "auto"
    block_cache: str = "1GiB"
    latent_store: Literal["device", "ram"] = "device"

    def __post_init__(self) -> None:
        for name in ("activation_budget", "block_cache"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is a text such as '32GiB', not {getattr(self, name)!r}")
        super().__post_init__()
        _ = self.budget_bytes, self.cache_bytes

    @property
    def budget_bytes(self) -> int:
        return parse_bytes(self.activation_budget)

    @property
    def cache_bytes(self) -> int:
        return 0 if self.block_cache.strip() == "0" else parse_bytes(self.block_cache)


@dataclass(frozen=True)
class Recipe:
    """A named experiment: everything `tritflow quantize` needs beside the source and the output.

    Attributes:
        name: as on the command line.
        summary: one line for `--help`.
        ternarizer: how trits and row scales start.
        compensation: whether GPTQ-style error compensation from calibration activations runs.
        compensation_samples: how many recorded (x_t, v) pairs its activations come from.
        smoothing: exponent, 0 to 1, of column scales from calibration activations (SmoothQuant), which take outlier
            channels out of 8-bit activations; None: column scales, if any, come from the weights.
        smoothing_outliers: only input channels at least so many times as large as their layer's median get a scale of
            their own, all others 1 (0: every channel gets one).
        smoothing_skip: patterns of linears whose column scales all stay 1.
        ternary: storage and targets.
        calibration: which trajectories (used by compensation, reconstruction and distillation).
        streaming: what may be kept while blocks are streamed.
        reconstruction: block reconstruction (steps = 0 switches it off).
        distillation: velocity distillation (steps = 0 switches it off).
        online: where distillation's states come from (pool = 0: from calibration's recorded ones).
    """

    name: str
    summary: str = ""
    ternarizer: Ternarizer = "mse"
    compensation: bool = False
    compensation_samples: int = 256
    smoothing: float | None = None
    smoothing_outliers: float = 0.0
    smoothing_skip: tuple[str, ...] = ()
    ternary: TernaryConfig = field(default_factory=TernaryConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
