"""diffusers' quantizer hooks: swap linears for `TernaryLinear` and fill them from a ternary or a dense checkpoint.

Every tensor of a ternary checkpoint is hashed as it lies on disk, before diffusers casts anything, and compared
with its checksum and with the digest in config.json: a damaged file never becomes a silently wrong model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import CustomDtype
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

import tritflow.models  # noqa: F401 - families register their tensors' shapes
from tritflow.config import Packing, TernaryConfig
from tritflow.formats.checkpoint import CheckpointError, Digest, TernaryFolder, file_metadata, tensor_sha256
from tritflow.formats.integrity import CHECKSUM_DIGITS, FileClaims
from tritflow.formats.packing import check_packed, repack
from tritflow.formats.safetensors_file import SafetensorsFile
from tritflow.modules.swap import swap_linears_
from tritflow.modules.ternary_linear import TernaryLinear
from tritflow.pipelines.lora import prepare_for_lora_, release_from_lora_
from tritflow.quantization.ternarize import mse_optimal, mse_optimal_columns

_HASHERS = 8
_MEND = "run `tritflow inspect` on the folder, then fetch or quantize it again"


@dataclass(frozen=True)
class _Straight:
    """Where ternary weights go that diffusers itself would put into host memory."""

    device: torch.device
    on_host: Callable[[str], bool]


_STRAIGHT: ContextVar[_Straight | None] = ContextVar("tritflow_straight", default=None)


@contextmanager
def straight_to(device: torch.device, on_host: Callable[[str], bool]) -> Iterator[None]:
    """While this block runs, `from_pretrained` without a device map puts the weights of ternary layers on `device`.

    Everything else, and the layers whose name `on_host` takes, stays in host memory; weights of the latter in
    pinned memory if the device is a CUDA one. A device map could not say that: it would come with hooks.
    """
    token = _STRAIGHT.set(_Straight(device, on_host))
    try:
        yield
    finally:
        _STRAIGHT.reset(token)


def ternary_linears(model: nn.Module) -> dict[str, TernaryLinear]:
    """Every `TernaryLinear` of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}


def storage_tensors(model: nn.Module, state_dict: Mapping[str, Tensor], packing: Packing | str) -> dict[str, Tensor]:
    """The tensors of a model's `state_dict` as they lie on disk: weights in `packing`, all else untouched."""
    tensors = dict(state_dict)
    for name, linear in ternary_linears(model).items():
        packed = linear.packed.detach()
        if packing == "base3":
            packed = repack(packed.cpu(), linear.in_features, "2bit", "base3")
        tensors[f"{name}.weight"] = packed
    return tensors


def _check(name: str, packed: Tensor, in_features: int, packing: Packing) -> None:
    try:
        check_packed(packed, in_features, packing)
    except CheckpointError as error:
        raise CheckpointError(f"'{name}': {error}") from error


class CheckpointAudit:
    """Hashes every tensor of a checkpoint that diffusers is loading, shard by shard.

    Args:
        files: the safetensors files about to be loaded.
        digest: what config.json promises.

    Raises:
        CheckpointError: a file is no safetensors file, or its header or the config.json beside it is damaged.
    """

    def __init__(self, files: list[str], digest: str) -> None:
        self._digest, self._sum = digest, Digest()
        self._checksums: dict[str, str] = {}
        self.where = str(Path(files[0]).parent)
        for path in files:
            file = SafetensorsFile(path)
            claims = FileClaims(file).checksums
            # `save_pretrained` writes all checksums into every shard; only a file's own tensors are its claim.
            self._checksums.update({name: claims[name] for name in file.entries if name in claims})
        # A config from elsewhere leaves nothing to hold the headers against; tensors are checked all the same.
        if (Path(self.where) / "config.json").is_file():
            TernaryFolder(self.where)

    def add(self, state_dict: Mapping[str, Tensor], then: Callable[[str, Tensor], Any] | None = None) -> dict[str, Any]:
        """Hash one shard's tensors as they came from the file.

        Args:
            state_dict: the shard.
            then: called with every tensor by the thread that has just read it.

        Returns:
            What `then` returned, by name.

        Raises:
            CheckpointError: names a damaged tensor; or what `then` raised, if all are sound.
        """

        def work(item: tuple[str, Tensor]) -> tuple[str, Any, Exception | None]:
            sha256 = self._sum.add(*item)
            try:
                return sha256, then(*item) if then is not None else None, None
            except Exception as error:  # told after every checksum has been compared
                return sha256, None, error

        # Hashing holds no lock, and it is also what reads the mapped files: threads do both at once.
        with ThreadPoolExecutor(min(_HASHERS, os.cpu_count() or 1)) as pool:
            done = dict(zip(state_dict, pool.map(work, state_dict.items()), strict=True))
        for name, (sha256, _, _) in done.items():
            if self._checksums.get(name, sha256)[:CHECKSUM_DIGITS] != sha256[:CHECKSUM_DIGITS]:
                raise CheckpointError(
                    f"{self.where}: tensor '{name}' does not match its checksum: the file is damaged; {_MEND}"
                )
        for _, _, error in done.values():
            if error is not None:
                raise error
        return {name: result for name, (_, result, _) in done.items()}

    def finish(self) -> None:
        """Compare the sum of all tensors with the digest. Raises `CheckpointError` when they differ."""
        if self._sum.hexdigest() != self._digest:
            raise CheckpointError(
                f"{self.where}: the tensors do not match the digest in config.json: a file is damaged, missing or "
                f"belongs to another model; {_MEND}"
            )


class TritflowQuantizer(DiffusersQuantizer):
    """See the module's docstring. diffusers calls the methods; `quantization_config` is a `TritflowConfig`."""

    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # The user's object may serve several models, and each has a digest of its own.
        own = type(quantization_config).from_dict(quantization_config.to_diff_dict())
        super().__init__(own, **kwargs)
        self.ternary: TernaryConfig = own.ternary
        self._audit: CheckpointAudit | None = None
        self._loaded: set[str] = set()
        self._names: set[str] = set()
        self._straight = _STRAIGHT.get()
        self._device_map: Any = None
        self._features: dict[str, int] = {}
        self._copies: dict[str, Any] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot be honoured: ternary weights are small, so there is no offloading to the disk."""
        self._device_map = device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "ternary weights cannot be offloaded to the disk (device_map names 'disk'); use device_map=None "
                "with enable_model_cpu_offload() instead"
            )

    @property
    def supports_parallel_loading(self) -> bool:
        # On-the-fly quantization replaces modules while loading, which threads would race about.
        return bool(self.pre_quantized)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """Not to change anything: the one hook that learns the files' names."""
        self._loaded = set(loaded_keys)
        if self.pre_quantized:
            if self.quantization_config.digest is None:
                raise CheckpointError(
                    f"{Path(checkpoint_files[0]).parent}/config.json has no digest, so its tensors cannot be "
                    f"verified: the file is damaged; {_MEND}"
                )
            self._audit = CheckpointAudit([str(f) for f in checkpoint_files], self.quantization_config.digest)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Not to change anything: the one hook that sees every tensor of a shard as it lies on disk."""
        if self._audit is not None:
            self._copies.update(self._audit.add(state_dict, self._copy))
        return state_dict

    def _destination(self, name: str, given: Any = None) -> torch.device:
        """Where a ternary layer's weight goes, `name` being the tensor's and `given` what diffusers says, if it has."""
        layer = name.rpartition(".")[0]
        if self._straight is not None and self._device_map is None:
            return torch.device("cpu") if self._straight.on_host(layer) else self._straight.device
        if given is None:
            places = self._device_map if isinstance(self._device_map, dict) else {"": "cpu"}
            while layer and layer not in places:
                layer = layer.rpartition(".")[0]
            given = places.get(layer, "cpu")
        return torch.device(given)

    def _copy(self, name: str, raw: Tensor) -> Tensor | None:
        """A weight that stays in host memory, out of the mapped file and checked; None for every other tensor.

        By the threads that hash: the bytes are in their caches then, and NumPy's copies need no team of threads each.
        """
        features = self._features.get(name)
        if features is None or self.ternary.packing != "2bit" or self._destination(name).type != "cpu":
            return None
        _check(name, raw, features, "2bit")
        copy = torch.empty(raw.shape, dtype=torch.uint8, pin_memory=self._pinned(name))
        np.copyto(copy.numpy(), raw.numpy())
        return copy

    def _pinned(self, name: str) -> bool:
        straight = self._straight
        if straight is None or self._device_map is not None or straight.device.type != "cuda":
            return False
        return straight.on_host(name.rpartition(".")[0])

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and self.ternary.matches(n)]
        if not linears:
            raise ValueError(
                f"{type(model).__name__} has no linear layer that matches targets {list(self.ternary.targets)} "
                f"and none of skip {list(self.ternary.skip)}"
            )
        if self.pre_quantized:
            chosen = set(linears)
            swap_linears_(model, lambda name, _: name in chosen, lambda _, linear: self._empty(linear))
            self._check_names(set(model.state_dict()))
            parts = ("weight", "weight_scale", "input_scale")
            self._names = {f"{n}.{part}" for n in linears for part in parts} & self._loaded
            self._features = {f"{n}.weight": model.get_submodule(n).in_features for n in linears}
            if self._straight is not None and self._straight.device.type == "cuda":
                torch.cuda.init()  # before threads ask for pinned memory
        else:
            self._names = {f"{name}.weight" for name in linears}
        model.register_to_config(quantization_config=self.quantization_config)

    def _empty(self, linear: nn.Linear) -> TernaryLinear:
        """A `TernaryLinear` on the meta device with the same shape."""
        c = self.ternary
        return TernaryLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            column_scale=c.column_scale,
            mode=c.mode,
            activation_dtype=c.activation_dtype,
            backend=c.backend,
            device="meta",
        )

    def _check_names(self, expected: set[str]) -> None:
        where = self._audit.where if self._audit is not None else "the checkpoint"
        for name in sorted(expected - self._loaded):
            raise CheckpointError(f"{where}: tensor '{name}' is missing; {_MEND}")
        for name in sorted(self._loaded - expected):
            raise CheckpointError(f"{where}: tensor '{name}' belongs to no layer of this model; {_MEND}")

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether `create_quantized_param` has to handle this tensor."""
        return param_name in self._names

    def create_quantized_param(  # type: ignore[override]
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a tensor of a ternary linear in place, from the raw `state_dict`: `param_value` may have been cast."""
        name, _, leaf = param_name.rpartition(".")
        raw: Tensor = state_dict[param_name]
        if not self.pre_quantized:
            self._quantize(model, name, raw.to(target_device))
            return
        linear = model.get_submodule(name)
        home = self._destination(param_name, target_device)
        if leaf != "weight":
            # Not the mapped file itself: a view of it would keep all of its pages.
            linear._buffers[leaf] = raw.clone() if home.type == "cpu" else raw.to(home)
            return
        packed = self._copies.pop(param_name, None)
        if packed is None:
            if self._straight is not None and self._pinned(param_name):
                home = self._straight.device
            packed = raw.to(home)  # first: a GPU checks and repacks many times faster than a CPU
            _check(param_name, packed, linear.in_features, self.ternary.packing)
            if self.ternary.packing != "2bit":
                packed = repack(packed, linear.in_features, self.ternary.packing, "2bit")
            elif packed is raw:
                packed = raw.clone()
            if self._pinned(param_name):
                packed = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True).copy_(packed)
        linear.set_packed_(packed)

    def _quantize(self, model: Any, name: str, weight: Tensor) -> None:
        """Round one dense linear to the nearest ternary one. Its bias is loaded before or after, by diffusers."""
        linear = model.get_submodule(name)
        columns = None
        if self.ternary.column_scale:
            trits, scale, columns = mse_optimal_columns(weight)
        else:
            trits, scale = mse_optimal(weight)
        c = self.ternary
        ternary = TernaryLinear.from_linear(
            linear, trits, scale, columns, mode=c.mode, activation_dtype=c.activation_dtype, backend=c.backend
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ternary)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._audit is not None:
            self._audit.finish()
            self._audit = None
        for name, tensor in model.state_dict().items():
            if tensor.is_meta:
                raise CheckpointError(f"tensor '{name}' is missing from the checkpoint; {_MEND}")
        self._loaded, self._names, self._features = set(), set(), {}
        self.quantization_config.attach(model)
        prepare_for_lora_(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save_pretrained` writes: tensors in the config's packing, and the checksums of the format."""
        model = self.quantization_config.model
        if not safe_serialization:
            raise CheckpointError("ternary models are saved as safetensors only; leave safe_serialization=True")
        if model is None:
            raise CheckpointError("this model was unpickled and cannot be saved; load it with from_pretrained")
        tensors = storage_tensors(model, state_dict, self.ternary.packing)
        sums = {name: tensor_sha256(name, tensor) for name, tensor in tensors.items()}
        linears = {name: linear.in_features for name, linear in ternary_linears(model).items()}
        config = {**model.config, "_class_name": type(model).__name__}
        return tensors, file_metadata(sums, linears, config)

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype) -> dict[str, Any]:
        """For automatic device maps: a packed weight takes two bits an element, whatever its dtype says."""
        special: dict[str, Any] = super().get_special_dtypes_update(model, torch_dtype)
        return special | {f"{name}.weight": CustomDtype.INT2 for name in ternary_linears(model)}

    def get_cuda_warm_up_factor(self) -> int:
        """diffusers reserves `elements / factor` of the dtype (2 bytes): two bits an element make 8."""
        return 8

    def _dequantize(self, model: Any) -> Any:
        for name, ternary in ternary_linears(model).items():
            dense = nn.Linear(ternary.in_features, ternary.out_features, ternary.bias is not None, device="meta")
            dense.weight = nn.Parameter(ternary.dequantize(model.dtype), requires_grad=False)
            dense.bias = ternary.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, dense)
        release_from_lora_(model)
        config = {k: v for k, v in model.config.items() if k != "quantization_config"}
        model._internal_dict = type(model._internal_dict)(config)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
