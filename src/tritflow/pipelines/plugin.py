"""The diffusers plug-in: stock `from_pretrained` and `save_pretrained` read and write ternary checkpoints.

Loading a ternary folder needs no argument; its config.json names `quant_method: tritflow`. Passing
`quantization_config=TritflowConfig(...)` with a dense checkpoint rounds it to ternary while it loads. The work is
done in quantizer.py; this file is the config class and the registration.
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from tritflow.config import FORMAT_VERSION, TernaryConfig
from tritflow.formats.checkpoint import parse_quantization_config

QUANT_METHOD = "tritflow"


class QuantizationMethod(StrEnum):
    """diffusers reads `quant_method.value`, so the name has to be an Enum member."""

    TRITFLOW = QUANT_METHOD


@dataclass
class TritflowConfig(QuantizationConfigMixin):
    """`TernaryConfig` in the form that diffusers wants; the fields mean the same.

    Pass it as `quantization_config` to `FluxTransformer2DModel.from_pretrained`, or inside
    `PipelineQuantizationConfig(quant_mapping={"transformer": TritflowConfig()})`, to quantize a dense
    checkpoint on the fly (round to nearest; `tritflow quantize` gives better models).

    Attributes:
        digest: hex SHA-256 sum of all tensors of the checkpoint; written by the writer, checked on loading.

    Raises:
        ConfigError: a field has a value that is not allowed, or the version is newer than this package.
    """

    quant_method: Any = QuantizationMethod.TRITFLOW
    version: int = FORMAT_VERSION
    mode: str = "w2a16"
    activation_dtype: str = "int8"
    backend: str = "auto"
    packing: str = "2bit"
    column_scale: bool = False
    targets: tuple[str, ...] = TernaryConfig.targets
    skip: tuple[str, ...] = ()
    digest: str | None = None

    def __post_init__(self) -> None:
        self.quant_method = QuantizationMethod.TRITFLOW
        self.targets, self.skip = tuple(self.targets), tuple(self.skip)
        self._model: weakref.ref[Any] | None = None
        _ = self.ternary  # refuses bad values here, not in the middle of loading

    @property
    def ternary(self) -> TernaryConfig:
        """The same settings as the house's own class."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(TernaryConfig)}
        return TernaryConfig.from_dict(fields)

    @classmethod
    def from_ternary(cls, config: TernaryConfig, digest: str | None = None) -> TritflowConfig:
        return cls(**config.to_dict(), digest=digest)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From config.json's `quantization_config`. Unknown keys raise `ConfigError` naming the key."""
        if config_dict.get("digest") is None:
            data = {k: v for k, v in config_dict.items() if k not in ("quant_method", "digest")}
            config = cls.from_ternary(TernaryConfig.from_dict(data))
        else:
            config = cls.from_ternary(*parse_quantization_config(dict(config_dict)))
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def model(self) -> Any:
        """The model whose tensors `to_dict` describes, or None. Held weakly: the model holds this config."""
        return self._model() if self._model is not None else None

    def attach(self, model: Any) -> None:
        """Set `model`. Needed because diffusers writes config.json before it asks for the tensors."""
        self._model = weakref.ref(model)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds, with the digest of `model`'s tensors as they would be saved now."""
        model = self.model
        if model is not None and not any(p.is_meta for p in model.parameters()):
            from tritflow.formats.integrity import Digest
            from tritflow.pipelines.quantizer import storage_tensors

            digest = Digest()
            for name, tensor in storage_tensors(model, model.state_dict(), self.packing).items():
                digest.add(name, tensor)
            self.digest = digest.hexdigest()
        return self.to_diff_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, with the digest that was last known."""
        return {"quant_method": QUANT_METHOD, **self.ternary.to_dict(), "digest": self.digest}

    def __iter__(self) -> Any:
        yield from self.to_diff_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> TritflowConfig:
        twin = type(self).from_dict(self.to_diff_dict())
        memo[id(self)] = twin
        # A deep-copied model must be described by its own tensors, not by those of the original.
        if self.model is not None and id(self.model) in memo:
            twin.attach(memo[id(self.model)])
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}


def _quantizer(config: TritflowConfig, **kwargs: Any) -> Any:
    """Called by diffusers as if it were the class: importing diffusers must not import kernels and modules."""
    from tritflow.pipelines.quantizer import TritflowQuantizer

    return TritflowQuantizer(config, **kwargs)


def register() -> None:
    """Insert the format into diffusers' two registries; idempotent."""
    from diffusers.quantizers import auto

    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    quantizers[QUANT_METHOD] = _quantizer
    configs: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    configs[QUANT_METHOD] = TritflowConfig


register()
