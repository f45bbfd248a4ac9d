"""The instruments of testing.py: poisoned memory, guarded arguments, a record of the operators that ran, and the
tolerance rule. Each can be used alone."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import native

# Bytes before and after every argument. A sanitizer has guards of its own, which see reads too, but only at the ends.
GUARD = 0 if hasattr(ctypes.CDLL(None), "__asan_init") else 64


class Operators(native.Recorder):
    """Records the pyarch operators that run inside, and says whether they were the right ones."""

    def check(self, what: str, backend: str, results: Iterable[torch.Tensor]) -> None:
        """Only operators of this backend ran, and at least one did, unless there was nothing to compute."""
        ran = {func.name().rpartition("__")[2] for func, _ in self.calls}
        nothing = not any(t.numel() for t in results)
        assert ran == {backend} or (nothing and not ran), f"{what}: named {backend}, ran on {ran or 'none'}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty and the native libraries' outputs and scratch are NaN (integers: the largest)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    native.poison(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
            yield
    finally:
        native.poison(False)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def refused(
    what: str, error: type[Exception] | tuple, argument: str | Iterable[str], reason: str = ""
) -> Iterator[None]:
    """Inside, a call must raise `error` with a message that starts with the argument's name and holds the reason."""
    names = (argument,) if isinstance(argument, str) else tuple(argument)
    try:
        yield
    except error as e:
        text = str(e)
        clear = text.startswith(tuple(f"{name}:" for name in names)) and reason in text
        assert clear, f"{what}: the message must start with {' or '.join(names)} and a colon, and is {text!r}"
    except Exception as e:
        raise AssertionError(f"{what}: raised {e!r}, must be refused naming {' or '.join(names)}") from e
    else:
        raise AssertionError(f"{what}: accepted, must be refused naming {' or '.join(names)}")


class Guarded:
    """A copy of a call's arguments, each laid out anew in memory of its own between guard bytes of 0xff."""

    def __init__(self, named: dict[str, Any], layout: str = "given", keep: tuple[str, ...] = ()) -> None:
        self.bases: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.named = {n: tree_map(lambda v, n=n: self._place(v, "given" if n in keep else layout), v)
                      for n, v in named.items()}  # fmt: skip

    def _place(self, t: Any, layout: str) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        strides, shift = _strides(t, layout), 1 if layout == "padded" else 0
        guard = GUARD // t.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True)) if t.numel() else 0
        base = torch.zeros(2 * guard + span + shift, dtype=t.dtype, device=t.device)
        base.view(torch.uint8).fill_(1 if t.dtype == torch.bool else 0xFF)
        view = base.as_strided(t.shape, strides, guard + shift)
        once = [min(n, 1) if s == 0 else n for n, s in zip(t.shape, strides, strict=True)]  # expanded: one
        first = tuple(slice(n) for n in once)
        view.as_strided(once, strides).copy_(t.detach()[first])
        outside = torch.ones_like(base, dtype=torch.bool)
        outside.as_strided(once, strides, guard + shift).fill_(False)
        self.bases.append((base, outside))
        return view.requires_grad_(t.requires_grad)

    def check(self, what: str) -> None:
        for base, outside in self.bases:
            fill = 1 if base.dtype == torch.bool else 0xFF
            kept = base.detach().view(torch.uint8).view(base.numel(), base.element_size())[outside] == fill
            assert bool(kept.all()), f"{what}: wrote outside an argument"


def _strides(t: torch.Tensor, layout: str) -> tuple[int, ...]:
    if layout == "given":
        return t.stride()
    strides, step = [0] * t.dim(), 2 if layout == "stepped" else 1
    for d in range(t.dim()) if layout == "reversed" else reversed(range(t.dim())):
        strides[d] = step
        step *= max(t.shape[d], 1) + (3 if layout == "padded" else 0)
    return tuple(strides)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality, so that NaNs are compared too."""

    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_close(what: str, got: torch.Tensor, truth: torch.Tensor, peer: torch.Tensor, factor: float = 1.5,
                 floor: float = 1.0, exact: bool = False) -> None:  # fmt: skip
    """The tolerance rule: in the largest and in the root-mean-square norm, the error of `got` against the float64
    truth is at most factor times the error of `peer` (same-dtype PyTorch) plus floor * eps * norm of the truth. The
    peer's largest error counts as at least three times its root mean square.

    Infinities and NaNs must be where the peer has them; integers must be equal.
    """
    assert got.shape == peer.shape and got.dtype == peer.dtype and got.device == peer.device, (
        f"{what}: is {got.dtype} {tuple(got.shape)}, must be {peer.dtype} {tuple(peer.shape)}"
    )
    if not got.is_floating_point():
        assert torch.equal(got, peer), f"{what}: {int((got != peer).sum())} of {got.numel()} integers differ"
        return
    finite = peer.isfinite() & truth.to(peer.dtype).isfinite()
    odd = ~finite & ~((got == peer) | (got.isnan() & peer.isnan())) | (finite & ~got.isfinite())
    assert not bool(odd.any()), f"{what}: {int(odd.sum())} of {got.numel()} elements are {got[odd][:4].tolist()}"
    g, t, p = (v.double()[finite] for v in (got, truth, peer))
    if exact:
        assert torch.equal(g, t), f"{what}: off by {(g - t).abs().max():.3g} where the result is representable"
    if not g.numel():
        return
    eps, rms = torch.finfo(got.dtype).eps, lambda v: v.square().mean().sqrt()
    chance = 3 * rms(p - t)  # what the largest of few errors can be: the peer's own may be small by luck
    for norm, of, own in (("largest", lambda v: v.abs().max(), chance), ("rms", rms, 0)):
        own = max(own, of(p - t))
        error, allowed = of(g - t), factor * own + floor * eps * of(t)
        assert error <= allowed, (
            f"{what}: {norm} error {error:.3g} above {allowed:.3g} (PyTorch's own {own:.3g}), first at "
            f"{tuple(torch.where(finite, (got.double() - truth).abs(), 0).flatten().argmax().unsqueeze(0).tolist())}"
        )
