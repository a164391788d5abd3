"""Compile the Hopper kernels without a GPU and read what came out: registers, spills, machine code.

``in_flight_overwrites`` guards the one assumption that no compiler checks: an asynchronous wgmma reads its weight
registers until it is waited for, and nothing may be written to them before.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from tritflow.kernels.hopper.attention import attention_kernel
from tritflow.kernels.hopper.attention_launch import AttentionConfig, constants
from tritflow.kernels.hopper.consumers import consumers_kernel
from tritflow.kernels.hopper.gemm import w2a8_kernel
from tritflow.kernels.hopper.launch import Config

_SM90 = GPUTarget("cuda", 90, 32)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What one kernel became: ``notes`` are the assembler's performance warnings."""

    registers: int
    stack: int
    shared: int
    spills: int
    notes: tuple[str, ...]
    sass: str
    asm: dict[str, Any]

    def count(self, opcode: str) -> int:
        return len(re.findall(rf"\b{opcode}", self.sass))


def _descriptor(dtype: str, element: Any, block: list[int]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return f"tensordesc<{dtype}[{','.join(map(str, block))}],{layout!r}>"


def compile_gluon(
    function: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int, registers: int | None = None
) -> Compiled:
    """Compile a Gluon kernel for sm_90a: ``signature`` types the tensors, ``constants`` the constexprs.

    ``registers`` bounds a thread's.
    """
    types = {name: signature.get(name, "constexpr") for name in function.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if types[name].startswith("*") or "_stride_" in name  # as FLUX.1-dev's are, which Triton specialises on
    }
    source = GluonASTSource(function, types, constants, attrs)
    kernel = triton.compile(source, target=_SM90, options={"num_warps": num_warps, "maxnreg": registers})
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        sass = _run("cuobjdump", "-sass", str(cubin))
        log = _run("ptxas", "-v", "--gpu-name=sm_90a", str(ptx), "-o", f"{folder}/again.cubin")
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    spill = re.search(r"(\d+) bytes spill stores", log)
    if match is None or spill is None:
        raise RuntimeError(f"cuobjdump or ptxas said nothing that is understood: {usage[-300:]!r} {log[-300:]!r}")
    notes = tuple(line for line in log.splitlines() if "C75" in line)
    return Compiled(
        int(match[1]),
        int(match[2]),
        kernel.metadata.shared,
        int(spill[1]),
        notes,
        _instructions(sass),
        kernel.asm,
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _instructions(listing: str) -> str:
    """One instruction a line, without addresses and encodings."""
    lines = (re.sub(r"/\*.*?\*/", "", line).strip() for line in listing.splitlines())
    return "\n".join(line for line in lines if line.endswith(";"))


_ACTIVATIONS = {"int8": ("i8", gl.int8), "fp8": ("fp8e4nv", gl.float8e4nv), "bf16": ("bf16", gl.bfloat16)}


def compile_w2a8(
    config: Config, *, activation_dtype: str = "int8", has_bias: bool = True, has_low: bool = False
) -> Compiled:
    """The product of a configuration; ``activation_dtype`` is "int8", "fp8" or "bf16"."""
    name, element = _ACTIVATIONS[activation_dtype]
    signature = {
        "x_desc": _descriptor(name, element, [config.block_m, 128]),
        "w_desc": _descriptor("u8", gl.uint8, [config.block_n, 32]),
        "out_desc": _descriptor("bf16", gl.bfloat16, [config.block_m, config.block_n // 2]),
        "low_desc": _descriptor("bf16", gl.bfloat16, [config.block_m, 16]),
        "up_desc": _descriptor("bf16", gl.bfloat16, [config.block_n, 16]),
        "x_scale": "*fp32",
        "weight_scale": "*bf16",
        "bias": "*bf16",
        "table": "*i32",
        "starts": "*i32",
        **dict.fromkeys(("M", "N", "low_steps", "low_rows"), "i32"),
    }
    constants = {
        "STAGES": config.stages,
        "SPLIT": config.split,
        "LAG": config.lag,
        "HAS_BIAS": has_bias,
        "HAS_LOW": has_low,
    }
    return compile_gluon(w2a8_kernel, signature, constants, num_warps=4)


def compile_consumers(config: Config, *, activation_dtype: str = "int8") -> Compiled:
    """The product of a configuration that has ``consumers``."""
    name, element = _ACTIVATIONS[activation_dtype]
    first = min(config.block_m, 128)
    signature = {
        "x_desc": _descriptor(name, element, [first, 128]),
        "more_desc": _descriptor(name, element, [64, 128]),
        "w_desc": _descriptor("u8", gl.uint8, [64, 32]),
        "out_desc": _descriptor("bf16", gl.bfloat16, [first, 64]),
        "more_out_desc": _descriptor("bf16", gl.bfloat16, [64, 64]),
        "x_scale": "*fp32",
        "weight_scale": "*bf16",
        "bias": "*bf16",
        "M": "i32",
        "N": "i32",
        "steps": "i32",
    }
    constants = {
        "BM": config.block_m,
        "STAGES": config.stages,
        "CONSUMERS": config.consumers,
        "GROUP": config.group,
        "LAG": config.lag,
        "HAS_BIAS": True,
    }
    return compile_gluon(consumers_kernel, signature, constants, num_warps=4)


def compile_attention(
    config: AttentionConfig,
    *,
    dtype: str = "int8",
    tokens: int = 4608,
    features: int = 128,
    x_dtype: str = "bf16",
    ready: bool = False,
) -> Compiled:
    """8-bit attention of a configuration; ``dtype`` of queries and keys, ``x_dtype`` of inputs and output.

    ``ready``: queries come in 8 bits.
    """
    kind, element = ("i8", gl.int8) if dtype == "int8" else ("fp8e4nv", gl.float8e4nv)
    signature = {
        "q_ptr": f"*{kind if ready else x_dtype}",
        "k_desc": _descriptor(kind, element, [config.keys, features]),
        "v_desc": _descriptor("fp8e4nv", gl.float8e4nv, [features, config.keys]),
        "q_scale": "*fp32",
        "k_scale": "*fp32",
        "v_exponent": "*fp32",
        "out_ptr": f"*{x_dtype}",
        "factor": "fp32",
        "H": "i32",
    }
    signature |= {f"{name}_stride_{axis}": "i32" for name in ("q", "out") for axis in "bsh"}
    return compile_gluon(attention_kernel, signature, constants(tokens, dtype, config), num_warps=4)


_MMA = re.compile(r"\b[IQH]GMMA\S* R(\d+), R(\d+), gdesc")
_WRITE = re.compile(r"^(?:@!?U?P\d+ )?([A-Z0-9_.]+) (?:P\d+, )?R(\d+)")
_NO_WRITE = ("ST", "RED", "BAR", "SYNCS", "R2UR", "BRA", "UTMA", "DEPBAR", "MEMBAR", "ERRBAR", "CCTL")


def in_flight_overwrites(sass: str) -> list[str]:
    """Instructions that write a register which a wgmma in flight still reads as its weight operand.

    Straight-line: a loop is safe if nothing is in flight at its end, which is reported too.
    """
    busy: set[int] = set()
    found = []
    for line in sass.splitlines():
        if match := _MMA.search(line):
            first = int(match[2])
            busy.update(range(first, first + 4))
            continue
        if "WARPGROUP.DEPBAR" in line and "gsb0, 0x0" in line:
            busy.clear()
        elif busy and "BRA" in line:
            found.append(f"in flight across a branch: {line}")
        elif busy and (match := _WRITE.match(line)) and not match[1].startswith(_NO_WRITE):
            first = int(match[2])
            if busy.intersection(range(first, first + _width(match[1]))):
                found.append(line)
    return found


def _width(opcode: str) -> int:
    if "LDSM" in opcode or ".128" in opcode:
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode or opcode.startswith("CS2R") else 1
