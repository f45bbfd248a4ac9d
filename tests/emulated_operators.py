"""The CUDA operators on CPU tensors: bindings and kernels built with the emulator (test_emulator.py runs this).

    python tests/emulated_operators.py LIBRARY

In a process of its own, since the library registers pyarch's CUDA operators for CPU tensors. Right calls must be right;
hostile ones must raise before the kernel starts, or touch nothing but their arguments.
"""

import ctypes
import sys

import torch
from paged_caches import paged, rounded, starts
from quantized_weights import weight
from test_emulator import LAYOUTS, case

from pyarch._instruments import Guarded, same
from pyarch.ops.paged_kv import kv_append_reference
from pyarch.testing import _hostile


class Emulator:
    """Calls operators of the library; kernels may touch the call's tensors and what the operator allocates."""

    def __init__(self, path: str):
        torch.ops.load_library(path)
        self.library = ctypes.CDLL(path)
        self.library.pyarch_emu_seed.argtypes = [ctypes.c_uint64]
        self.library.pyarch_emu_allow.argtypes = [ctypes.c_void_p, ctypes.c_uint64]

    def __call__(self, name: str, *arguments, seed: int = 1):
        self.library.pyarch_emu_forget()
        self.library.pyarch_emu_seed(seed)
        for t in arguments:
            if isinstance(t, torch.Tensor):
                memory = t.untyped_storage()
                self.library.pyarch_emu_allow(memory.data_ptr(), memory.nbytes())
        return getattr(torch.ops.pyarch, f"{name}__cuda").default(*arguments)


def hostile(emulator: Emulator, name: str, what: str, arguments: tuple) -> tuple[int, int]:
    """(calls refused, calls that ran) of those with one argument replaced."""
    refused = ran = 0
    for change, i, value in _hostile(arguments):
        guarded = Guarded({str(j): value if j == i else a for j, a in enumerate(arguments)})
        error = None
        try:
            emulator(name, *guarded.named.values())
            ran += 1
        except Exception as e:
            error, refused = str(e), refused + 1
        assert "CUDA: access" not in (error or ""), f"{name}, {what}, argument {i} {change}: {error}"
        guarded.check(f"{name}, {what}, argument {i} {change}")
    return refused, ran


def appends(emulator: Emulator):
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for layout in LAYOUTS:
            k, v, *caches, slots = case(layout, dtype)
            if dtype == torch.bfloat16:
                arguments = (k, v, *caches, slots, None, None)
                yield layout, appended(emulator, arguments)
            (k_cache, v_cache), scales = rounded(caches)
            for x in (k, v):  # all zero; not numbers; the smallest numbers; ties
                x[0], x[1, 0, 3], x[1, 1, 5] = 0, torch.nan, -torch.inf
                x[2] = 3e-45 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal
                x[3, 0, :8] = torch.tensor([127, 0.5, 1.5, -2.5, -127, 126.5, -0.5, 3]).to(dtype)
            arguments = (k, v, k_cache, v_cache, slots.clamp(min=-1), *scales.values())
            yield f"int8 {layout}", appended(emulator, arguments)


def appended(emulator: Emulator, arguments: tuple) -> tuple:
    k, v, *caches, slots, k_scale, v_scale = arguments
    want = [None if t is None else t.clone() for t in (*caches, k_scale, v_scale)]
    kv_append_reference(k, v, *want[:2], slots, k_scale=want[2], v_scale=want[3])
    emulator("kv_append", *arguments)
    assert all(w is None or same(g, w) for g, w in zip((*caches, k_scale, v_scale), want, strict=True))
    return arguments


def attentions(emulator: Emulator):
    """Right ones are emulated_attention.py's."""
    for dtype, rows, int8 in (
        (torch.bfloat16, None, False),
        (torch.float32, [2, 0, 3], False),
        (torch.bfloat16, [2, 0, 3], True),
    ):
        caches, _ = paged([260, 3, 20], 16, 1, 16, dtype)
        caches, scales = rounded(caches) if int8 else (caches, {"k_scale": None, "v_scale": None})
        q = torch.randn(3 if rows is None else sum(rows), 3, 16).to(dtype)
        sinks = None if rows is None else torch.randn(3)
        cu = None if rows is None else starts(rows)
        yield f"{dtype}, int8 {int8}", (q, *caches, cu, sinks, *scales.values(), True, 10, -1, 2.0, 0.2)


def matmuls(emulator: Emulator):
    """Right ones are emulated_quant_matmul.py's."""
    for m, options in ((3, {"kind": "zero"}), (18, {"bits": 8, "kind": "offset", "group_size": 64}), (1, {})):
        w = weight(37, 100, **options).prepack("fragments")
        x, bias = torch.randn(m, 100).half(), torch.randn(37)
        yield f"{options}", (x, w.q, w.scale, w.zero, w.offset, None, bias, 37, w.group_size, 0, 2, 0.0)


def main(path: str) -> None:
    emulator = Emulator(path)
    ops = {"kv_append": appends, "paged_attention": attentions, "quant_matmul": matmuls}
    for name, calls in ((name, calls(emulator)) for name, calls in ops.items()):
        counts = torch.tensor([hostile(emulator, name, what, arguments) for what, arguments in calls]).sum(0)
        refused, ran = counts.tolist()
        print(f"{name}: {refused} hostile calls refused, {ran} ran within their arguments")
        assert refused > ran > 0


if __name__ == "__main__":
    main(sys.argv[1])
