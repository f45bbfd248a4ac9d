"""safetensors checkpoints: equal to the package's own reading, whole and sharded; every lie refused."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc

import pytest
import torch

from pyarch.io import FileError, checkpoint

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.torch")

DTYPES = list(checkpoint._DTYPES.values())


def tensors():
    made = {f"{str(d)[6:]}.{i}": (torch.randn(s) * 3).to(d) for d in DTYPES for i, s in enumerate([(3, 5), (7,), ()])}
    return made | {"none": torch.empty(0, 4), "big": torch.randn(300, 500).bfloat16()}


def equal(one, two):
    """Bit by bit, so NaN too."""
    bits = [t.view(-1).view(torch.uint8) for t in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*bits)


def folder(path, content=None, config='{"model_type": "llama"}', name="model.safetensors"):
    (path / "config.json").write_text(config)
    if isinstance(content, dict):
        safetensors.torch.save_file(content, path / name, metadata={"format": "pt"})
    elif content is not None:
        (path / name).write_bytes(content)
    return path


def test_one_file(tmp_path):
    want = tensors()
    loaded = checkpoint.load(folder(tmp_path, want))
    assert loaded.config == {"model_type": "llama"}
    assert set(loaded.tensors) == set(want) == set(loaded.infos)
    assert len(loaded.tensors) == len(want)
    assert "none" in loaded.tensors
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as package:
        for name, tensor in want.items():
            got = loaded.tensors[name]
            assert equal(got, tensor), name
            assert equal(got, package.get_tensor(name)), name
            assert got.data_ptr() % 64 == 0
    with pytest.raises(KeyError):
        loaded.tensors["other"]
    assert f"{len(want)} tensors" in repr(loaded)


def sharded(path, weight_map, **shards):
    for name, content in shards.items():
        folder(path, content, name=f"{name}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards(tmp_path):
    one, two = {"a": torch.randn(3), "b": torch.randn(2, 2)}, {"c": torch.arange(4), "unlisted": torch.ones(1)}
    loaded = checkpoint.load(
        sharded(tmp_path, {"a": "x.safetensors", "c": "y.safetensors", "b": "x.safetensors"}, x=one, y=two)
    )
    assert set(loaded.tensors) == {"a", "b", "c"}
    for name, want in (one | {"c": two["c"]}).items():
        assert torch.equal(loaded.tensors[name], want)


def test_shards_may_be_links_as_in_a_download_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    folder(tmp_path / "blobs", {"a": torch.ones(2)}, name="0123")
    os.symlink(tmp_path / "blobs" / "0123", tmp_path / "snapshot" / "x.safetensors")
    (tmp_path / "snapshot" / "config.json").write_text("{}")
    loaded = checkpoint.load(sharded(tmp_path / "snapshot", {"a": "x.safetensors"}))
    assert torch.equal(loaded.tensors["a"], torch.ones(2))


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "/x.safetensors", "sub/x.safetensors", "..", "x.bin", "", 5, None,
              "..\\x.safetensors", "c:x.safetensors", "x\0.safetensors", ["x.safetensors"]],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, shard):
    (tmp_path / "in").mkdir()
    folder(tmp_path, {"a": torch.ones(1)}, name="x.safetensors")
    folder(tmp_path / "in")
    with pytest.raises(FileError, match=r"index\.json: names .* no safetensors file of the folder"):
        checkpoint.load(sharded(tmp_path / "in", {"a": shard}))


def test_an_index_that_is_wrong(tmp_path):
    folder(tmp_path)
    with pytest.raises(FileError, match=r"'b' is in 'x\.safetensors', which does not have it"):
        checkpoint.load(sharded(tmp_path, {"b": "x.safetensors"}, x={"a": torch.ones(1)}))
    with pytest.raises(FileError, match=r"gone\.safetensors: no such file"):
        checkpoint.load(sharded(tmp_path, {"b": "gone.safetensors"}))
    with pytest.raises(FileError, match="no weight_map"):
        checkpoint.load(sharded(tmp_path, ["x.safetensors"]))


def st(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **extra):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | extra


HUGE = [2**31, 2**62, 2**64 - 1]
LIES = {
    "empty": (b"", "too few"),
    "short": (b"\1\0\0", "too few"),
    **{f"header of {n}": (st({}, length=n), "too few") for n in HUGE},
    "header too big": (st(b" " * (17 << 20)), "at most 16777216"),
    "a pickle": (b"\x80\2}q\0." + bytes(100), "too few|JSON"),
    "no JSON": (st(b"{'a': 1}"), "header is not valid JSON"),
    "a list": (st([]), "header must be a JSON object"),
    "deep": (st(b'{"a":' * 100_000), "header is not valid JSON"),
    "nested": (st(b'{"a":' * 80 + b"0" + b"}" * 80), "nested more than"),
    "not UTF-8": (st(b'{"\xff": 1}'), "header is not valid JSON"),
    "long number": (st(b'{"a": ' + b"9" * 5000 + b"}"), "header is not valid JSON"),
    "twice": (st(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "entry a number": (st({"a": 5}), "'a' is described by int"),
    "no dtype": (st({"a": {}}), "no dtype"),
    "dtype a number": (st({"a": tensor(dtype=3)}, bytes(8)), "no dtype"),
    "no shape": (st({"a": tensor() | {"shape": None}}, bytes(8)), "shape of tensor 'a'"),
    "shape of text": (st({"a": tensor(shape=["2"])}, bytes(8)), "shape of tensor 'a'"),
    "shape of bools": (st({"a": tensor(shape=[True, 2])}, bytes(8)), "shape of tensor 'a'"),
    "negative": (st({"a": tensor(shape=[-2, -1])}, bytes(8)), "shape of tensor 'a'"),
    "fraction": (st({"a": tensor(shape=[2.0])}, bytes(8)), "shape of tensor 'a'"),
    "offsets of one": (st({"a": tensor(offsets=[8])}, bytes(8)), "a begin and an end"),
    "offsets reversed": (st({"a": tensor(offsets=[8, 0])}, bytes(8)), "a begin and an end"),
    "offsets negative": (st({"a": tensor(offsets=[-8, 0])}, bytes(8)), "data_offsets of tensor 'a'"),
    "rank": (st({"a": tensor(shape=[1] * 9 + [2])}, bytes(8)), "impossible shape"),
    **{f"size {n}": (st({"a": tensor(shape=[n])}, bytes(8)), "cannot have|impossible") for n in HUGE},
    "sizes that wrap": (st({"a": tensor(shape=[2**32, 2**32, 2])}, bytes(8)), "impossible shape"),
    "none of many": (st({"a": tensor(shape=[0, 2**62], offsets=[0, 0])}), "impossible shape"),
    "short data": (st({"a": tensor()}, bytes(7)), "holds 64|truncated"),
    "long data": (st({"a": tensor()}, bytes(9)), "truncated or corrupt"),
    "data not described": (st({}, bytes(1)), "truncated or corrupt"),
    "hole": (st({"a": tensor(), "b": tensor(offsets=[16, 24])}, bytes(24)), "'b' begins at byte"),
    "overlap": (st({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)), "'b' begins at byte"),
    "all the same": (st({n: tensor() for n in "abc"}, bytes(8)), "'b' begins at byte"),
    "wrong size": (st({"a": tensor(offsets=[0, 9])}, bytes(9)), "cannot have 9 bytes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_without_allocating(tmp_path, lie):
    content, says = LIES[lie]
    folder(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=rf"(?s)model\.safetensors: .*({says})"):
            checkpoint.load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 200_000 + 30 * len(content)
    finally:
        tracemalloc.stop()
    if "twice" not in lie and "none of many" not in lie and lie != "rank" and "too big" not in lie:
        with pytest.raises(safetensors.SafetensorError):  # the package's own reader agrees
            safetensors.safe_open(tmp_path / "model.safetensors", "pt")


def test_every_truncation_is_refused(tmp_path):
    folder(tmp_path, {"a": torch.randn(3, 3), "b": torch.ones(2).bool()})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(FileError):
            checkpoint.load(tmp_path)


def test_tensors_that_cannot_be(tmp_path):
    header = {"f4": tensor("F4", [2], [0, 1]), "b": tensor("BOOL", [2], [1, 3])}
    loaded = checkpoint.load(folder(tmp_path, st(header, b"\0\1\2")))
    with pytest.raises(FileError, match="'f4' is of dtype F4; supported are"):
        loaded.tensors["f4"]
    with pytest.raises(FileError, match="'b' of BOOL has a byte"):
        loaded.tensors["b"]


def test_an_odd_header_length_gives_aligned_tensors(tmp_path):
    header = json.dumps({"a": tensor()}).encode()
    for spaces in range(8):
        loaded = checkpoint.load(folder(tmp_path, st(header + b" " * spaces, struct.pack("<2f", 1, 2))))
        assert torch.equal(loaded.tensors["a"], torch.tensor([1.0, 2.0]))
        assert loaded.tensors["a"].data_ptr() % 64 == 0


def test_a_file_that_shrinks_is_an_error_and_tensors_live_on(tmp_path):
    """In a process of its own, since what this is about would end it."""
    folder(tmp_path, {"a": torch.ones(100_000), "b": torch.ones(4)})
    code = (
        "import os, sys\nfrom pyarch.io import FileError, checkpoint\nloaded = checkpoint.load(sys.argv[1])\n"
        "a = loaded.tensors['a']\nos.truncate(sys.argv[1] + '/model.safetensors', 100)\nassert a.sum() == 100_000\n"
        "try: loaded.tensors['b']\nexcept FileError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "changed since it was opened" in done.stdout


@pytest.mark.parametrize(
    ("config", "says"),
    [("", "not valid JSON"), ("[1]", "must be a JSON object"), ("{" + " " * (5 << 20), "at most 4194304")],
)
def test_bad_config(tmp_path, config, says):
    with pytest.raises(FileError, match=rf"config\.json: .*{says}"):
        checkpoint.load(folder(tmp_path, {"a": torch.ones(1)}, config=config))


def test_folders_without_weights(tmp_path):
    with pytest.raises(FileError, match=r"config\.json: no such file"):
        checkpoint.load(tmp_path)
    folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # pickles do not count
    with pytest.raises(FileError, match=r"neither model\.safetensors"):
        checkpoint.load(tmp_path)
