"""FLUX.1's forward over fused operations: the same function as diffusers' blocks in a third of their passes.

Blocks are those of `flux1_blocks`; text and image stay one tensor through all single blocks. Modulation comes from
`models.modulation`.

LoRA adapters are part of it (`models.low_rank`). Whatever the fused forward does not know (other kinds of adapter,
ControlNet residuals, IP-Adapter, gradients, ...) runs on diffusers' own forward; `why_not` and the log say what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.kernels import adaln
from tritflow.models import low_rank
from tritflow.models.cuda_graph import GraphedCall
from tritflow.models.flux1_blocks import Attend, DoubleBlock, Rope, SingleBlock, attend, named_attention
from tritflow.models.fused import separate_
from tritflow.models.low_rank import base_of, is_adapted
from tritflow.models.modulation import Modulation
from tritflow.modules import TernaryLinear

log = logging.getLogger("tritflow")

_PROCESSOR = "FluxAttnProcessor"
_BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def why_not(transformer: Any) -> str | None:
    """Why the fused forward cannot stand for this transformer's own, in one line; None if it can."""
    if type(transformer).__name__ != "FluxTransformer2DModel":
        return f"it is a {type(transformer).__name__}, not a FluxTransformer2DModel"
    if transformer.training:
        return "it is in training mode; call transformer.eval()"
    if getattr(transformer, "gradient_checkpointing", False):
        return "gradient checkpointing is on"
    for name, module in transformer.named_modules():
        if is_adapted(module):
            reason = low_rank.why_not(module)
            if reason is not None:
                return f"{reason} at {name}"
        if not name.startswith(_BLOCKS):
            continue
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__name__ != _PROCESSOR:
            return f"{name} runs {type(processor).__name__} instead of {_PROCESSOR}"
        if processor is not None and (processor._attention_backend or processor._parallel_config) is not None:
            return f"{name} has an attention backend of its own"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"{name} carries hooks (offloading, or someone watching)"
    if not any(isinstance(m, TernaryLinear) for m in transformer.modules()):
        return "it has no ternary layer; make one with `tritflow quantize`"
    return None


def _linear_slots(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of every linear layer, bare or inside one of peft's."""
    for leaf, child in module.named_children():
        if is_adapted(child) or isinstance(child, nn.Linear):
            yield module, leaf
        else:
            yield from _linear_slots(child)


class FusedFlux1:
    """The fused forward of one `FluxTransformer2DModel`, which stays as it is beside it.

    Args:
        transformer: on the device where it will run.
        scheduler: anything with `timesteps` as diffusers' schedulers have them, to compute all steps' modulation at
            once; without it each step computes its own.
        offload_modulation: keep the modulation layers in host memory; they pass through the GPU once a generation.
        cuda_graph: replay the step as one CUDA graph from the second call of a shape on (CUDA only).
        attention: see `Attend`; or `16bit`, `int8` or `fp8`, see `flux1_blocks.ATTENTIONS`.

    Raises:
        ValueError: `why_not(transformer)`, or an unknown attention.
    """

    def __init__(
        self,
        transformer: Any,
        scheduler: Any = None,
        *,
        offload_modulation: bool = True,
        cuda_graph: bool = True,
        attention: Attend | str = attend,
    ) -> None:
        reason = why_not(transformer)
        if reason is not None:
            raise ValueError(f"the fused forward cannot be used: {reason}")
        self.transformer, self.scheduler = transformer, scheduler
        self.offload_modulation, self.attention = offload_modulation, named_attention(attention)
        self.stock_forward: Callable[..., Any] = transformer.forward
        self.graph = GraphedCall(self._core) if cuda_graph else None
        self._said: set[str] = set()
        self._rope: tuple[Tensor, Tensor, Rope] | None = None
        self._slots: list[tuple[nn.Module, str]] = []
        self._build()

    # --- the plan ---------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Join projections and gather modulation layers, on the device where the model is now."""
        t = self.transformer
        self.device = t.proj_out.weight.device
        # A plan that is replaced lets go of its joint weights and its graphs' memory first.
        self.doubles, self.singles = [], []
        if self.graph is not None:
            self.graph.forget()
        self.doubles = [DoubleBlock(block, self.attention) for block in t.transformer_blocks]
        self.singles = [SingleBlock(block, self.attention) for block in t.single_transformer_blocks]
        linears = [
            linear for block in t.transformer_blocks for linear in (block.norm1.linear, block.norm1_context.linear)
        ]
        linears += [block.norm.linear for block in t.single_transformer_blocks]
        self.modulation = Modulation([*linears, t.norm_out.linear], self._embed)
        if self.offload_modulation and self.device.type == "cuda":
            self.modulation.offload_()
        self._rope = None
        self._slots = list(_linear_slots(t))
        self._signature = self._sign()

    def _sign(self) -> list[tuple[Any, ...]]:
        """What the plan rests on: the layers themselves, where their bytes are, how they are set."""
        found: list[tuple[Any, ...]] = []
        for parent, leaf in self._slots:
            child: Any = parent._modules.get(leaf)
            if is_adapted(child):
                found.append((id(child), *low_rank.stamp(child)))
                child = base_of(child)
            weight = getattr(child, "_parameters", {}).get("weight")
            found.append(
                (
                    id(child),
                    None if weight is None else weight.data_ptr(),
                    getattr(child, "mode", None),
                    getattr(child, "activation_dtype", None),
                    getattr(child, "backend", None),
                )
            )
        return found

    def _embed(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        embed, thousand = self.transformer.time_text_embed, timestep * 1000
        if guidance is None:
            out: Tensor = embed(thousand, pooled)
        else:
            out = embed(thousand, guidance.to(timestep.dtype) * 1000, pooled)
        return out

    def _tables(self, txt_ids: Tensor, img_ids: Tensor) -> Rope:
        """Rotation tables, kept as long as the ids are the same tensors."""
        if self._rope is None or self._rope[0] is not txt_ids or self._rope[1] is not img_ids:
            two = [ids[0] if ids.dim() == 3 else ids for ids in (txt_ids, img_ids)]
            cos, sin = self.transformer.pos_embed(torch.cat(two))
            self._rope = (txt_ids, img_ids, Rope(cos, sin).for_(self.attention))
        return self._rope[2]

    def _schedule(self, dtype: torch.dtype) -> Tensor | None:
        """The sampler's timesteps as the pipeline hands them to the model."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.dim() != 1 or not timesteps.numel():
            return None
        return timesteps.to(self.device).to(dtype) / 1000

    def release(self) -> None:
        """Undo what building did: layers get tensors of their own, modulation layers come back to the device."""
        self.modulation.restore_(self.device)
        for module in self.transformer.modules():
            if isinstance(module, TernaryLinear):
                separate_(module)
        self._rope, self._signature = None, []
        if self.graph is not None:
            self.graph.forget()

    @property
    def expanded_bytes(self) -> int:
        """Bytes that CPU kernels keep beside packed weights of the blocks and of modulation at the moment."""
        streams = [stream for double in self.doubles for stream in (double.image, double.text)]
        projections = [p for s in streams for p in (s.qkv, s.out, s.up, s.down)]
        projections += [p for single in self.singles for p in (single.qkv, single.up, single.out)]
        modulation = (m for m in self.modulation.linears if isinstance(m, TernaryLinear))
        return sum(p.expanded_bytes for p in projections) + sum(m.expanded_bytes for m in modulation)

    # --- the forward ------------------------------------------------------------------------------------------

    def obstacle(self, hidden_states: Tensor, timestep: Tensor | None, kwargs: dict[str, Any]) -> str | None:
        """Why this call has to take the stock forward, in one line; rebuilds the plan if the model has changed."""
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if kwargs.get(name) is not None:
                return "ControlNet residuals are given"
        if any(value is not None for value in (kwargs.get("joint_attention_kwargs") or {}).values()):
            return f"joint_attention_kwargs are given ({', '.join(kwargs['joint_attention_kwargs'])})"
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return "gradients are asked for"
        if timestep is None or timestep.dim() != 1:
            return "the timestep is not one number an image"
        if self._sign() != self._signature:
            reason = why_not(self.transformer)
            if reason is not None:
                return reason
            self._build()
        return None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Any = None,
        controlnet_single_block_samples: Any = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Any:
        """`FluxTransformer2DModel.forward`, same arguments and results."""
        rest = {
            "joint_attention_kwargs": joint_attention_kwargs,
            "controlnet_block_samples": controlnet_block_samples,
            "controlnet_single_block_samples": controlnet_single_block_samples,
            "controlnet_blocks_repeat": controlnet_blocks_repeat,
        }
        reason = self.obstacle(hidden_states, timestep, rest)
        inputs = (encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids)
        if reason is not None or any(value is None for value in inputs):
            return self._stock(
                reason or "an input is missing",
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                img_ids=img_ids,
                txt_ids=txt_ids,
                guidance=guidance,
                return_dict=return_dict,
                **rest,
            )
        with torch.no_grad():
            sample = self._fused(hidden_states, guidance, *inputs)  # type: ignore[arg-type]
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _stock(self, reason: str, **kwargs: Any) -> Any:
        if reason not in self._said:
            self._said.add(reason)
            log.warning("tritflow.optimize: this call takes the stock forward, which is slower: %s", reason)
        if self.modulation.linears[0].weight.device != self.device:
            self.modulation.restore_(self.device)
            self._signature = []  # the next fused call offloads them again
        return self.stock_forward(**kwargs)

    def _fused(
        self,
        hidden_states: Tensor,
        guidance: Tensor | None,
        encoder_hidden_states: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        dtype = hidden_states.dtype
        rope = self._tables(txt_ids, img_ids)
        # The stock model rounds the timestep to its own dtype before anything else.
        timestep = timestep.to(dtype)
        modulation = self.modulation.rows(timestep, guidance, pooled, self._schedule(dtype))
        args = (hidden_states, encoder_hidden_states, rope.cos, rope.sin, modulation)
        if self.graph is not None and hidden_states.is_cuda:
            return self.graph(*args)
        return self._core(*args)

    def _core(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor
    ) -> Tensor:
        """Everything of a step that depends on the picture; no host synchronisation, no data-dependent shapes."""
        t = self.transformer
        rope = Rope(cos, sin)
        image, text = t.x_embedder(hidden_states), t.context_embedder(encoder_hidden_states)
        parts = self.modulation.split(modulation)
        for i, double in enumerate(self.doubles):
            image, text = double(image, text, parts[2 * i], parts[2 * i + 1], rope)
        tokens = text.shape[1]
        x = torch.cat([text, image], dim=1)
        del text, image
        for single, part in zip(self.singles, parts[2 * len(self.doubles) : -1], strict=True):
            x = single(x, part, rope)
        scale, shift = parts[-1].chunk(2, dim=1)
        out: Tensor = t.proj_out(adaln(x[:, tokens:], shift, scale, t.norm_out.norm.eps))
        return out
