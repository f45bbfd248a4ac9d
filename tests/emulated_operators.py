"""The CUDA operators on CPU tensors: bindings and kernels built with the emulator (test_emulator.py runs this).

    python tests/emulated_operators.py LIBRARY

In a process of its own, since the library registers pyarch::kv_append__cuda for CPU tensors. Right calls must be right;
hostile ones must raise before the kernel starts, or touch nothing but their arguments.
"""

import ctypes
import sys

import torch
from test_emulator import LAYOUTS, case

import pyarch
from pyarch._instruments import Guarded
from pyarch.testing import _hostile


def main(path: str) -> None:
    torch.ops.load_library(path)
    emulator = ctypes.CDLL(path)
    emulator.pyarch_emu_allow.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    operator = torch.ops.pyarch.kv_append__cuda.default

    def call(*arguments) -> str | None:
        emulator.pyarch_emu_forget()
        for t in arguments:
            memory = t.untyped_storage()
            emulator.pyarch_emu_allow(memory.data_ptr(), memory.nbytes())
        try:
            operator(*arguments)
        except Exception as error:
            return str(error)
        return None

    refused = ran = 0
    for layout in LAYOUTS:
        arguments = case(layout, torch.bfloat16)
        k, v, k_cache, v_cache, slots = arguments
        want = [k_cache.clone(), v_cache.clone()]
        pyarch.ops.paged_kv.kv_append_reference(k, v, *want, slots)
        assert call(*arguments) is None
        assert torch.equal(k_cache, want[0])
        assert torch.equal(v_cache, want[1])
        for what, i, value in _hostile(arguments):
            guarded = Guarded({str(j): value if j == i else a for j, a in enumerate(arguments)})
            error = call(*guarded.named.values())
            assert "CUDA: access" not in (error or ""), f"{layout}, argument {i} {what}: {error}"
            guarded.check(f"{layout}, argument {i} {what}")
            refused, ran = refused + (error is not None), ran + (error is None)
    print(f"{refused} hostile calls refused, {ran} ran within their arguments")
    assert refused > ran > 0


if __name__ == "__main__":
    main(sys.argv[1])
