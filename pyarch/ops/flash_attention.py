"""flash_attention: exact attention in memory linear in the sequence.

    s = scale * q @ k.T                     scale: 1 / sqrt(D) unless given
    s = softcap * tanh(s / softcap)         if softcap > 0
    s = s + bias - alibi_slopes * |i + Sk - Sq - j|
    out = softmax(s over the keys that row i sees) @ v;   lse = log(sum(exp(s)))

    q             (B, H, Sq, D)      float32, bfloat16 or float16, any strides; float64 on the reference only
    k             (B, Hkv, Sk, D)    like q; H is a multiple of Hkv, and head h reads key head h // (H / Hkv)
    v             (B, Hkv, Sk, Dv)   like q
    sinks         (H)                q's dtype or float32: one more logit per head, without a value
    bias          broadcastable to (B, H, Sq, Sk); q's dtype or float32; never expanded in memory
    mask          broadcastable to (B, H, Sq, Sk); bool, True keeps
    alibi_slopes  (H) or (B, H)      q's dtype or float32
    seed          one element        int64
    returns       out (B, H, Sq, Dv) like q; with return_lse also lse (B, H, Sq) float32 (float64 for float64)

Row i stands at position p = i + Sk - Sq of the keys (aligned at the bottom right). It sees the keys from p - left to
p + right of window=(left, right), where -1 is unbounded, and with causal none after p. A row that sees no key gives 0,
and its lse is the sink's logit, -inf without one. lse is natural and includes the sink. A score of -inf is a key that
is not seen; what k and v hold must be finite even there.

Packed sequences: B is 1 and cu_seqlens_q, cu_seqlens_k are int32 (n + 1), rising from 0 to Sq and Sk. The rows of
sequence b are cu[b] to cu[b+1] - 1, positions count within it, and alibi_slopes may be (n, H); bias and mask remain
(1, H, Sq, Sk).

Dropout: with dropout_p > 0 each weight of the softmax, but not the sink's, is 0 with that probability (to within
2^-17) and else multiplied by 1 / (1 - dropout_p); lse is as without. Which ones is a function of the seed, the
sequence, the head, the row and the key alone (_dropout.py), the same on every backend and in gradients. Without a seed
one is drawn from torch's generator of q's device.

Scores, softmax and sums are fp32 and out is rounded once; products of bf16 inputs are bf16 dot products, for which the
probabilities are rounded to bf16. On the CPU a row is bitwise the same for any batch and any number of threads.
Gradients, of lse too: native kernels on cpu and triton, in memory linear in the sequence, the same bits on every run
and for any number of threads; a second derivative by the reference's formulas, in memory quadratic in the sequence.
Errors: TypeError or ValueError naming the argument.
Dao et al., FlashAttention, 2022; Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch import Facts, Limits, Op
from ..native import define, operator, refusal
from . import _args, _attention, _attention_formulas, _dropout
from ._attention_formulas import Options


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of (B, H, S, D) tensors without the matrix of scores; see the module's text.

    Raises TypeError or ValueError naming the argument; ValueError if the named backend cannot run the call.
    """
    facts = check(
        q, k, v, causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks, bias=bias, mask=mask,
        alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    seed = _dropout.seed_of(dropout_p, seed, q.device)
    chosen = FLASH_ATTENTION.choose(backend, facts)
    if chosen == "reference":
        return flash_attention_reference(
            q, k, v, causal=causal, window=window, softcap=softcap, scale=scale, sinks=sinks, bias=bias, mask=mask,
            alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, dropout_p=dropout_p,
            seed=seed, return_lse=return_lse,
        )  # fmt: skip
    options = _options(q, causal, window, softcap, scale, dropout_p)
    tensors = (q, k, v, sinks, bias, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed)
    if _args.needs_grad(q, k, v, sinks, bias, alibi_slopes):
        out, lse = _FlashAttention.apply(chosen, options, *tensors)
    else:
        out, lse = _run(chosen, tensors, options)
    return (out, lse) if return_lse else out


def flash_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain PyTorch in float32 (float64 for float64): differentiable, any device and dtype."""
    options = _options(q, causal, window, softcap, scale, dropout_p)
    seed = _dropout.seed_of(dropout_p, seed, q.device)
    weights = _attention_formulas.weights(
        options, q, k, sinks, bias, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed
    )
    out = (weights.thin(weights.p) @ _attention_formulas.wide(v, q.shape[1])).to(q.dtype)
    return (out, weights.lse) if return_lse else out


def _options(q: torch.Tensor, causal: bool, window: Any, softcap: float, scale: float | None, p: float) -> Options:
    left, right = _attention.window(window, causal)
    return left, right, softcap, q.shape[-1] ** -0.5 if scale is None else scale, p


def check(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: Any = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    bias: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    return_lse: bool = False,
) -> Facts:
    """Checks the arguments and returns the facts that dispatch compares with LIMITS."""
    _args.tensor("q", q, rank=4)
    dtype, device = q.dtype, q.device
    if not dtype.is_floating_point:
        raise TypeError(f"q: dtype must be floating, not {dtype}")
    batch, heads, rows, head_dim = q.shape
    if head_dim == 0:
        raise ValueError(f"q: head size must be at least 1, not shape {tuple(q.shape)}")
    _args.tensor("k", k, rank=4, dtypes=(dtype,), device=device)
    _args.tensor("v", v, rank=4, dtypes=(dtype,), device=device)
    k_batch, kv_heads, keys, k_dim = k.shape
    v_batch, v_heads, values, value_dim = v.shape
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"k: its {kv_heads} heads must divide q's {heads}")
    if k_batch != batch or k_dim != head_dim:
        raise ValueError(f"k: shape must be {(batch, kv_heads, keys, head_dim)}, not {tuple(k.shape)}")
    if v_batch != batch or v_heads != kv_heads or values != keys:
        raise ValueError(f"v: shape must be {(batch, kv_heads, keys, value_dim)}, not {tuple(v.shape)}")
    if value_dim == 0:
        raise ValueError(f"v: head size must be at least 1, not shape {tuple(v.shape)}")
    _attention.window(window)
    _attention.scaling(softcap, scale)
    floats = (dtype, torch.float32)
    if sinks is not None:
        _args.tensor("sinks", sinks, dtypes=floats, device=device, shape=(heads,))
    if bias is not None:
        _broadcastable("bias", _args.tensor("bias", bias, dtypes=floats, device=device), (batch, heads, rows, keys))
    if mask is not None:
        _broadcastable(
            "mask", _args.tensor("mask", mask, dtypes=(torch.bool,), device=device), (batch, heads, rows, keys)
        )
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q: both or neither of cu_seqlens_q and cu_seqlens_k must be given")
    if cu_seqlens_q is not None:
        for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            _args.tensor(name, x, rank=1, dtypes=(torch.int32,), device=device)
            _args.shape(name, x, max(cu_seqlens_q.shape[0], 1))
        if batch != 1:
            raise ValueError(f"q: with cu_seqlens_q its batch must be 1, not shape {tuple(q.shape)}")
    if alibi_slopes is not None:
        _args.tensor("alibi_slopes", alibi_slopes, dtypes=floats, device=device)
        sequences = batch if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        if alibi_slopes.dim() != 1:
            _args.shape("alibi_slopes", alibi_slopes, sequences, heads)
        else:
            _args.shape("alibi_slopes", alibi_slopes, heads)
    _dropout.check(dropout_p, seed, device)
    return {"device": _args.device_type(q), "dtype": dtype, "head_dim": head_dim, "value_dim": value_dim}


def _broadcastable(name: str, x: torch.Tensor, full: tuple[int, ...]) -> None:
    if x.dim() > 4 or any(n not in (1, m) for n, m in zip(x.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"{name}: must broadcast to {full}, not shape {tuple(x.shape)}")


def _run(backend: str, tensors: tuple, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return operator("flash_attention", backend)(*_operands(tensors), *options)
    except RuntimeError as error:
        raise refusal(error) from None


def _operands(tensors: tuple) -> tuple:
    """As the operators take them: what broadcasts expanded, numbers of heads in float32."""
    q, k, v, sinks, bias, mask, slopes, cu_q, cu_k, seed = tensors
    return (
        q, k, v,
        None if sinks is None else sinks.float().contiguous(),
        None if bias is None else bias.expand(*q.shape[:3], k.shape[2]),
        None if mask is None else mask.expand(*q.shape[:3], k.shape[2]),
        None if slopes is None else slopes.float().contiguous(),
        _args.contiguous(cu_q), _args.contiguous(cu_k), seed,
    )  # fmt: skip


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, options, *tensors):
        out, lse = _run(backend, tensors, options)
        ctx.backend, ctx.options = backend, options
        ctx.save_for_backward(out, lse, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        out, lse, *tensors = ctx.saved_tensors
        if ctx.backend not in NATIVE_GRADIENT:
            return None, None, *_attention_formulas.gradients(ctx.options, d_out, d_lse, *tensors)
        wanted = ctx.needs_input_grad[2:]
        call = ctx.backend, ctx.options, wanted, out.detach(), lse.detach(), d_out, d_lse, *tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return None, None, *_Gradients.apply(*call)
        return None, None, *_run_backward(*call)


class _Gradients(torch.autograd.Function):
    """The gradients as a function, whose own gradient is that of the reference's formulas."""

    @staticmethod
    def forward(ctx, backend, options, wanted, out, lse, *differentiable):
        ctx.options = options
        ctx.save_for_backward(*differentiable)
        return _run_backward(backend, options, wanted, out, lse, *differentiable)

    @staticmethod
    def backward(ctx, *weights):
        with torch.enable_grad():
            # Views: of an argument that depends on another one, only its own derivative is wanted.
            inputs = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            gradients = _attention_formulas.gradients(ctx.options, *inputs)
        chained = [(g, w) for g, w in zip(gradients, weights, strict=True) if g is not None and w is not None]
        needed = ctx.needs_input_grad[5:]
        outputs, weights = zip(*chained, strict=True)
        values = [t for t, need in zip(inputs, needed, strict=True) if t is not None and need]
        again = torch.is_grad_enabled()
        found = iter(torch.autograd.grad(outputs, values, weights, create_graph=again, materialize_grads=True))
        return None, None, None, None, None, *(next(found) if need else None for need in needed)


def _run_backward(backend, options, wanted, out, lse, d_out, d_lse, *tensors) -> tuple:
    """The gradients with respect to tensors, by the native kernel; None where not wanted, but for q, k and v."""
    _, _, _, sinks, bias, _, slopes, _, _, _ = tensors
    operands = list(_operands(tensors))
    if bias is not None:
        operands[4] = bias[(None,) * (4 - bias.dim())]  # not expanded: as its gradient
    try:
        d_q, d_k, d_v, d_sinks, d_bias, d_slopes = operator("flash_attention_backward", backend)(
            d_out, _args.contiguous(d_lse), out, lse, *operands, *options, wanted[4], wanted[6]
        )
    except RuntimeError as error:
        raise refusal(error) from None
    d_sinks = d_sinks.to(sinks.dtype) if wanted[3] else None
    d_bias = d_bias.view(bias.shape).to(bias.dtype) if wanted[4] else None
    d_slopes = d_slopes.to(slopes.dtype) if wanted[6] else None
    return d_q, d_k, d_v, d_sinks, d_bias, None, d_slopes, None, None, None


def _fake(
    q, k, v, sinks, bias, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed, left, right, softcap, scale, dropout_p
):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    d_out, d_lse, out, lse, q, k, v, sinks, bias, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed,
    left, right, softcap, scale, dropout_p, bias_gradient, slopes_gradient,
):  # fmt: skip
    asked = (sinks, sinks is not None), (bias, bias_gradient), (alibi_slopes, slopes_gradient)
    numbers = (q.new_empty(x.shape if wanted else (0,), dtype=torch.float32) for x, wanted in asked)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *numbers


LIMITS = {
    "cpu": Limits("cpu", ranges={"head_dim": (1, 512), "value_dim": (1, 512)}),
    "triton": Limits("cuda", ranges={"head_dim": (1, 256), "value_dim": (1, 256)}, capability=(8, 0)),
}
FLASH_ATTENTION = Op(
    "flash_attention",
    LIMITS,
    check,
    "on cpu and triton a native kernel, memory linear; a second derivative by the reference's formulas in PyTorch"
    " operations: memory quadratic",
)
NATIVE_GRADIENT = ("cpu", "triton")  # the backends that have one
define(
    "flash_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? mask, Tensor? alibi_slopes,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, int left, int right, float softcap, float scale,"
    " float dropout_p) -> (Tensor, Tensor)",
    _fake,
    triton="flash_attention:forward",
)
define(
    "flash_attention_backward",
    "(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias,"
    " Tensor? mask, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, int left,"
    " int right, float softcap, float scale, float dropout_p, bool bias_gradient, bool slopes_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    triton="flash_attention_backward:backward",
)

OPS = {flash_attention: FLASH_ATTENTION}
CASES = {
    "smollm2-prompt": dict(batch=1, heads=9, kv_heads=3, rows=512, keys=512, head_dim=64, causal=True),
    "bert-base-512": dict(batch=1, heads=12, kv_heads=12, rows=512, keys=512, head_dim=64, causal=False),
    "h8-d64-512-causal": dict(batch=1, heads=8, kv_heads=8, rows=512, keys=512, head_dim=64, causal=True),
    "h16-d128-512-causal": dict(batch=1, heads=16, kv_heads=16, rows=512, keys=512, head_dim=128, causal=True),
    "h8-d64-512": dict(batch=1, heads=8, kv_heads=8, rows=512, keys=512, head_dim=64, causal=False),
    "h16-d128-1024": dict(batch=1, heads=16, kv_heads=16, rows=1024, keys=1024, head_dim=128, causal=False),
    "h8-d64-2048": dict(batch=1, heads=8, kv_heads=8, rows=2048, keys=2048, head_dim=64, causal=False),
    "h8-d128-8192": dict(batch=1, heads=8, kv_heads=8, rows=8192, keys=8192, head_dim=128, causal=False),
}


def flops(case: dict) -> int:
    """Multiplications and additions of both products, over the pairs that causal leaves."""
    rows, keys = case["rows"], case["keys"]
    pairs = sum(max(0, min(keys, i + 1 + keys - rows)) for i in range(rows)) if case["causal"] else rows * keys
    return 4 * case["batch"] * case["heads"] * pairs * case["head_dim"]


def bytes_moved(case: dict, dtype: torch.dtype) -> int:
    """q, k, v and out once."""
    rows = 2 * case["heads"] * case["rows"] + 2 * case["kv_heads"] * case["keys"]
    return case["batch"] * rows * case["head_dim"] * dtype.itemsize
