"""Compile the plain Triton kernels for GPUs that are not here: what a machine without one can say about all of them.

Each kernel is compiled with the settings that FLUX.1-dev's sizes get at launch. `python -m
tritflow.kernels.triton.aot` prints a table of registers and shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritflow.kernels.attention_reference import BLOCK, E4M3_MAX, SAMPLE, V_FLOOR
from tritflow.kernels.reference import AMAX_FLOOR, QMAX
from tritflow.kernels.triton import adaln, attention, attention_inputs, block, expand, gemm, low_rank, quantize, rope

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, RTX 30 and A10, RTX 40 and L20, H100/H200, B200, RTX 50, and AMD's MI300."""

SHARED_MEMORY = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
}
"""KiB that one block may use."""


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched: types of its tensors and numbers, values of its constants, launch options."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    fp8: bool = False

    def compile(self, target: str) -> Any:
        """Triton's compiled kernel (`asm`, `metadata`) for a name of `TARGETS`."""
        names = self.kernel.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        # FLUX.1-dev's sizes and strides are multiples of 16, and Triton specialises a launch on that; 24 heads are not.
        attrs = {
            path: [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if signature[n] != "constexpr" and n != "H"
            for path in ([(i, j) for j in range(len(signature[n]))] if isinstance(signature[n], tuple) else [(i,)])
        }
        constants, options = dict(self.constants), dict(self.options)
        if "PACKED_ASM" in constants and TARGETS[target].backend != "cuda":
            constants["PACKED_ASM"] = False
            options["num_stages"] = min(options["num_stages"], 2)  # as launch_blocks has it
        if "PARTS" in constants and TARGETS[target].backend != "cuda":
            constants["PARTS"], options = 4, {"num_warps": 4, "num_stages": 2}  # as down_blocks has it
        source = ASTSource(self.kernel, signature, constants, attrs)
        return triton.compile(source, target=TARGETS[target], options=options)


def _numbers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _quantizing(fp8: bool, columns: bool = True) -> dict[str, Any]:
    kind = "float8_e4m3fn" if fp8 else "int8"
    return {"QMAX": QMAX[kind], "FLOOR": AMAX_FLOOR, "HAS_COLUMNS": columns, "FP8": fp8}


def _row(features: int, each: int = 2048) -> dict[str, Any]:
    return {"num_warps": min(16, max(1, triton.next_power_of_2(features) // each))}


def _quantize_cases(fp8: bool) -> list[Case]:
    q = "*fp8e4nv" if fp8 else "*i8"
    kind = "fp8" if fp8 else "int8"
    vectors = {"input_scale_ptr": "*bf16", "q_ptr": q, "scale_ptr": "*fp32"}
    normed = {"x_ptr": "*bf16", "shift_ptr": "*bf16", "scale_ptr": "*bf16", "input_scale_ptr": "*bf16", "out_ptr": q}
    quantizing = _quantizing(fp8)
    strides = _numbers("tokens", "stride_b", "stride_s", "shift_stride", "scale_stride")
    return [
        Case(
            f"quantize {kind}",
            quantize.quantize_kernel,
            {"x_ptr": "*bf16", **vectors, **_numbers("stride_m")},
            {"K": 3072, "BLOCK_K": 4096, **quantizing},
            {**_row(3072, 1024), "enable_fp_fusion": False},
            fp8,
        ),
        *(
            Case(
                f"adaln + quantize {kind}, {tile['ROWS']} tokens, {tile['num_warps']} warps",
                adaln.adaln_kernel,
                {**normed, "out_scale_ptr": "*fp32", **strides},
                {"K": 3072, "EPS": 1e-6, "QUANTIZE": True, "ROWS": tile["ROWS"], "WIDTH": tile["WIDTH"], **quantizing},
                {"num_warps": tile["num_warps"]},
                fp8,
            )
            for tile in adaln.TILES
        ),
        Case(
            f"gelu + quantize {kind}",
            block.gelu_kernel,
            {"x_ptr": "*bf16", "prefix_ptr": "*bf16", **vectors, **_numbers("x_stride", "prefix_stride")},
            {"P": 3072, "K": 15360, "QUANTIZE": True, "BLOCK_K": 16384, **quantizing},
            _row(15360),
            fp8,
        ),
    ]


def _product_cases(fp8: bool) -> list[Case]:
    types = {
        "q_ptr": "*u8" if fp8 else "*i8",
        "x_scale_ptr": "*fp32",
        "weight_ptr": "*u8",
        "weight_scale_ptr": "*bf16",
        "bias_ptr": "*bf16",
        "residual_ptr": "*bf16",
        "gate_ptr": "*bf16",
        "low_ptr": "*bf16",
        "up_ptr": "*bf16",
        "out_ptr": "*bf16",
        **_numbers("M", "N", "residual_stride", "low_stride"),
    }
    cases = []
    for tokens, rank in ((8, 0), (64, 0), (4608, 0), (64, 16), (4608, 16)):
        constants = {
            "K": 3072,
            "HAS_BIAS": True,
            "HAS_RESIDUAL": tokens == 4608,
            "RANK": rank,
            "GROUPS": 3 if rank else 1,
            "ALIGNED": True,
            "FP8": fp8,
            "PACKED_ASM": True,
        }
        blocks = gemm.launch_blocks(tokens, 8)
        options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
        name = f"w2a8 {'fp8' if fp8 else 'int8'}, {tokens} tokens{', LoRA' if rank else ''}"
        cases.append(Case(name, gemm.w2a8_kernel, types, constants | blocks, options, fp8))
    return cases


def _low_rank_cases(fp8: bool) -> list[Case]:
    """The first factor of one layer and of four that share an input; the second in a pass of its own."""
    types = {"q_ptr": "*u8" if fp8 else "*i8", "x_scale_ptr": "*fp32", "down_ptr": "*bf16", "out_ptr": "*bf16"}
    cases = []
    for tokens, columns, features in ((512, 16, 12288), (4608, 16, 15360), (4608, 64, 3072)):
        blocks = low_rank.down_blocks(tokens, columns, 16)
        options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
        constants = {"COLUMNS": columns, "K": features, "FP8": fp8, **blocks}
        name = f"low rank, down {'fp8' if fp8 else 'int8'}, {tokens} tokens, {columns} columns"
        cases.append(Case(name, low_rank.low_rank_down_kernel, types | _numbers("M"), constants, options, fp8))
    if not fp8:
        types = dict.fromkeys(("y_ptr", "low_ptr", "up_ptr"), "*bf16") | _numbers("M", "N", "low_stride")
        constants = {"RANK": 16, "GROUPS": 3, "ALIGNED": True, "BLOCK_M": 64, "BLOCK_N": 128}
        cases.append(Case("low rank, add", low_rank.low_rank_add_kernel, types, constants, {"num_warps": 4}))
    return cases


def _other_cases() -> list[Case]:
    strides = [f"{name}_stride_{axis}" for name in ("q", "k", "context_q", "context_k") for axis in "bsh"]
    pointers = ["q", "k", "q_weight", "k_weight", "context_q", "context_k", "context_q_weight", "context_k_weight"]
    turned = {f"{name}_ptr": "*bf16" for name in [*pointers, "q_out", "k_out"]} | {
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
    }
    turned |= _numbers("context_tokens", "tokens", *strides, "H")
    gated = {f"{name}_ptr": "*bf16" for name in ("residual", "gate", "y", "out")}
    gated |= _numbers("tokens", "residual_stride_b", "residual_stride_s", "gate_stride", "y_stride_b", "y_stride_s")
    blocks = gemm.launch_blocks(4608, 16)
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    w2a16 = dict.fromkeys(("x_ptr", "weight_scale_ptr", "bias_ptr", "input_scale_ptr", "out_ptr"), "*bf16")
    w2a16 |= {"weight_ptr": "*u8", **_numbers("stride_m", "M", "N")}
    cases = [
        Case(
            "w2a16, 4608 tokens",
            gemm.w2a16_kernel,
            w2a16,
            {"K": 3072, "HAS_BIAS": True, "HAS_COLUMNS": True, "PACKED_ASM": True, **blocks},
            options,
        ),
        Case("gated residual", block.gated_residual_kernel, gated, {"N": 3072, "BLOCK_N": 4096}, {"num_warps": 4}),
    ]
    for context in (False, True):
        constants = {"D": 128, "EPS": 1e-6, "HAS_CONTEXT": context, "HEADS": 8, "BLOCK_D": 128}
        name = "norm + rotation, two streams" if context else "norm + rotation"
        cases.append(Case(name, rope.qk_norm_rope_kernel, turned, constants, {"num_warps": 2}))
    for kind, out in enumerate(("*i8", "*u8", "*bf16")):
        types = {"weight_ptr": "*u8", "scale_ptr": "*bf16", "out_ptr": out, **_numbers("N")}
        constants = {"K": 3072, "KIND": kind, "BLOCK_N": 8, "BYTES": 256}
        cases.append(
            Case(
                f"expand to {('int8', 'e4m3', 'bf16')[kind]}", expand.expand_kernel, types, constants, {"num_warps": 4}
            )
        )
    for kind, name in enumerate(("int8", "e4m3")):
        types = {"weight_ptr": "*u8", "out_ptr": "*i32", **_numbers("N")}
        constants = {"K": 3072, "KIND": kind, "BLOCK_N": 8, "BYTES": 128}
        cases.append(Case(f"expand to {name} by words", expand.expand_words_kernel, types, constants, {"num_warps": 4}))
    sums = {"sums_ptr": "*i32", "x_scale_ptr": "*fp32"} | {
        f"{name}_ptr": "*bf16" for name in ("weight_scale", "bias", "residual", "gate", "out")
    }
    sums |= _numbers("tokens", "residual_stride_b", "residual_stride_s", "gate_stride")
    constants = {"N": 3072, "HAS_BIAS": True, "HAS_RESIDUAL": True, "BLOCK_N": 4096}
    return [*cases, Case("scale sums", block.scale_sums_kernel, sums, constants, {"num_warps": 4})]


def _attention_cases() -> list[Case]:
    """Head dimension 128; queries and keys in int8 with values in 16 bits or e4m3, and all of it in e4m3."""
    found = []
    for kind, e4m3 in (("int8", False), ("int8", True), ("float8_e4m3fn", True)):
        element = "i8" if kind == "int8" else "fp8e4nv"
        values = "fp8e4nv" if e4m3 else element  # not followed where values stay in 16 bits
        blocks = attention.launch_blocks(128, e4m3)
        options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
        rows, keys = blocks["BLOCK_M"], blocks["BLOCK_N"]
        scales = dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "v_exponent_ptr"), "*fp32")
        types = {"q_desc": f"tensordesc<{element}[{rows},128]>", "k_desc": f"tensordesc<{element}[{keys},128]>"}
        types |= {"v": f"tensordesc<fp8e4nv[128,{keys}]>" if e4m3 else "*bf16", "out_ptr": "*bf16"}
        types |= scales | _numbers(*(f"{name}_stride_{axis}" for name in ("v", "out") for axis in "bsh"), "H")
        constants: dict[str, Any] = {"S": 4608, "PADDED": 4608, "V8": e4m3, "D": 128, "BLOCK": BLOCK}
        name = f"attention {kind}" + ("" if e4m3 else ", 16-bit values")
        found.append(Case(name, attention.attention_kernel, types, constants | blocks, options, e4m3))
        types = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "factor": "fp32"} | scales
        types |= {"q8_ptr": f"*{element}", "k8_ptr": f"*{element}", "v8_ptr": f"*{values}"}
        types |= _numbers(*(f"{name}_stride_{axis}" for name in "qkv" for axis in "bsh"), "H", "S", "PADDED")
        constants = {"QMAX": QMAX[kind], "FLOOR": AMAX_FLOOR, "V_MAX": E4M3_MAX, "V_FLOOR": V_FLOOR, "D": 128}
        normed = dict(constants)
        constants |= {"FP8": kind != "int8", "VALUES": e4m3, "SAMPLE": SAMPLE, "BLOCK": BLOCK, "WHOLE": True}
        name = f"quantize for attention {kind}" + ("" if e4m3 else ", 16-bit values")
        found.append(Case(name, attention_inputs.quantize_kernel, types, constants, {"num_warps": 4}, e4m3))
        if e4m3:
            found += [_normed_case(kind, types, normed, context) for context in (False, True)]
    return found


def _normed_case(kind: str, types: dict[str, Any], constants: dict[str, Any], context: bool) -> Case:
    """`quantize for attention` of one stream or two, with norm and rotation."""
    names = ("q", "k", "v", "context_q", "context_k", "context_v")
    types = {name: kind for name, kind in types.items() if "_stride_" not in name}
    types |= {f"{name}_ptr": "*bf16" for name in names} | {f"{name}_strides": ("i32",) * 3 for name in names}
    types |= dict.fromkeys(
        ("q_weight_ptr", "k_weight_ptr", "context_q_weight_ptr", "context_k_weight_ptr"), "*bf16"
    ) | dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
    constants = {name: value for name, value in constants.items() if name != "QMAX"}
    constants |= {"Q_MAX": QMAX[kind], "K_MAX": QMAX[kind], "EPS": 1e-6, "FP8": kind != "int8", "SAMPLE": SAMPLE}
    constants |= {"TABLE": 64, "BLOCK": BLOCK, "HAS_CONTEXT": context, "WHOLE": True}
    name = f"norm, rotate, quantize for attention {kind}" + (", two streams" if context else "")
    kernel = attention_inputs.normed_quantize_kernel
    return Case(name, kernel, types | _numbers("C"), constants, {"num_warps": 16}, True)


def cases() -> list[Case]:
    """Every kernel, in the variants that FLUX.1-dev launches."""
    found = []
    for fp8 in (False, True):
        found += [*_quantize_cases(fp8), *_product_cases(fp8), *_low_rank_cases(fp8)]
    return [*found, *_other_cases(), *_attention_cases()]


def why_not(case: Case, target: str) -> str | None:
    """Why a case does not exist on a target, in one line; None if it has to compile."""
    if case.fp8 and target in ("sm_80", "sm_86"):
        return "no e4m3 before compute capability 8.9"
    if case.fp8 and target == "gfx942":
        return "gfx942's e4m3 has another bias"
    return None


def main() -> None:
    for case in cases():
        for target in TARGETS:
            reason = why_not(case, target)
            text = reason or f"{case.compile(target).metadata.shared / 1024:.0f} KiB shared"
            print(f"{case.name:32} {target:8} {text}", flush=True)


if __name__ == "__main__":
    main()
