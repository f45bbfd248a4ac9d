"""Direct calls: a module whose call was checked goes straight to the operator in the next ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dispatch import Facts, Op, forced
from ..native import operator


class Direct:
    """Whether the next call of a module may go straight to its CPU operators.

    A public function checks its arguments and chooses a backend in every call, which costs more than a small op does,
    270 times for one token of SmolLM2. All but x stays as it is between calls of a module, so the choice is kept for
    x's dtype and the `use_backend` in force. CPU operators alone, because they recheck all they are given; never where
    autograd or the compiler might be watching.
    """

    def __init__(self) -> None:
        self._key: tuple[torch.dtype, str] | None = None

    def ready(self, x: torch.Tensor) -> bool:
        """Whether what was learnt holds for x, a contiguous matrix on the CPU."""
        return (
            not torch.compiler.is_compiling()
            and self._key is not None
            and self._key == (x.dtype, forced())
            and x.ndim == 2
            and x.is_cpu
            and x.is_contiguous()
            and not torch.is_grad_enabled()
        )

    def learn(self, x: torch.Tensor, calls: Callable[[], list[tuple[Op, Facts]]]) -> None:
        """Called after checked calls on x; `calls` gives their ops and facts."""
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and x.is_cpu:
            on_cpu = all(op.choose("auto", facts) == "cpu" for op, facts in calls())
            self._key = (x.dtype, forced()) if on_cpu else None


quant_matmul, rms_norm, swiglu, rotary_append, paged_attention = (
    operator(name, "cpu") for name in ("quant_matmul", "rms_norm", "swiglu", "rotary_append", "paged_attention")
)
