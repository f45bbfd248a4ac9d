"""The house rules that a program can check: the import line, sizes, switches, what an import costs."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyarch import arch

ROOT = Path(__file__).resolve().parent.parent

# Nothing imports from its right. A module or folder of pyarch that is not here has no place yet: give it one.
LINE = [
    {"arch", "allocator", "_copies"},
    {"orders"},
    {"quantized"},
    {"kernels"},
    {"native"},
    {"dispatch"},
    {"ops"},
    {"nn"},
    {"io"},
    {"models"},
    {"explain", "accelerate"},
    {"_instruments"},
    {"testing"},
    {"cli"},
    {"__main__", "__init__"},
]
PLACE = {name: place for place, names in enumerate(LINE) for name in names}
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")


def tracked() -> list[Path]:
    """The repository's files: git's list, or in a source archive everything that is not built."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0:
        files = [ROOT / name for name in git.stdout.split("\0") if name]
    else:
        files = [p for p in ROOT.rglob("*") if not {"build", "dist", ".cache", ".venv"} & set(p.parts)]
    return [p for p in files if p.is_file() and not p.is_symlink()]


FILES = tracked()
PYTHON = [p for p in FILES if p.suffix == ".py"]
PACKAGE = [p for p in PYTHON if p.relative_to(ROOT).parts[0] in ("pyarch", "kernels")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(path: Path) -> list[str]:
    """The parts of the module's name: kernels/ is imported as pyarch.kernels."""
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    return ["pyarch", *parts] if parts[0] == "kernels" else parts


def imported(path: Path) -> set[str]:
    """What of pyarch a file imports, anywhere in it, as the name under pyarch: 'ops', 'native'."""
    package, found = module(path)[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {parts[1] for parts in names if parts[0] == "pyarch" and len(parts) > 1}
    return found


def top(path: Path) -> str:
    return module(path)[1]


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_import_line(path):
    here = top(path)
    assert here in PLACE, f"{here} has no place in the import line"
    wrong = {other for other in imported(path) if other in PLACE and PLACE[other] > PLACE[here]}
    assert not wrong, f"{here} imports {sorted(wrong)}, to its right"


def test_the_import_line_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "pyarch").mkdir()
    path = tmp_path / "pyarch/arch.py"
    for text in (
        "from .ops import x",
        "from . import ops",
        "import pyarch.ops",
        "def f():\n    from pyarch import ops",
    ):
        path.write_text(text)
        with pytest.raises(AssertionError, match="to its right"):
            test_import_line(path)


@pytest.mark.parametrize("path", [p for p in PACKAGE if top(p) == "models"], ids=name)
def test_models_stand_on_nn_and_io(path):
    assert imported(path) <= {"models", "nn", "io", "quantized"}, "a model imports modules, not ops or backends"
    assert not re.search(r"backend=['\"]", path.read_text()), "a model names no backend"


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix in SOURCES], ids=name)
def test_sources_are_short(path):
    limit = 150 if name(path) == "pyarch/dispatch.py" else 399
    assert len(path.read_text().splitlines()) <= limit


def test_documents_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for decision in (ROOT / "docs/decisions").glob("*.md"):
        assert len(decision.read_text().splitlines()) <= 40, decision.name
        assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", decision.name)


def environment(path: Path) -> set[str]:
    """Names of environment variables that a file reads, or '?' for one that is not a literal."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb", "putenv"):
            found.add("?")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^(?:PYARCH|TRITON)_[A-Z_]+$", node.value))
    return found


def test_environment_switches_are_few_and_in_one_place():
    readers = {name(p) for p in PACKAGE if "?" in environment(p)}
    assert readers <= {"pyarch/arch.py"}, "only arch.py reads the environment"
    assert not [name(p) for p in FILES if p.suffix in SOURCES[1:] and "getenv" in p.read_text()]
    switches = (environment(ROOT / "pyarch/arch.py") | environment(ROOT / "setup.py")) - {"?"}
    documented = set(re.findall(r"^  ([A-Z_]+) ", arch.__doc__, re.MULTILINE))
    assert switches <= documented, "arch.py's text lists all switches, those of the build in setup.py too"
    assert len(switches) < 6


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels/__init__.py").exists()
    link = ROOT / "pyarch/kernels"
    assert link.resolve() == ROOT / "kernels" or not link.is_symlink()


def test_no_machine_and_no_registry_is_named():
    banned = re.compile(
        r"/(?:work|root|home/\w+)/|/tmp/\w|(?:pypi|pythonhosted|npmjs|download\.pytorch|deb\.debian)\.(?:org|com)"
    )
    for path in FILES:
        found = banned.search(path.read_bytes().decode(errors="ignore")) if path.stat().st_size < 2**20 else None
        assert not found, f"{name(path)} names {found.group()!r}"


PROBE = """
import json, sys, time, torch
modules, state = set(sys.modules), (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
start = time.process_time()
import pyarch
took = time.process_time() - start
for name in sys.argv[1:]:
    __import__(name)
same = state == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
print(json.dumps([took, sorted({m.partition(".")[0] for m in set(sys.modules) - modules}), same]))
"""


def probe(*more):
    done = subprocess.run([sys.executable, "-c", PROBE, *more], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_quick_and_has_no_side_effect():
    runs = [probe() for _ in range(3)]
    assert min(took for took, _, _ in runs) < 0.1
    assert all(same for _, _, same in runs)


def test_every_module_imports_with_torch_alone():
    names = [".".join(module(p)).removesuffix(".__init__") for p in PACKAGE if top(p) not in ("kernels", "__main__")]
    _, new, _ = probe(*names)
    foreign = set(new) - set(sys.stdlib_module_names) - {"pyarch", "torch"}
    assert not {n for n in foreign if not n.startswith("__")}, "heavy libraries are imported where they are used"
