"""GGUF: every supported type against the gguf package's own dequantisation, and every lie a header can tell."""

import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from pyarch.io import FileError
from pyarch.io import gguf as loader
from pyarch.quantized import QuantizedTensor

package = pytest.importorskip("gguf")
TYPES = package.GGMLQuantizationType
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
         "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}  # fmt: skip
# type -> where its fp16 numbers lie in a block, and what it becomes: bits, group_size, dtype of the scale
QUANTISED = {
    "Q4_0": ([0], 4, 32, torch.float16), "Q4_1": ([0, 2], 4, 32, torch.float16),
    "Q5_0": ([0], 8, 32, torch.float16), "Q5_1": ([0, 2], 8, 32, torch.float16),
    "Q8_0": ([0], 8, 32, torch.float16), "Q4_K": ([0, 2], 4, 32, torch.float32),
    "Q5_K": ([0, 2], 8, 32, torch.float32), "Q6_K": ([208], 8, 16, torch.float32),
}  # fmt: skip


def random_blocks(kind, rows, blocks, seed):
    """Valid blocks of any bits: every code, scale and minimum, with finite fp16 numbers."""
    rng = np.random.default_rng(seed)
    size, nbytes = package.GGML_QUANT_SIZES[TYPES[kind]]
    data = rng.integers(0, 256, (rows, blocks, nbytes), dtype=np.uint8)
    for at in QUANTISED[kind][0]:
        half = rng.standard_normal((rows, blocks, 1)).astype(np.float16) * np.float16(rng.choice([1e-6, 1e-2, 1, 60]))
        data[..., at : at + 2] = half.view(np.uint8)
    return data.reshape(rows, -1), blocks * size


def write(path, tensors=(), metadata=()):
    writer = package.GGUFWriter(path, "llama")
    for add, key, value in metadata:
        getattr(writer, f"add_{add}")(key, value)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize(("rows", "blocks", "piece"), [(1, 1, 1), (3, 2, 1 << 20), (130, 3, 1000), (7, 5, 1)])
def test_quantised_exactly(tmp_path, monkeypatch, kind, rows, blocks, piece):
    monkeypatch.setattr(loader, "PIECE", piece)  # pieces of one row, of a few with a tail, and of all
    data, k = random_blocks(kind, rows, blocks, seed=rows)
    file = loader.load(write(tmp_path / "a.gguf", [("first", data, kind), ("second", data[::-1].copy(), kind)]))
    for name, raw in (("first", data), ("second", data[::-1])):
        got, want = file.tensors[name], package.dequantize(raw, TYPES[kind])
        _, bits, group, scale = QUANTISED[kind]
        assert isinstance(got, QuantizedTensor)
        assert (got.bits, got.group_size, got.scale.dtype, tuple(got.shape)) == (bits, group, scale, (rows, k))
        assert np.array_equal(got.dequantize().numpy(), want)
        assert file.infos[name].type == kind
        assert file.infos[name].shape == (rows, k)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_by_the_package(tmp_path, kind):
    weight = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    weight[2] = 0
    data = package.quantize(weight, TYPES[kind])
    got = loader.load(write(tmp_path / "a.gguf", [("w", data, kind)])).tensors["w"].dequantize().numpy()
    assert np.array_equal(got, package.dequantize(data, TYPES[kind]))
    assert np.abs(got - weight).max() < np.abs(weight).max() * (0.01 if kind == "Q8_0" else 0.15)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x0F, 0xC0, 0x3F])
def test_k_quants_at_the_ends_of_their_range(tmp_path, kind, byte):
    data, _ = random_blocks(kind, 2, 1, seed=1)
    data[:, 4:] = byte
    got = loader.load(write(tmp_path / "a.gguf", [("w", data, kind)])).tensors["w"]
    assert np.array_equal(got.dequantize().numpy(), package.dequantize(data, TYPES[kind]))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 5), (2, 1, 3, 4)])
def test_plain_tensors(tmp_path, kind, shape):
    want = (torch.randn(shape) * 50).to(PLAIN[kind])
    raw = want.view(torch.uint8).numpy() if kind == "BF16" else want.numpy()
    got = loader.load(write(tmp_path / "a.gguf", [("t", raw, kind)])).tensors["t"]
    assert got.dtype == PLAIN[kind]
    assert torch.equal(got, want)
    got.zero_()  # its own memory: neither the file nor the next read changes


def test_metadata_is_plain_python(tmp_path):
    values = [
        ("uint8", "u8", 255), ("int8", "i8", -128), ("uint16", "u16", 65535), ("int16", "i16", -7),
        ("uint32", "u32", 2**32 - 1), ("int32", "i32", -(2**31)), ("uint64", "u64", 2**64 - 1), ("int64", "i64", -5),
        ("float32", "f32", 0.5), ("float64", "f64", 1e300), ("bool", "yes", True), ("bool", "no", False),
        ("string", "text", "é\0漢 🎉"), ("array", "words", ["a", "", "ü"]),
        ("array", "numbers", [1, -2, 3]), ("array", "floats", [0.5, -1.0]), ("array", "flags", [True, False]),
    ]  # fmt: skip
    metadata = loader.load(write(tmp_path / "a.gguf", metadata=values)).metadata
    for _, key, value in values:
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    assert type(metadata["numbers"][0]) is int
    assert type(metadata["flags"][0]) is bool


def test_tensors_is_a_mapping(tmp_path):
    one = np.ones(4, np.float32)
    file = loader.load(write(tmp_path / "a.gguf", [("b", one, "F32"), ("a", one, "F32")]))
    assert list(file.tensors) == ["b", "a"] == list(file.infos)
    assert len(file.tensors) == 2
    assert "a" in file.tensors
    assert "c" not in file.tensors
    with pytest.raises(KeyError):
        file.tensors["c"]
    assert "2 tensors" in repr(file)


def test_a_big_tensor_is_converted_piece_by_piece(tmp_path):
    data, k = random_blocks("Q4_0", 4096, 64, seed=0)  # 4.7 MB in the file, and in memory
    file = loader.load(write(tmp_path / "a.gguf", [("w", data, "Q4_0")]))
    tracemalloc.start()
    try:
        tensor = file.tensors["w"]
        peak = tracemalloc.get_traced_memory()[1]  # numpy's memory: the pieces, not the result, which is torch's
    finally:
        tracemalloc.stop()
    assert tensor.shape == (4096, k)
    assert peak < 8 * loader.PIECE < data.nbytes / 2


# Files that lie. A header is built by hand, so that each field can be wrong on its own.


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, kind, payload):
    return string(key) + struct.pack("<I", kind) + payload


def info(name="t", sizes=(4,), kind=0, offset=0, rank=None):
    shape = struct.pack(f"<{len(sizes)}Q", *sizes)
    return (
        string(name)
        + struct.pack("<I", len(sizes) if rank is None else rank)
        + shape
        + struct.pack("<IQ", kind, offset)
    )


def header(entries=(), infos=(), magic=b"GGUF", version=3, tensors=None, count=None, data=64):
    counts = (len(infos) if tensors is None else tensors, len(entries) if count is None else count)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = [2**31, 2**40, 2**62, 2**64 - 1]
LIES = {
    "empty": (b"", "GGUF"),
    "short magic": (b"GG", "GGUF"),
    "foreign": (b"PK\3\4" + bytes(100), "does not begin with 'GGUF'"),
    "only magic": (b"GGUF", "truncated"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    **{f"{n} tensors": (header(tensors=n), "number of tensors") for n in HUGE},
    **{f"{n} entries": (header(count=n), "number of metadata entries") for n in HUGE},
    **{f"key of {n}": (header([struct.pack("<Q", n)]), "key of metadata entry 0") for n in HUGE},
    **{f"string of {n}": (header([entry("k", 8, struct.pack("<Q", n))]), "'k'") for n in HUGE},
    **{
        f"array of {n} of type {kind}": (header([entry("k", 9, struct.pack("<IQ", kind, n))]), "'k'")
        for n in HUGE
        for kind in (0, 7, 8, 9, 12)
    },
    "array of unknown": (header([entry("k", 9, struct.pack("<IQ", 77, 1) + bytes(8))]), "unknown value type 77"),
    "deep arrays": (header([entry("k", 9, struct.pack("<IQ", 9, 1) * 200)], data=9000), "nested"),
    "unknown value": (header([entry("k", 13, bytes(8))]), "unknown value type 13"),
    "key not text": (header([entry(b"\xff\xfe", 0, b"\0")]), "not UTF-8"),
    "value not text": (header([entry("k", 8, string(b"\xc3"))]), "not UTF-8"),
    "key twice": (header([entry("k", 0, b"\0"), entry("k", 0, b"\1")]), "'k' occurs twice"),
    "alignment 0": (header([entry("general.alignment", 4, bytes(4))]), "general.alignment"),
    "alignment 24": (header([entry("general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    "alignment text": (header([entry("general.alignment", 8, string("32"))]), "general.alignment"),
    "alignment true": (header([entry("general.alignment", 7, b"\1")]), "general.alignment"),
    "alignment huge": (
        header([entry("general.alignment", 4, struct.pack("<I", 2**31))], [info()]),
        "truncated or corrupt",
    ),
    **{f"name of {n}": (header(infos=[struct.pack("<Q", n) + bytes(30)]), "name of tensor 0") for n in HUGE},
    "rank 5": (header(infos=[info(sizes=(1,) * 5)]), "5 dimensions"),
    "rank huge": (header(infos=[info(rank=2**32 - 1)]), "dimensions"),
    "size 0": (header(infos=[info(sizes=(4, 0))]), "size 0"),
    **{f"size {n}": (header(infos=[info(sizes=(n,))]), "file has") for n in HUGE},
    "sizes that wrap": (header(infos=[info(sizes=(2**32, 2**32, 2**32, 4))]), "file has"),
    "unknown type": (header(infos=[info(kind=4)]), "unknown type 4"),
    "rows no block": (header(infos=[info(sizes=(33, 1), kind=2)]), "multiple of Q4_0's 32"),
    "unaligned offset": (header(infos=[info(offset=8)]), "not aligned"),
    **{f"offset {n}": (header(infos=[info(offset=n // 32 * 32)]), "file has") for n in HUGE},
    "past the end": (header(infos=[info(sizes=(17,))]), "file has"),
    "name twice": (header(infos=[info(), info(offset=32)]), "occurs twice"),
    "overlap": (header(infos=[info("a", (16,)), info("b", (4,), offset=32)]), "overlap"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_without_allocating(tmp_path, lie):
    content, says = LIES[lie]
    path = tmp_path / "lying.gguf"
    path.write_bytes(content)
    loader.require("gguf")
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=f"(?s)lying.gguf: .*{says}"):
            loader.load(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000 + 50 * len(content)
    finally:
        tracemalloc.stop()


def test_the_handmade_header_is_right_when_it_does_not_lie(tmp_path):
    (tmp_path / "a.gguf").write_bytes(header([entry("k", 4, struct.pack("<I", 9))], [info(sizes=(4, 2))]))
    file = loader.load(tmp_path / "a.gguf")
    assert file.metadata == {"k": 9}
    assert torch.equal(file.tensors["t"], torch.zeros(2, 4))


def test_every_truncation_is_refused(tmp_path):
    data, _ = random_blocks("Q4_K", 2, 1, seed=0)
    metadata = [("array", "words", ["a", "bc"]), ("uint32", "n", 3)]
    whole = write(
        tmp_path / "a.gguf", [("w", data, "Q4_K"), ("v", np.ones(8, np.float32), "F32")], metadata
    ).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(FileError):
            loader.load(tmp_path / "cut.gguf")


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_refused(tmp_path, kind, bad):
    data, _ = random_blocks(kind, 3, 2, seed=0)
    at = QUANTISED[kind][0][-1]
    data[2, at : at + 2] = np.array([bad], np.float16).view(np.uint8)
    file = loader.load(write(tmp_path / "a.gguf", [("w", data, kind)]))
    with pytest.raises(FileError, match="'w' has a scale that is not finite"):
        file.tensors["w"]


def test_unsupported_tensors_are_named_only_when_asked_for(tmp_path):
    iq = np.zeros((1, package.GGML_QUANT_SIZES[TYPES.IQ2_XS][1]), np.uint8)
    stack = np.zeros((2, 3, 18), np.uint8)
    file = loader.load(write(tmp_path / "a.gguf", [("odd", iq, "IQ2_XS"), ("experts", stack, "Q4_0")]))
    with pytest.raises(FileError, match="'odd' is of type IQ2_XS; supported are Q4_0"):
        file.tensors["odd"]
    with pytest.raises(FileError, match=r"'experts'.*only matrices"):
        file.tensors["experts"]


def test_a_file_that_changes_or_shrinks_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", [("t", np.ones(1000, np.float32), "F32")])
    file = loader.load(path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(FileError, match="changed"):
        file.tensors["t"]
    path.unlink()
    with pytest.raises(FileError, match="no such file"):
        file.tensors["t"]


def test_paths_that_are_no_files(tmp_path):
    import os

    with pytest.raises(FileError, match="no such file"):
        loader.load(tmp_path / "none.gguf")
    with pytest.raises(FileError, match="not a regular file"):
        loader.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):  # and does not wait for a writer
        loader.load(tmp_path / "pipe")


def test_a_part_of_a_split_model(tmp_path):
    for count, says in ((3, "one of 3 parts"), (1, None)):
        path = write(tmp_path / f"{count}.gguf", metadata=[("uint16", "split.count", count)])
        if says is None:
            loader.load(path)
        else:
            with pytest.raises(FileError, match=says):
                loader.load(path)


def test_the_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(FileError("a.gguf", "is short")))
    assert str(error) == "a.gguf: is short"
    assert isinstance(error, ValueError)
