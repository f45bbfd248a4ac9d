"""The CUDA operators on CPU tensors: bindings and kernels built with the emulator (test_emulator.py runs this).

    python tests/emulated_operators.py LIBRARY

In a process of its own, since the library registers pyarch's CUDA operators for CPU tensors. Right calls must be right;
hostile ones must raise before the kernel starts, or touch nothing but their arguments.
"""

import ctypes
import sys

import torch
from paged_caches import paged, starts
from test_emulator import LAYOUTS, case

import pyarch
from pyarch._instruments import Guarded
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
    for layout in LAYOUTS:
        arguments = (*case(layout, torch.bfloat16), None, None)
        k, v, k_cache, v_cache, slots = arguments[:5]
        want = [k_cache.clone(), v_cache.clone()]
        pyarch.ops.paged_kv.kv_append_reference(k, v, *want, slots)
        emulator("kv_append", *arguments)
        assert torch.equal(k_cache, want[0])
        assert torch.equal(v_cache, want[1])
        yield layout, arguments


def attentions(emulator: Emulator):
    """Right ones are emulated_attention.py's."""
    for dtype, rows in ((torch.bfloat16, None), (torch.float32, [2, 0, 3])):
        caches, _ = paged([260, 3, 20], 16, 1, 16, dtype)
        q = torch.randn(3 if rows is None else sum(rows), 3, 16).to(dtype)
        sinks = None if rows is None else torch.randn(3)
        cu = None if rows is None else starts(rows)
        yield f"{dtype}", (q, *caches, cu, sinks, None, None, True, 10, -1, 2.0, 0.2)


def main(path: str) -> None:
    emulator = Emulator(path)
    for name, calls in (("kv_append", appends(emulator)), ("paged_attention", attentions(emulator))):
        counts = torch.tensor([hostile(emulator, name, what, arguments) for what, arguments in calls]).sum(0)
        refused, ran = counts.tolist()
        print(f"{name}: {refused} hostile calls refused, {ran} ran within their arguments")
        assert refused > ran > 0


if __name__ == "__main__":
    main(sys.argv[1])
