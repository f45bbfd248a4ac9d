"""Builds one CPU library per instruction set and, where asked or where CUDA is present, the CUDA library.

PYARCH_CPU_ISA   which CPU libraries to build, ';'-separated; default: all this compiler's target can have
PYARCH_CUDA      auto: if torch is a CUDA build and nvcc is found; 1: always (compile-only under a CPU torch); 0: never
PYARCH_CUDA_ARCH compute capabilities, ';'-separated; default "80;90a"
PYARCH_SANITIZE  1: AddressSanitizer and UBSan in the CPU libraries (make sanitize)
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "pyarch builds against an installed torch:\n  pip install 'torch>=2.11' && pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
X86 = {"avx512": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"], "avx2": ["-march=x86-64-v3"], "portable": []}
ISAS = X86 if platform.machine() in ("x86_64", "AMD64") else {"portable": []}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for s in suffixes for p in (ROOT / folder).glob(f"*{s}"))


def extension(name: str, files: list[str], flags: list[str], link: list[str], libraries: list[str]) -> Extension:
    lib = str(Path(torch.__file__).parent / "lib")
    includes = [str(ROOT.resolve() / "csrc/include"), *cpp_extension.include_paths()]
    ext = Extension(name, files, include_dirs=includes, library_dirs=[lib], libraries=libraries, language="c++",
                    extra_compile_args={"cxx": flags}, extra_link_args=link, py_limited_api=True)  # fmt: skip
    ext.depends = sources("csrc/include", ".h") + sources("csrc/cpu", ".h") + sources("csrc/cuda", ".h")
    return ext


def cpu_extensions() -> list[Extension]:
    sanitize = os.environ.get("PYARCH_SANITIZE") == "1"
    wanted = [i for i in os.environ.get("PYARCH_CPU_ISA", ";".join(ISAS)).split(";") if i]
    if unknown := set(wanted) - set(ISAS):
        sys.exit(f"PYARCH_CPU_ISA names {sorted(unknown)}; this machine can build {list(ISAS)}")
    common = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
              "-ffp-contract=off", "-Wall", "-Werror=return-type", "-Wno-psabi",
              "-Wno-maybe-uninitialized", "-Wno-uninitialized", TARGET]  # fmt: skip
    link = ["-Wl,-z,defs", *(SANITIZE[:1] if sanitize else ["-s"])]
    if sanitize:
        link.remove("-Wl,-z,defs")
    return [
        extension(
            f"pyarch._cpu_{isa}",
            sources("csrc/cpu", ".cpp"),
            common + ISAS[isa] + [f"-DPYARCH_ISA_{isa.upper()}"] + (SANITIZE if sanitize else []),
            link,
            ["torch_cpu"],
        )
        for isa in wanted
    ]


def cuda_home() -> Path | None:
    """The toolkit: CUDA_HOME, the usual place, or around the nvcc on PATH, if it has the headers."""
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent):
        if home and (Path(home) / "include/cuda_runtime.h").exists() and (Path(home) / "bin/nvcc").exists():
            return Path(home)
    return None


def cuda_extensions() -> list[Extension]:
    asked, home = os.environ.get("PYARCH_CUDA", "auto"), cuda_home()
    if asked not in ("auto", "0", "1"):
        sys.exit(f"PYARCH_CUDA is {asked!r}; it can be auto, 0 or 1")
    if asked == "0" or (asked == "auto" and (home is None or torch.version.cuda is None)):
        return []
    if home is None:
        sys.exit("PYARCH_CUDA=1 needs a CUDA toolkit with nvcc; CUDA_HOME can name it")
    cpp_extension.CUDA_HOME = str(home)
    archs = [a.removeprefix("sm_") for a in os.environ.get("PYARCH_CUDA_ARCH", "80;90a").split(";") if a]
    ext = extension(
        "pyarch._cuda",
        sources("csrc/cuda", ".cpp", ".cu"),
        ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-DUSE_CUDA", TARGET],
        ["-Wl,-z,defs", "-s"],
        ["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl"],
    )
    ext.extra_compile_args["nvcc"] = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
    ext.extra_compile_args["nvcc"] += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    ext.include_dirs.append(str(home / "include"))
    ext.library_dirs.append(str(home / "lib64"))
    return [ext]


def torch_cuda_stub(folder: Path) -> str:
    """A stand-in for torch's libtorch_cuda with what csrc/cuda uses of it, so that a CPU torch can link too.

    The name is what counts: where the library is loaded, torch has loaded the real one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "torch_cuda.c"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }\n")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.check_call([*command, "-o", str(folder / "libtorch_cuda.so"), str(source)])
    return str(folder)


class Build(cpp_extension.BuildExtension):
    """Gives every extension its own object folder: the CPU libraries compile the same sources with other flags."""

    def build_extension(self, ext: Extension) -> None:
        kept = self.build_temp
        self.build_temp = str(Path(kept) / ext.name)
        if "torch_cuda" in ext.libraries:
            ext.library_dirs.insert(0, torch_cuda_stub(Path(self.build_temp)))
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = kept


setup(ext_modules=cpu_extensions() + cuda_extensions(), cmdclass={"build_ext": Build},
      options={"bdist_wheel": {"py_limited_api": "cp310"}})  # fmt: skip
