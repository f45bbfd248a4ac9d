"""Checks of arguments that several rooms share. Each raises TypeError or ValueError that names the argument."""

from __future__ import annotations

from typing import Any

import torch

from .._copies import copied

_Tensor, _STRIDED = torch.Tensor, torch.strided  # looked up once: every argument of every call is compared with them
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensor(name: str, value: object, *, rank: int | None = None, dtypes: tuple[torch.dtype, ...] | None = None,
           device: torch.device | None = None, shape: tuple[int, ...] | None = None) -> torch.Tensor:  # fmt: skip
    """Checks that value is a strided tensor of the given rank, dtype, device and exact shape."""
    if not isinstance(value, _Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, not {type(value).__name__}")
    if value.layout != _STRIDED:
        raise TypeError(f"{name}: must be a dense (strided) tensor, not {value.layout}")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name}: must have {rank} dimensions, not shape {tuple(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: dtype must be {' or '.join(map(str, dtypes))}, not {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: must be on {device}, not {value.device}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: shape must be {tuple(shape)}, not {tuple(value.shape)}")
    return value


def device_type(value: torch.Tensor) -> str:
    """value.device.type, five times faster where it is the CPU: every call of an op asks for it."""
    return "cpu" if value.is_cpu else value.device.type


def shape(name: str, value: torch.Tensor, *sizes: int) -> None:
    """Checks the exact shape."""
    if value.shape != sizes:
        raise ValueError(f"{name}: shape must be {sizes}, not {tuple(value.shape)}")


def writable(name: str, value: torch.Tensor) -> None:
    """Checks that a tensor which is written to is not expanded, so that every element has memory of its own."""
    if 0 in value.stride() and any(n > 1 and s == 0 for n, s in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"{name}: is written to, so no two of its elements may share memory (it is expanded)")


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def contiguous(t: Any) -> Any:
    """The tensor (or None), copied only if it is not contiguous."""
    return t if t is None or t.is_contiguous() else copied(t.contiguous())


def rows(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, columns), copied only if its rows do not follow one another at one distance."""
    if x.dim() == 2:
        return x
    flat = x.shape[:-1].numel(), x.shape[-1]
    if torch.compiler.is_compiling() or x.is_contiguous():
        return x.reshape(flat)
    try:
        return x.view(flat)
    except RuntimeError:
        return copied(x.reshape(flat))


def like_rows(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The opposite, for a result y with a row for each of rows(x)."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def row_contiguous(t: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return t if t.is_contiguous() or t.stride(-1) == 1 else copied(t.contiguous())  # in this order: the faster one
