"""sample: draws the next token of each row from its logits, by selection instead of sorting.

    w     = exp((logits - max(logits)) / temperature)
    order : tokens by w, largest first; of equal ones the lower index first
    kept  : the first top_k tokens of that order,
            of these those with w >= min_p (min_p times the largest probability),
            of these the fewest first ones whose mass is at least top_p times the mass of all of these
    token : the first kept one, by index, at which the running sum of w exceeds u times the sum of all kept

    logits   (B, V)   float32, bfloat16 or float16; no NaN, no +inf, in each row something above -inf
    u        (B)      uniform in [0, 1), drawn from `generator`, or from torch's default one: the only randomness
    returns  (B)      int64

temperature 0 takes the largest logit, of equal ones the first, and draws nothing. None is no limit.
Equal seeds give equal tokens on every backend, but where u falls within rounding of a boundary (w is fp32, sums are
float64). No gradient: tokens have none. Logits whose rows are not contiguous are copied first (pyarch.copies).
Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top-p); Minh et al., Min-p Sampling, 2024.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch import Facts, Limits, Op
from ..native import define, operator, refusal
from . import _args


def sample(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Token ids (B) drawn from logits (B, V); see the module's text.

    temperature: at least 0; top_k: at least 1; top_p: above 0, at most 1; min_p: 0 to 1.
    Raises TypeError or ValueError naming the argument, also for logits of no distribution (CPU and reference);
    ValueError if the named backend cannot run the call.
    """
    facts = check(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, generator=generator)
    chosen = SAMPLE.choose(backend, facts)
    if chosen == "reference":
        return sample_reference(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, generator=generator
        )
    uniform = None if temperature == 0 else _uniform(logits, generator)
    try:
        return operator("sample", chosen)(
            _args.row_contiguous(logits.detach()), uniform, temperature, top_k or 0,
            1.0 if top_p is None else top_p, min_p or 0.0,
        )  # fmt: skip
    except RuntimeError as error:
        raise refusal(error) from None


def sample_reference(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The definition, by sorting, in plain PyTorch: any device and floating dtype."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(-1, keepdim=True) if wide.numel() else wide.new_zeros(wide.shape[0], 1)
    if not bool(top.isfinite().all()):
        raise ValueError("logits: a row holds NaN or +inf, or nothing above -inf")
    if temperature == 0:
        return wide.argmax(-1)
    w, order = torch.exp((wide - top) / temperature).double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(w.shape[1], device=w.device)
    kept = torch.ones_like(w, dtype=torch.bool) if top_k is None else (rank < top_k).expand_as(w)
    if min_p is not None:
        kept = kept & (w >= min_p)
    if top_p is not None:
        mass = (w * kept).cumsum(-1)
        kept = kept & (mass - w < top_p * mass[:, -1:])
    running = torch.zeros_like(w).scatter(-1, order, w * kept).cumsum(-1)
    total = running[:, -1:].contiguous()
    token = torch.searchsorted(running, _uniform(logits, generator)[:, None] * total, right=True)
    return torch.minimum(token, torch.searchsorted(running, total)).squeeze(-1)


def _uniform(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    random: dict[str, Any] = {} if generator is None else {"generator": generator}  # None breaks symbolic sizes
    return torch.rand(logits.shape[0], dtype=torch.float64, device=logits.device, **random)


def check(
    logits: Any,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: Any = None,
) -> Facts:
    """Checks the arguments and returns the facts that dispatch compares with LIMITS."""
    _args.tensor("logits", logits, rank=2)
    if not logits.is_floating_point():
        raise TypeError(f"logits: dtype must be floating, not {logits.dtype}")
    if logits.shape[1] == 0:
        raise ValueError(f"logits: must have at least one column, not shape {tuple(logits.shape)}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: must be finite and at least 0, not {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: must be None or an int of at least 1, not {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: must be None or above 0 and at most 1, not {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p: must be None or 0 to 1, not {min_p}")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: must be a torch.Generator, not {type(generator).__name__}")
        if generator.device.type != logits.device.type:
            raise ValueError(f"generator: must be on {logits.device} like logits, not {generator.device}")
    return {"device": _args.device_type(logits), "dtype": logits.dtype}


def _fake(logits, uniform, temperature, top_k, top_p, min_p):
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


LIMITS = {"cpu": Limits("cpu")}
SAMPLE = Op("sample", LIMITS, check, "none: tokens have no gradient")
define(
    "sample",
    "(Tensor logits, Tensor? uniform, float temperature, int top_k, float top_p, float min_p) -> Tensor",
    _fake,
)

OPS = {sample: SAMPLE}
CASES = {
    "smollm2": dict(batch=1, vocabulary=49152),
    "llama3": dict(batch=1, vocabulary=128256),
    "llama3-batch8": dict(batch=8, vocabulary=128256),
}


def flops(case: dict) -> int:
    return 10 * case["batch"] * case["vocabulary"]  # the exponential counted as its polynomial


def bytes_moved(case: dict, dtype: torch.dtype) -> int:
    return case["batch"] * case["vocabulary"] * dtype.itemsize
