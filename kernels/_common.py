"""What the Triton kernels share: casts and dots that are also right under the interpreter, epilogues, the launch guard.

Triton's interpreter keeps bf16 as its 16 bits in an integer: its dot, addition and comparison of bf16 are silently
wrong and its cast to bf16 truncates. Kernels therefore compute in fp32, and multiply and round through these helpers,
which compile to the plain instruction.
"""

import contextlib

import torch
import triton
import triton.language as tl

from pyarch import arch

INTERPRETING = tl.constexpr(arch.interpreting())  # read when a kernel is decorated, as Triton itself does


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to dtype, rounded to nearest even."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, rounded, bits | 0x400000)  # NaN stays NaN
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def subtract(x, c: tl.constexpr):
    """x - c of 16-bit floats, rounded to nearest even."""
    if INTERPRETING:
        return narrow(x.to(tl.float32) - c, x.dtype)
    else:
        return x - tl.full((), c, x.dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b: 16-bit operands, or fp32 ones in full; fp32 sums."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    elif INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def bound(x):
    """An integer as a bound of range(), for which Triton 3.6's interpreter takes Python's alone."""
    if INTERPRETING:
        return tl.cast(x, tl.int32).handle.data.item()
    else:
        return x


@triton.jit
def activate(y, CODE: tl.constexpr, slope):
    """The activation of a fp32 value; codes as pyarch/ops/_activation.py encodes them."""
    if CODE == 0:
        return y
    elif CODE == 1:  # relu; a comparison keeps NaN
        return tl.where(y < 0, 0.0, y)
    elif CODE == 2:  # silu
        return y * tl.sigmoid(y)
    elif CODE == 3:  # gelu
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif CODE == 4:  # gelu_tanh: (1 + tanh u) / 2 = sigmoid(2 u)
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    else:
        tl.static_assert(CODE == 5, "unknown activation")
        return tl.where(y < 0, y * slope, y)


def capability() -> int:
    """Compute capability of the current target as major * 10 + minor; 90 under the interpreter, which has none."""
    return 90 if INTERPRETING.value else triton.runtime.driver.active.get_current_target().arch


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
