"""flash_attention in Triton, gradients: of everything that the forward takes (pyarch/ops/flash_attention.py).

Scores are computed again. With p = 2^(s - lse) and dp = d_out @ v.T, both fp32,

    delta = the sum of p * dp over a row, less d_lse        ds = p * (dp - delta)
    d_q = scale * ds @ k      d_k = scale * ds.T @ q      d_v = p.T @ d_out      d_bias = ds
    d_slope = -the sum of ds * distance                   d_sink = -the sum of 2^(sink - lse) * delta

in three kernels, of which each owns what it writes, so that results have the same bits on every run:

    rows    BM rows of a head, walking over the keys that they see: delta, d_q, and sums over the keys of a row
    keys    BN keys of a key head, walking over its group's heads and the rows that see them: d_k, d_v; its tiles are
            transposed, [keys, rows]
    scores  BM rows and BN keys of a bias, walking over the batches and heads that share it: d_bias; the keys alone and
            walking over rows too where it has none. Two products more; a bias without keys is summed by rows

The sum of p * dp is d_out . out, whose out is rounded to the inputs' dtype. Where a 16-bit call returns a gradient with
more digits than that (of an fp32 bias, of slopes), and where keys are so few that errors do not average, rows runs once
more before, for delta from p and dp themselves.

lse is a fp32 number, of which half a unit in the last place moves all p of a row alike. In fp32, where that is more
than the products' error, rows also sums p, the sink's too, which should give 1: what it gives divides p of the row in
every kernel. Dropout keeps the weights that the forward kept (_dropout.py): dp and the p of d_v are 0 for the others
and 1 / (1 - dropout_p) times as large for these.

Memory besides the results, fp32: (B, H, Sq) for delta, for the sums of p, for slopes, for sinks and for a bias without
keys, where there are such; for another bias some MiB where it is so small that batches and heads are divided among
programs. Torch sums these, in a fixed order. Tensors whose rows cannot be read in vectors of 16 bytes are copied.
Tiles, edges and packed sequences are as in the forward; gradients are NaN where cu_seqlens do not rise from 0 to the
end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton

from pyarch._copies import copied
from pyarch.kernels import _attention as host
from pyarch.kernels._attention import L2_BYTES, LOG2E
from pyarch.kernels._common import capability, on_device_of
from pyarch.kernels._dropout import numbers
from pyarch.kernels._flash_attention_backward import keys_kernel, rows_kernel
from pyarch.kernels._flash_attention_bias import scores_kernel, sequences_kernel
from pyarch.kernels._tuned import tuned

FEW_KEYS = 64
PROGRAMS = 1024  # of the kernel "scores" at least, if a bias has so many sharers


@dataclass(frozen=True)
class Config:
    """One way to cut the work of one kernel."""

    block_m: int  # rows
    block_n: int  # keys
    block_d: int  # of the head size in a dot at most
    num_warps: int
    num_stages: int


# (rows, keys) of a 16-bit tile by architecture, kernel and head size, for calls that are
#   plain,    with softcap or ALiBi, with dropout, with bias or mask, with these and dropout
TILES = {
    90: {
        ("rows", 64): ((128, 64), (128, 64), (128, 64), (64, 16), (64, 16)),
        ("rows", 128): ((128, 64), (128, 32), (128, 32), (64, 16), (32, 16)),
        ("rows", 256): ((128, 32), (128, 16), (128, 16), (32, 16), (16, 32)),
        ("keys", 64): ((64, 128), (32, 128), (32, 128), (16, 128), (16, 128)),
        ("keys", 128): ((32, 128), (32, 128), (16, 128), (32, 32), (16, 16)),
        ("keys", 256): ((32, 32), (32, 32), (32, 32), (16, 32), (16, 16)),
        ("scores", 64): ((64, 64),) * 4 + ((32, 32),),
        ("scores", 128): ((64, 32),) * 4 + ((32, 32),),
        ("scores", 256): ((32, 16),) * 5,
    },
    80: {
        ("rows", 64): ((128, 64), (128, 64), (64, 32), (64, 16), (64, 16)),
        ("rows", 128): ((64, 64), (64, 64), (64, 16), (64, 16), (32, 16)),
        ("rows", 256): ((64, 16), (64, 16), (64, 16), (32, 16), (16, 16)),
        ("keys", 64): ((64, 128), (32, 128), (32, 32), (16, 32), (32, 32)),
        ("keys", 128): ((64, 64), (64, 64), (32, 32), (32, 32), (16, 32)),
        ("keys", 256): ((16, 64), (16, 32), (16, 32), (16, 32), (16, 32)),
        ("scores", 64): ((32, 32),) * 5,
        ("scores", 128): ((32, 32),) * 5,
        ("scores", 256): ((32, 16),) * 5,
    },
}


def key_for(kernel: str, size: int) -> str:
    """What plain calls in 16 bits share a tuned config."""
    return f"{kernel} d{size}"


def config_for(
    kernel: str, size: int, dtype: torch.dtype, arch: int, bent: bool = False, scored: bool = False,
    dropout: bool = False,
) -> Config:  # fmt: skip
    """The config of a kernel ("rows", "keys" or "scores"), as tuned on this card; size: the larger head size, padded.

    bent: with softcap or ALiBi. scored: with bias or mask, which are loaded into registers.
    """
    plain = dtype != torch.float32 and not (bent or scored or dropout)
    found = tuned("flash_attention_backward", key_for(kernel, size), Config) if plain else None
    return found or default_for(kernel, size, dtype, arch, bent, scored, dropout)


def default_for(
    kernel: str, size: int, dtype: torch.dtype, arch: int, bent: bool = False, scored: bool = False,
    dropout: bool = False,
) -> Config:  # fmt: skip
    """The largest tiles looked at that no feature makes spill (tests/compile_kernels.py). None is measured yet."""
    if dtype == torch.float32:  # of multiply-adds, whose operands lie in registers, 32 of the head size at a time
        if kernel == "rows":
            return Config(16, 16, 32, 8, 2)
        if kernel == "scores":
            return Config(32, 16, 32, 4, 1)
        return Config(16, 16, 32, 8, 1) if size == 256 else Config(16 if dropout else 32, 32, 32, 8, 2)
    kind = 3 + dropout if scored else 2 if dropout else int(bent)
    m, n = TILES[90 if arch >= 90 else 80][kernel, max(64, size)][kind]
    return Config(m, n, size, 8, 1 if kernel == "scores" and size == 256 else 2)


def backward(
    d_out, d_lse, out, lse, q, k, v, sinks, bias, mask, slopes, cu_q, cu_k, seed,
    left, right, softcap, scale, dropout_p, bias_gradient, slopes_gradient,
):  # fmt: skip
    """pyarch::flash_attention_backward__triton: (d_q, d_k, d_v) like q, k, v, and (d_sinks, d_bias, d_slopes) fp32,
    empty where there is none or it is not asked for. bias: 4-dimensional, and its gradient has its shape."""
    given = None if bias is None else tuple(bias.shape)
    if given is not None:
        if len(given) != 4 or any(n not in (1, m) for n, m in zip(given, (*q.shape[:3], *k.shape[2:3]), strict=False)):
            raise ValueError(f"bias: must have 4 dimensions and broadcast to (B, H, Sq, Sk), not shape {given}")
        bias = bias.expand(*q.shape[:3], k.shape[2])
    host.check_memory(q, k, v, sinks, bias, mask, slopes, cu_q, cu_k)
    _check_results(d_out, d_lse, out, lse, q, v)
    if (bias_gradient and bias is None) or (slopes_gradient and slopes is None):
        raise ValueError(f"{'bias' if bias is None else 'alibi_slopes'}: its gradient needs it")
    with on_device_of(q):
        d, dv = q.shape[3], v.shape[3]
        q, k, v, out, d_out = map(_whole, (q, k, v, out, d_out))
        size = host.padded(max(q.shape[3], v.shape[3]))
        bent, scored = slopes is not None or softcap > 0, bias is not None or mask is not None
        facts = size, q.dtype, capability(), bent, scored, dropout_p > 0
        tensors = (d_out, d_lse, out, lse, q, k, v, sinks, bias, mask, slopes, cu_q, cu_k, seed)
        options = left, right, softcap, scale, dropout_p, given if bias_gradient else None, slopes_gradient
        found = launch(lambda kernel: config_for(kernel, *facts), *tensors, *options)
        return *(x[..., :n].contiguous() for x, n in zip(found, (d, d, dv), strict=False)), *found[3:]


def _whole(x: torch.Tensor) -> torch.Tensor:
    """x, or, where its rows cannot be read in vectors of 16 bytes, a copy (pyarch.copies) with zeros at their ends."""
    return x if host.whole(x) else copied(F.pad(x, (0, -x.shape[3] % (16 // x.element_size()))).contiguous())


def launch(
    config: Callable[[str], Config | None], d_out, d_lse, out, lse, q, k, v, sinks, bias, mask, slopes,
    cu_q, cu_k, seed, left, right, softcap, scale, dropout_p, bias_shape, slopes_gradient,
):  # fmt: skip
    """The gradients with the given config of each kernel, on the current GPU; a kernel without one is left out, and its
    results with it. bias: expanded; bias_shape: as it was, if its gradient is wanted."""
    (batch, heads, rows, d), (_, kv_heads, keys, dv) = q.shape, v.shape
    dropout = numbers(seed, dropout_p, q)
    empty = lambda *shape: q.new_empty(shape, dtype=torch.float32)
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = empty(batch, heads, rows)
    norm = empty(batch, heads, rows) if q.dtype == torch.float32 else delta
    row_sinks, row_slopes, row_bias = (
        empty(batch, heads, rows) if wanted else delta
        for wanted in (sinks is not None, slopes_gradient, bias_shape and bias_shape[3] == 1)
    )
    out = out.contiguous()
    left, right = host.window_of(left, right, rows, keys)
    tensors = host.operands(q, k, v, sinks, bias, mask, slopes, cu_q, cu_k)
    features = host.constants(q, v, sinks, bias, mask, slopes, cu_q, left, right, softcap)
    features |= dict(DROPOUT=dropout_p > 0)
    sequences, group = 0 if cu_q is None else len(cu_q) - 1, heads // max(kv_heads, 1)
    sides = max(left, 0), max(right, 0)
    factors = scale / softcap if softcap > 0 else scale * LOG2E.value, softcap * LOG2E.value
    row_bytes = (d + dv) * q.element_size()

    def constants(cut: Config) -> dict:
        blocks = dict(BM=cut.block_m, BN=cut.block_n, BD=min(cut.block_d, features["DP"]))
        blocks["BDV"] = min(cut.block_d, features["DVP"])
        return features | blocks | dict(num_warps=cut.num_warps, num_stages=cut.num_stages)

    def tiles(n: int, block: int) -> int:
        return triton.cdiv(n, block) if cu_q is None else n // block + sequences

    if delta.numel() and (cut := config("rows")):
        n, share = tiles(rows, cut.block_m), max(1, L2_BYTES // max(1, keys * row_bytes)) * group
        exact = q.element_size() == 2 and (slopes_gradient or (bias_shape and bias.dtype == torch.float32))
        exact = exact or (keys <= FEW_KEYS and cu_q is None)
        for step in (1, 2) if exact else (0,):
            rows_kernel[(n * batch * heads,)](
                d_q, delta, norm, row_sinks, row_slopes, row_bias, out, lse, d_lse, d_out, *tensors, *d_out.stride(),
                batch * heads, heads, group, rows, keys, sequences, n, min(share, batch * heads), *sides, *factors,
                scale, *dropout, STEP=step, SUM=row_bias is not delta, SUM_SLOPES=slopes_gradient, **constants(cut),
            )  # fmt: skip
    if d_k.numel() and (cut := config("keys")):
        n, share = tiles(keys, cut.block_n), max(1, L2_BYTES // max(1, rows * row_bytes * group))
        keys_kernel[(n * batch * kv_heads,)](
            d_k, d_v, lse, delta, norm, d_out, *tensors, *d_out.stride(),
            batch * kv_heads, heads, group, rows, keys, sequences, n, min(share, batch * kv_heads),
            *sides, *factors, scale, *dropout, **constants(cut),
        )  # fmt: skip
    d_bias = empty(0)
    if row_bias is not delta:
        d_bias = row_bias[..., None].sum_to_size(bias_shape)
    elif bias_shape:
        cut, collapse = config("scores"), bias_shape[2] == 1
        n, columns = (tiles(keys, cut.block_n), 1) if collapse else (tiles(rows, cut.block_m), -(-keys // cut.block_n))
        shared_h = heads if bias_shape[1] == 1 else 1
        shared = shared_h * (batch if bias_shape[0] == 1 else 1)
        programs = n * columns * bias_shape[0] * bias_shape[1]
        part = triton.cdiv(shared, max(1, min(shared, PROGRAMS // max(programs, 1))))
        parts = triton.cdiv(shared, part)
        make = torch.empty if cu_q is None else torch.zeros  # packed, most pairs belong to no sequence
        d_bias = make((parts, *bias_shape), dtype=torch.float32, device=q.device)
        if d_bias.numel():
            scores_kernel[(programs * parts,)](
                d_bias, lse, delta, norm, d_out, *tensors, *d_out.stride(),
                heads, group, rows, keys, sequences, n, columns, *bias_shape[:2], shared_h, shared, part,
                *sides, *factors, *dropout, COLLAPSE=collapse, **constants(cut),
            )  # fmt: skip
        d_bias = d_bias[0] if parts == 1 else d_bias.sum(0)
    d_slopes = empty(0)
    if slopes_gradient:
        if cu_q is None or slopes.dim() == 1:
            d_slopes = row_slopes.sum(2).sum_to_size(slopes.shape)
        else:
            d_slopes = empty(*slopes.shape)
            if d_slopes.numel():
                sequences_kernel[(d_slopes.numel(),)](
                    d_slopes, row_slopes, cu_q, cu_k, heads, rows, keys, sequences, BLOCK=1024
                )
    return d_q, d_k, d_v, empty(0) if sinks is None else row_sinks.sum((0, 2)), d_bias, d_slopes


def _check_results(d_out, d_lse, out, lse, q, v):
    shape = (*q.shape[:3], v.shape[3])
    for name, x, of, dtype in (
        ("d_out", d_out, shape, q.dtype), ("out", out, shape, q.dtype),
        ("d_lse", d_lse, shape[:3], torch.float32), ("lse", lse, shape[:3], torch.float32),
    ):  # fmt: skip
        if tuple(x.shape) != of or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"{name}: must be {of} {dtype} on {q.device}, not {tuple(x.shape)} {x.dtype} on {x.device}"
            )
        if len(of) == 3 and not x.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
