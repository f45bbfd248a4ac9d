"""What a person installs: a source archive that builds from itself, and a wheel that runs from any folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pyarch import arch, native

ROOT = Path(__file__).resolve().parent.parent
TUNED = "kernels/tuned/some-card.json"  # configs of a card, of which there need not be any yet
RUN = """
import pathlib, sys, torch, pyarch
assert pathlib.Path(pyarch.__file__).is_relative_to(sys.argv[1]), pyarch.__file__
print(pyarch.native.cpu_isa, pyarch.rms_norm(torch.ones(1, 4), torch.ones(4), backend="cpu").tolist())
"""


def run(*command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def repository(*paths: str) -> set[str]:
    """The files of the repository as they are now, new ones too."""
    return set(filter(None, run("git", "ls-files", "-zco", "--exclude-standard", *paths, cwd=ROOT).split("\0")))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The source archive, made from a copy of the repository, unpacked."""
    pytest.importorskip("build")
    if not (ROOT / ".git").exists():
        pytest.skip("makes the archive from a git checkout")
    folder = tmp_path_factory.mktemp("sdist")
    for name in repository():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "tree" / name, follow_symlinks=False)
    (folder / "tree" / TUNED).parent.mkdir(exist_ok=True)
    (folder / "tree" / TUNED).write_text("{}")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", str(folder), ".", cwd=folder / "tree")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as tar:
        tar.extractall(folder, filter="data")
    return next(p for p in folder.iterdir() if p.is_dir() and p.name.startswith("pyarch"))


def test_source_archive_holds_the_sources(archive):
    held = {str(p.relative_to(archive)) for p in archive.rglob("*") if p.is_file()}
    assert repository("csrc", "kernels", "tests", "pyarch") - {"pyarch/kernels"} <= held
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"} <= held
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_from_the_source_archive_runs_from_a_folder(archive, tmp_path):
    isa = arch.cpu_isas()[0]  # one library: the others compile the same sources, and make build has done so
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", str(tmp_path), ".", cwd=archive,
        PYARCH_CPU_ISA=isa, PYARCH_CUDA="0")  # fmt: skip
    wheel = next(tmp_path.glob("*.whl"))
    assert "-cp310-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as z:
        held = set(z.namelist())
        z.extractall(tmp_path / "installed")
    assert f"pyarch/_cpu_{isa}.abi3.so" in held
    assert {f"pyarch/{name}" for name in (*repository("kernels"), TUNED)} <= held
    tops = {name.split("/")[0] for name in held}
    assert tops == {"pyarch", next(n for n in tops if n.endswith(".dist-info"))}, "nothing beside pyarch is installed"
    folder = str(tmp_path / "installed")
    out = run(sys.executable, "-c", RUN, folder, cwd=tmp_path, PYTHONPATH=folder)
    assert out.startswith(f"{isa} [[0.99")
    assert native.cpu_isa is not None
