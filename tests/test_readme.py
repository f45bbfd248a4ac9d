"""The README is true: its generated parts are what the code gives, its example runs, its targets exist."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from bench import gpu_table, table
from docs import readme

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.skipif(torch.version.cuda is not None, reason="explain tells more under a CUDA torch")
def test_generated_parts_are_up_to_date():
    assert readme.filled(TEXT) == TEXT, "README.md: make readme"
    assert table.filled(TEXT) == TEXT, "README.md: make readme"
    assert gpu_table.filled(page := gpu_table.PAGE.read_text()) == page, "docs/gpu.md: make readme"


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z]+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    assert all(f"make {target} " in told for target in phony)
