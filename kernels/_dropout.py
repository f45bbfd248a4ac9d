"""Dropout of attention's weights, as pyarch/ops/_dropout.py defines it: Philox of the seed and a weight's place.

A call serves eight of a row's 32 keys: those that one thread holds in the accumulators of mma and of wgmma,

    keys 0 1 | 2 3 | 4 5 | 6 7   8 9 | ...        thread t of four: 2 t and 2 t + 1, and these + 8, + 16, + 24
          t=0   1     2     3     0

so that a tile of scores gets its bits where they are used: no exchange between threads.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def kept(seed, threshold, sequence, h, rows, start, BN: tl.constexpr):
    """int1 [BM, BN]: which weights of a tile are kept. seed: int64; sequence, h, rows [BM] and start: int32.

    The keys begin at start, a multiple of BN, which is a power of two and at least 16.
    """
    BM: tl.constexpr = rows.shape[0]
    CALLS: tl.constexpr = max(4, BN // 8)
    call = start // 32 * 4 + tl.arange(0, CALLS)
    w0, w1, w2, w3 = tl.philox(seed, call[None, :], rows[:, None], h, sequence, n_rounds=7)  # [BM, CALLS]
    if BN == 16:  # half of a call's keys
        second = start % 32 != 0
        words = tl.join(tl.where(second, w2, w0), tl.where(second, w3, w1))  # [BM, thread, word]
        words = tl.permute(words, (0, 2, 1)).reshape(BM, BN // 2)
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BM, CALLS, word // 2, word % 2]
        words = tl.permute(words.reshape(BM, BN // 32, 4, 2, 2), (0, 1, 3, 4, 2)).reshape(BM, BN // 2)
    least = threshold.to(tl.uint32) << 16
    return tl.join((words << 16) >= least, words >= least).reshape(BM, BN)


def numbers(seed, dropout_p: float, q: torch.Tensor) -> tuple:
    """(seed, threshold, factor of what is kept) as kernels take them; q in the place of a seed that is not used.

    The operator is open to anyone: refuses what would read outside a tensor or is no probability.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: must be at least 0 and below 1, not {dropout_p}")
    if seed is None and dropout_p > 0:
        raise ValueError("seed: dropout needs it")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device):
        found = f"{tuple(seed.shape)} {seed.dtype} on {seed.device}"
        raise ValueError(f"seed: must be one int64 element on {q.device}, not {found}")
    return q if dropout_p == 0 else seed, min(round(dropout_p * 65536), 65535), 1 / (1 - dropout_p)
