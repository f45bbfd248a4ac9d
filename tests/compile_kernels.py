"""Compiles every GPU kernel for sm_80 and sm_90 without a GPU and holds what it costs against the recorded table.

    python tests/compile_kernels.py            compile and compare; exits with 1 where a kernel got dearer
    python tests/compile_kernels.py --record   compile and write tests/compile_kernels.json

Triton kernels go through their own host functions, on CPU tensors, under a driver that loads and launches nothing: what
is compiled is what a GPU would run, specialisations included. CUDA kernels are compiled by nvcc, where there is one.

A kernel fails if it spills, if its shared memory does not fit the chip, or if it needs more registers or shared memory
than the table says for this compiler, or has lost the wgmma instructions that the table counts. A compiler that the
table does not know is held to the first two.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

TABLE = Path(__file__).with_suffix(".json")
CSRC = Path(__file__).parent.parent / "csrc"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # what a block can have, by compute capability
# Registers a thread, bytes spilled a thread, bytes of shared memory a block; wgmma instructions, where there are any.
Costs = dict[str, int]


def quant_matmul_calls(arch: int) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """One call for each shape of tile that config_for knows, in each weight format whose code differs; tuned tiles in
    the one that costs most."""
    from pyarch.kernels import _tuned, quant_matmul, quant_matmul_act8, quant_matmul_dense

    n = k = 4096
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for m, bits, group, zero, dtype, act_bits in [
        *((m, bits, 128, zero, bf16, 0) for m in (1, 64, 2048) for bits in (4, 8) for zero in (None, "uint8")),
        *((m, 4, 32, "float32", bf16, 0) for m in (1, 64, 2048)),
        *((m, 8, -1, None, bf16, 0) for m in (1, 64, 2048)),
        (32, 4, 128, None, bf16, 0), (2048, 4, 128, None, fp16, 0),
        *((m, 8, -1, None, bf16, 8) for m in (1, 32, 64, 512, 4096)),
        *((m, bits, 128, "uint8", bf16, 8) for m in (1, 32, 64, 4096) for bits in (4, 8)),
        (64, 4, 32, "float32", fp16, 8), (4096, 4, -1, "float32", fp32, 8),
    ]:  # fmt: skip
        q = torch.empty((n, k * bits // 8), dtype=torch.uint8 if bits == 4 else torch.int8)
        scale = torch.empty((n, 1 if group == -1 else k // group), dtype=dtype)
        zeros = None if zero is None else torch.empty_like(scale, dtype=getattr(torch, zero))
        x, bias = torch.empty((m, k), dtype=dtype), torch.empty(n, dtype=dtype)
        label = f"m{m} int{bits} g{group} zero={zero} {dtype}{' act8' * (act_bits == 8)}".replace("torch.", "")
        arguments = (x, q, scale, zeros, None, None, bias, n, group, act_bits, 2, 0.0)
        yield label, lambda arguments=arguments: quant_matmul.forward(*arguments)
        if m == 1 and not act_bits:
            arguments = q, scale, zeros, None, k, group, dtype
            yield f"dequantise {label}", functools.partial(quant_matmul_dense.dequantise, *arguments)
    for key, config in _tuned.shipped("quant_matmul", quant_matmul.Config, arch):
        q = torch.empty((n, k // 2), dtype=torch.uint8) if "int4" in key else torch.empty((n, k), dtype=torch.int8)
        sizes = (config.block_m, k), (n, k // 128), (n, k // 128)
        x, scale, offset = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
        arguments = (x.new_empty(len(x), n), x, q, scale, None, offset, None, 128, 2, 0.0)
        one = dataclasses.replace(config, split_k=1)
        module = quant_matmul_act8 if "act8" in key else quant_matmul
        yield f"tuned {one} {key}", functools.partial(module.launch, one, *arguments)


def quant_matmul_backward_calls(arch: int) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Every config of config_for, in the formats whose code differs."""
    from pyarch.kernels import quant_matmul_backward

    n = k = 4096
    bf16, fp16 = torch.bfloat16, torch.float16
    for m, bits, group, zero, dtype in [
        *((m, bits, 128, "uint8", bf16) for m in (1, 64, 4096) for bits in (4, 8)),
        (4096, 4, 32, "float32", fp16), (64, 4, 32, None, bf16), (4096, 8, -1, None, bf16),
    ]:  # fmt: skip
        q = torch.empty((n, k * bits // 8), dtype=torch.uint8 if bits == 4 else torch.int8)
        scale = torch.empty((n, 1 if group == -1 else k // group), dtype=dtype)
        zeros = None if zero is None else torch.empty_like(scale, dtype=getattr(torch, zero))
        label = f"m{m} int{bits} g{group} zero={zero} {dtype}".replace("torch.", "")
        arguments = (torch.empty((m, n), dtype=dtype), q, scale, zeros, None, k, group)
        yield label, lambda arguments=arguments: quant_matmul_backward.backward(*arguments)


def flash_attention_calls(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every config of config_for, with the features of language models and with all that it is for together; tuned
    ones with all."""
    from pyarch.kernels import _tuned, flash_attention

    most = "packed window sinks softcap alibi"
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for d, dv, rows, dtype, features in [
        *((d, d, rows, bf16, f) for d in (64, 128, 256) for rows in (4096, 48) for f in ("causal", most)),
        *((d, d, 4096, dtype, f"{most} bias mask") for d in (64, 128, 256) for dtype in (bf16, fp32)),
        *((d, d, 4096, dtype, f"{most} bias mask") for d, dtype in ((127, bf16), (255, bf16), (255, fp32))),
        (128, 128, 4096, bf16, "bias"), (128, 128, 4096, fp16, ""), (96, 80, 4096, bf16, "causal"),
        (64, 64, 4096, fp32, "causal"), (64, 64, 4096, fp32, "causal dropout"),
        *((d, d, rows, bf16, f"{most} dropout") for d in (64, 128, 256) for rows in (4096, 48)),
        *((d, d, 4096, bf16, f"{most} bias mask dropout") for d in (64, 128, 255, 256)),
        *((d, d, 4096, fp32, f"{most} bias mask dropout") for d in (128, 255, 256)),
    ]:  # fmt: skip
        heads, keys = 8, 4096
        q, k, v = (torch.empty(1, *of, dtype=dtype) for of in ((heads, rows, d), (2, keys, d), (2, keys, dv)))
        cu = torch.empty(5, dtype=torch.int32) if "packed" in features else None
        bias, mask = (
            torch.empty(rows, keys, dtype=of).expand(1, heads, rows, keys) if name in features else None
            for name, of in (("bias", dtype), ("mask", torch.bool))
        )
        sinks, slopes = (torch.empty(heads) if name in features else None for name in ("sinks", "alibi"))
        left, right = 128 if "window" in features else -1, 0 if "window" in features or "causal" in features else -1
        numbers = left, right, 30.0 if "softcap" in features else 0.0, 0.125
        label = f"d{d} dv{dv} rows{rows} {dtype} {features.replace(' ', '+') or 'plain'}".replace("torch.", "")
        dropout_p = 0.1 if "dropout" in features else 0.0
        seed = torch.empty(1, dtype=torch.int64) if dropout_p else None
        arguments = (q, k, v, sinks, bias, mask, slopes, cu, cu, seed, *numbers, dropout_p)
        yield label, lambda arguments=arguments: flash_attention.forward(*arguments)
        for key, config in _tuned.shipped("flash_attention", flash_attention.Config, arch):
            if (key, features, dv) == (flash_attention.key_for(rows, d), most, d):
                results = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
                call = functools.partial(flash_attention.launch, config, *results, *arguments)
                yield f"tuned {config} {label}", call


def flash_attention_backward_calls(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every config of config_for, each with all that it is for together; plain ones also with causal alone, biases of
    keys and of rows alone, keys so few that delta has a pass of its own; tuned ones plain."""
    from pyarch.kernels import _tuned, flash_attention_backward

    plain = "packed window sinks"
    bent, scored = f"{plain} softcap alibi", f"{plain} softcap alibi bias mask"
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    kinds = plain, bent, f"{bent} dropout", scored, f"{scored} dropout"
    for d, keys, dtype, features in [
        *((d, 4096, bf16, f) for d in (64, 128, 256) for f in kinds),
        *((128, 4096, dtype, "causal") for dtype in (bf16, fp16)), (64, 48, bf16, "causal"),
        *((64, 4096, bf16, f"causal bias of {n}") for n in ("keys", "rows")),
        (128, 4096, fp32, scored), *((d, 4096, fp32, f"{scored} dropout") for d in (128, 256)),
    ]:  # fmt: skip
        heads, rows = 8, 4096
        q, out, k, v = (torch.empty(1, h, n, d, dtype=dtype) for h, n in 2 * [(heads, rows)] + 2 * [(2, keys)])
        lse, cu = torch.empty(1, heads, rows), torch.empty(5, dtype=torch.int32) if "packed" in features else None
        shape = 1, 1, 1 if "of keys" in features else rows, 1 if "of rows" in features else keys
        bias = torch.empty(shape) if "bias" in features else None
        mask = torch.empty(rows, keys, dtype=torch.bool).expand(1, heads, rows, keys) if "mask" in features else None
        sinks, slopes = (torch.empty(heads) if name in features else None for name in ("sinks", "alibi"))
        left, right = 128 if "window" in features else -1, 0 if "window" in features or "causal" in features else -1
        dropout_p, seed = (0.1, torch.empty(1, dtype=torch.int64)) if "dropout" in features else (0.0, None)
        numbers = left, right, 30.0 if "softcap" in features else 0.0, 0.125, dropout_p
        label = f"d{d} keys{keys} {dtype} {features.replace(' ', '+')}".replace("torch.", "")
        arguments = out, lse, out, lse, q, k, v, sinks, bias, mask, slopes, cu, cu, seed, *numbers
        wanted = bias is not None, slopes is not None
        yield label, lambda arguments=(*arguments, *wanted): flash_attention_backward.backward(*arguments)
        for key, config in _tuned.shipped("flash_attention_backward", flash_attention_backward.Config, arch):
            name = key.partition(" ")[0]
            if (key, features) == (flash_attention_backward.key_for(name, d), plain):
                of = {name: config}.get
                yield (
                    f"tuned {config} {label}",
                    functools.partial(flash_attention_backward.launch, of, *arguments, None, False),
                )


def paged_kv_calls(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Both routes in every config of config_for, pages smaller and larger than a tile, int8 caches, and the append."""
    from pyarch.kernels import paged_kv

    most = "window sinks softcap"
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for d, page_size, dtype, features in [
        *((d, 16, bf16, most) for d in (64, 128, 256)), *((d, 16, fp32, most) for d in (64, 128, 256)),
        *((d, 16, dtype, most) for d in (127, 255) for dtype in (bf16, fp32)),
        *((d, 16, bf16, f"{most} int8") for d in (64, 128, 256)),
        (128, 128, bf16, "causal"), (80, 5, fp16, most), (128, 16, bf16, "decode"),
    ]:  # fmt: skip
        batch, rows, heads, kv_heads = 4, 1 if features == "decode" else 512, 32, 8
        q, int8 = torch.empty(batch * rows, heads, d, dtype=dtype), "int8" in features
        caches = torch.empty(2, 64, page_size, kv_heads, d, dtype=torch.int8 if int8 else dtype)
        scales = torch.empty(2, 64, page_size, kv_heads) if int8 else (None, None)
        table, lens, cu = (torch.empty(shape, dtype=torch.int32) for shape in ((batch, 2048), batch, batch + 1))
        sinks = torch.empty(heads) if "sinks" in features else None
        left, softcap = 128 if "window" in features else -1, 30.0 if "softcap" in features else 0.0
        label = f"d{d} page{page_size} {dtype} {features.replace(' ', '+')}".replace("torch.", "")
        arguments = (q, *caches, table, lens, None if rows == 1 else cu, sinks, *scales, True, left, -1, softcap, 0.125)
        yield label, lambda arguments=arguments: paged_kv.forward(*arguments)
    for d, int8 in ((128, False), (80, False), (128, True)):
        k, slots = torch.empty(64, 8, d, dtype=bf16), torch.empty(64, dtype=torch.int64)
        cache, scale = torch.empty(4, 16, 8, d, dtype=torch.int8 if int8 else bf16), torch.empty(4, 16, 8)
        scales = (scale, scale) if int8 else (None, None)
        label = f"d{d} bfloat16" + " int8" * int8
        yield label, lambda a=(k, k, cache, cache, slots, *scales): paged_kv.append(*a)


TRITON = {
    "quant_matmul": quant_matmul_calls,
    "quant_matmul_backward": quant_matmul_backward_calls,
    "flash_attention": flash_attention_calls,
    "flash_attention_backward": flash_attention_backward_calls,
    "paged_kv": paged_kv_calls,
}


class NullDriver:
    """A Triton driver for a GPU that is not there: kernels are compiled and handed to `built`, then not launched."""

    def __init__(self, arch: int, built: Callable[[str, bytes, int], None]):
        def load(name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
            built(name, binary, shared)
            return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads a block can have

        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: arch  # Triton keeps its compiled kernels by device
        self.get_current_stream = lambda device: 0
        self.launcher_cls = lambda source, metadata: lambda *args: None
        self.utils = SimpleNamespace(
            load_binary=load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 1 << 30},
        )


def triton_kernels(folder: Path) -> Iterator[tuple[str, Costs]]:
    for arch in SHARED:
        built: list[tuple[str, bytes, int]] = []
        triton.runtime.driver.set_active(NullDriver(arch, lambda *kernel, to=built: to.append(kernel)))
        for op, calls in TRITON.items():
            for label, call in calls(arch):
                built.clear()
                call()
                for i, (name, binary, shared) in enumerate(built):
                    cubin = folder / "triton.cubin"
                    cubin.write_bytes(binary)
                    again = " again" * sum(other == name for other, _, _ in built[:i])  # with other constants
                    yield f"{op} {name} {label}{again} sm_{arch}", {**costs(cubin)[name], "shared": shared}


def cuda_kernels(folder: Path, nvcc: str) -> Iterator[tuple[str, Costs]]:
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        for arch in SHARED:
            cubin, target = folder / "cuda.cubin", f"{arch}a" if arch == 90 else str(arch)
            flags = ["-O3", "-std=c++17", f"-I{CSRC / 'include'}", "-cubin"]
            flags += [f"-gencode=arch=compute_{target},code=sm_{target}"]
            subprocess.run([nvcc, *flags, "-o", str(cubin), str(source)], check=True)
            for name, cost in sorted(costs(cubin).items()):
                yield f"{source.stem} {_demangled(name)} sm_{arch}", cost


def costs(binary: Path) -> dict[str, Costs]:
    """What each kernel of a cubin costs."""
    tool = triton.knobs.nvidia.cuobjdump.path
    dump = subprocess.run([tool, "--dump-resource-usage", str(binary)], capture_output=True, check=True, text=True)
    found = {}
    for name, usage in re.findall(r"Function (\S+):\n\s*(.*)", dump.stdout):
        value = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", usage)}
        # The stack holds spills, and arrays that did not fit into registers: traffic to local memory either way.
        found[name] = {"registers": value["REG"], "spills": value["STACK"] + value["LOCAL"], "shared": value["SHARED"]}
    dump = subprocess.run([tool, "--dump-sass", str(binary)], capture_output=True, check=True, text=True)
    for name, _, code in (part.partition("\n") for part in dump.stdout.split("Function : ")[1:]):
        if count := len(re.findall("[HI]GMMA\\.", code)):
            found[name.strip()]["wgmma"] = count
    return found


def _demangled(name: str) -> str:
    return subprocess.run(["c++filt", "-p", name], capture_output=True, check=True, text=True).stdout.strip()


def compile_all() -> dict[str, dict[str, Costs]]:
    """{compiler and version: {kernel and architecture: costs}}."""
    with tempfile.TemporaryDirectory() as folder:
        found = {f"triton {_version(triton.__version__)}": dict(triton_kernels(Path(folder)))}
        if nvcc := shutil.which("nvcc"):
            text = subprocess.run([nvcc, "--version"], capture_output=True, check=True, text=True).stdout
            found[f"nvcc {_version(text.split('release ')[1])}"] = dict(cuda_kernels(Path(folder), nvcc))
    return found


def _version(text: str) -> str:
    return ".".join(re.findall(r"\d+", text)[:2])


def faults(found: dict[str, dict[str, Costs]], table: dict[str, dict[str, Costs]]) -> list[str]:
    """What is wrong with what was compiled, one line each."""
    wrong = []
    for compiler, kernels in found.items():
        recorded = table.get(compiler)
        for kernel, cost in kernels.items():
            arch = int(kernel.rpartition("sm_")[2])
            if cost["spills"]:
                wrong.append(f"{kernel} ({compiler}): spills {cost['spills']} bytes")
            if cost["shared"] > SHARED[arch]:
                wrong.append(f"{kernel} ({compiler}): {cost['shared']} bytes of shared memory do not fit sm_{arch}")
            if recorded is not None and kernel not in recorded:
                wrong.append(f"{kernel} ({compiler}): not in {TABLE.name}; --record adds it")
            for what in ("registers", "shared") if recorded and kernel in recorded else ():
                if cost[what] > recorded[kernel][what]:
                    wrong.append(f"{kernel} ({compiler}): {what} {cost[what]}, recorded {recorded[kernel][what]}")
            if recorded and "wgmma" in recorded.get(kernel, ()) and "wgmma" not in cost:
                wrong.append(f"{kernel} ({compiler}): wgmma is lost, recorded {recorded[kernel]['wgmma']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles every GPU kernel and compares its costs with the table.")
    parser.add_argument("--record", action="store_true", help=f"write {TABLE.name} instead of comparing")
    record = parser.parse_args().record
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    found = compile_all()
    for compiler, kernels in found.items():
        known = "" if compiler in table or record else f", which {TABLE.name} does not know: spills and size only"
        print(f"{compiler}: {len(kernels)} kernels{known}")
        for kernel, cost in kernels.items():
            print(f"  {kernel}: " + ", ".join(f"{value} {what}" for what, value in cost.items()))
    wrong = faults(found, {} if record else table)
    print(*wrong, sep="\n")
    if record and not wrong:
        TABLE.write_text(json.dumps({**table, **found}, indent=1, sort_keys=True) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
