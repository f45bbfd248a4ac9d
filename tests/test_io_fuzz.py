"""A short run of the fuzzer (make fuzz is the long one), valid files of any content, and what fuzzing once found."""

import json
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from io_files import byte_level, made

from pyarch.io import FileError, checkpoint, gguf, tokenizer

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
fuzzer = Path(__file__).with_name("fuzz_io.py")


def test_fuzz(pytestconfig):
    """In a process of its own: its memory is limited, and a crash must not take the suite along."""
    command = [sys.executable, str(fuzzer), "--files", "3000", "--seed", str(getattr(pytestconfig, "seed", 0))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, count in json.loads(done.stdout)["kinds"].items():
        assert count["refused"] > 100, kind  # lies are found,
        assert count["accepted"] > 10, kind  # and what is true or harmless is read


numbers = st.integers(0, 2**32 - 1) | st.booleans() | st.floats(allow_nan=False) | st.integers(-(2**63), -1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
lists = st.lists(st.integers(0, 2**32 - 1)) | st.lists(texts) | st.lists(st.booleans())
nested = st.lists(st.lists(texts, min_size=1), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    metadata=st.dictionaries(texts, numbers | texts | lists | nested, max_size=6),
    shapes=st.dictionaries(texts, st.lists(st.integers(1, 4), max_size=4), max_size=4),
)
def test_what_is_written_is_what_is_read(tmp_path_factory, metadata, shapes):
    import fuzz_io

    metadata.pop("general.alignment", None)
    content = {name: [float(i) for i in range(math.prod(shape))] for name, shape in shapes.items()}
    packed = {name: struct.pack(f"<{len(v)}f", *v) for name, v in content.items()}
    tensors = [(name, 0, tuple(shape), packed[name]) for name, shape in shapes.items()]
    path = tmp_path_factory.mktemp("any") / "a.gguf"
    path.write_bytes(fuzz_io.Liar(random.Random(0), 0).gguf(metadata, tensors))
    file = gguf.load(path)
    assert file.metadata == metadata
    assert list(file.tensors) == list(shapes)
    for name, shape in shapes.items():
        assert torch.equal(
            file.tensors[name], torch.tensor(content[name]).view(*reversed(shape)) if shape else torch.tensor(0.0)
        )


def test_a_tensor_without_dimensions_of_a_block_type(tmp_path):
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<IIQ", 0, 2, 0)
    (tmp_path / "a.gguf").write_bytes(head + bytes(64))
    with pytest.raises(FileError, match="'t' has rows of 1"):
        gguf.load(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"decoder": {"type": "Sequence", "decoders": 1e308}}', "has no model"),
        ('{"model": {"type": "BPE"}, "decoder": {"type": ["ByteLevel"]}}', "decoder"),
        ('{"model": {"type": "BPE", "vocab": {"a": 1, "a": 1}}}', "key 'a' occurs twice"),
    ],
)
def test_json_that_broke_a_reader_once(tmp_path, text, says):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FileError, match=f"tokenizer.json: .*{says}"):
        tokenizer.from_folder(tmp_path)


def test_a_repeated_key_in_a_long_object_is_found_in_one_pass(tmp_path):
    body = ",".join(f'"{i}":0' for i in [*range(200_000), 0])
    (tmp_path / "config.json").write_text("{" + body + "}")
    with pytest.raises(FileError, match="key '0' occurs twice"):
        checkpoint.load(tmp_path)


def test_tens_of_thousands_of_control_tokens():
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"] + [f"<|{i}|>" for i in range(20_000)]
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"] + [3] * 20_000
    tokenizer = made(metadata)
    assert tokenizer.decode(tokenizer.encode("a<|12345|>b"), skip_special=False) == "a<|12345|>b"
