"""Fuzzes the readers of files from outside: python tests/fuzz_io.py --files 100000 [--seed N] [--only KIND] [--first I]

File i of a seed is always the same file. Kinds, in turn: GGUF of tensors of every type; GGUF of a byte-level and of a
SentencePiece tokenizer; safetensors; a sharded checkpoint; tokenizer.json. Each is built valid, then told to lie:
numbers of the structure replaced (counts, lengths, types, sizes, offsets), values of metadata or JSON replaced,
dropped, nested or repeated, and bytes flipped, cut, doubled or overwritten. What a reader accepts is then used: every
tensor read, a text encoded and decoded.

A file fails when anything but the documented FileError comes out, when it takes longer than SECONDS, when Python and
numpy allocate more than BASE + FACTOR times its size, or when the process ends. Its memory is limited to HEADROOM over
what it has at the start. The file that ended the process is the one that the file named by --progress names.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from io_files import byte_level, sentencepiece

from pyarch.io import FileError, checkpoint, gguf, tokenizer

SECONDS = 2.0
BASE, FACTOR = 200_000, 40
HEADROOM = 48 << 20
TEXT = "The hat in\n\nthat bath: 1234 é 漢字 🎉 <s>[INST]<|im_end|>"
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 257, 4096, 65535, 65536, 10**6, 2**24,
           2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip
VALUES = [None, True, False, 0, 1, -1, 2**31, 2**63, 1e308, 0.5, "", "a", "a b", "\0", "\u2581", "é" * 50, "a" * 300,
          [], {}, [None], ["a"], [[]], {"a": {}}, {"type": "BPE"}, {"type": "Sequence"}, {"type": "Strip"}]  # fmt: skip


class Liar:
    """Writes numbers, now and then another one than it was given."""

    def __init__(self, rng: random.Random, rate: float) -> None:
        self.rng, self.rate = rng, rate

    def number(self, code: str, value) -> bytes:
        if self.rng.random() < self.rate:
            value = self.rng.choice([*NUMBERS, int(value) + 1, max(int(value) - 1, 0), int(value) * 2])
        if code in "fd":
            return struct.pack("<" + code, value)
        bits = 8 * struct.calcsize(code)
        return (int(value) % 2**bits).to_bytes(bits // 8, "little")

    def string(self, text: str) -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return self.number("Q", len(data)) + data

    def value(self, value) -> tuple[int, bytes]:
        """A GGUF value type and its bytes."""
        if isinstance(value, bool):
            return 7, bytes([value])
        if isinstance(value, int):
            return (4, self.number("I", value)) if 0 <= value < 2**32 else (11, self.number("q", value))
        if isinstance(value, float):
            return 12, struct.pack("<d", value)
        if isinstance(value, list):
            parts = [self.value(v) for v in value]
            kind = parts[0][0] if parts else 4
            if kind == 12:  # the writer of real files has them so
                kind, parts = (
                    6,
                    [(6, struct.pack("<f", max(min(v, 3e38), -3e38))) for v in value if isinstance(v, float)],
                )
            return 9, self.number("I", kind) + self.number("Q", len(parts)) + b"".join(p for _, p in parts)
        return 8, self.string(str(value))

    def gguf(self, metadata: dict, tensors: list[tuple[str, int, tuple, bytes]]) -> bytes:
        out = b"GGUF" + self.number("I", 3) + self.number("Q", len(tensors)) + self.number("Q", len(metadata))
        for key, value in metadata.items():
            kind, data = self.value(value)
            out += self.string(key) + self.number("I", kind) + data
        at = 0
        for name, kind, sizes, data in tensors:
            out += self.string(name) + self.number("I", len(sizes)) + b"".join(self.number("Q", n) for n in sizes)
            out += self.number("I", kind) + self.number("Q", at)
            at += -(-len(data) // 32) * 32
        out += bytes(-len(out) % 32)
        return out + b"".join(data + bytes(-len(data) % 32) for *_, data in tensors)


def changed(value, rng: random.Random, strength: float):
    """A JSON-like value with some of its parts replaced, dropped, repeated or nested."""
    if rng.random() < strength:
        choice = rng.randrange(6)
        if choice == 0 and isinstance(value, (list, str)) and value:
            return value[: rng.randrange(len(value))]
        if choice == 1 and isinstance(value, (list, str)) and len(value) < 1000:
            return value * rng.choice([2, 3])
        if choice == 2:
            for _ in range(rng.choice([1, 3, 70])):
                value = [value] if rng.random() < 0.5 else {"type": value}
            return value
        if choice == 3 and isinstance(value, (int, float)):
            return rng.choice(NUMBERS) * rng.choice([1, -1])
        return rng.choice(VALUES)
    if isinstance(value, dict):
        kept = {k: changed(v, rng, strength) for k, v in value.items() if rng.random() > strength / 4}
        return kept | {rng.choice(list(value)): rng.choice(VALUES)} if value and rng.random() < strength / 4 else kept
    if isinstance(value, list) and value:  # not every element of a long list
        value = list(value)
        for _ in range(rng.choice([0, 0, 1, 3])):
            i = rng.randrange(len(value))
            value[i] = changed(value[i], rng, min(1.0, 8 * strength))
    return value


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, overwritten, cut, doubled or inserted."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not out:
            break
        # The front of a file is its structure: most damage goes there.
        at = rng.randrange(len(out) if rng.random() < 0.5 else min(len(out), 200))
        choice = rng.randrange(7)
        if choice == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            out[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif choice == 2:
            size = rng.choice([2, 4, 8])
            out[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
        elif choice == 3:
            del out[at:]
        elif choice == 4:
            del out[at : at + rng.choice([1, 4, 8, 32])]
        elif choice == 5:
            out[at:at] = out[at : at + rng.choice([1, 8, 40, 400])]
        else:
            out[at:at] = rng.randbytes(rng.choice([1, 2, 8]))
    return bytes(out)


# Valid files to begin with

BLOCKS = {  # GGML type -> elements and bytes of a block
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    12: (256, 144), 13: (256, 176), 14: (256, 210), 20: (32, 18), 24: (1, 1), 27: (1, 8), 28: (1, 8), 30: (1, 2),
}  # fmt: skip


def tensor_file(rng: random.Random) -> tuple[dict, list]:
    tensors = []
    for i in range(rng.randrange(5)):
        kind = rng.choice(list(BLOCKS))
        block, nbytes = BLOCKS[kind]
        sizes = (block * rng.choice([1, 2, 3]), *(rng.choice([1, 2, 3, 5]) for _ in range(rng.choice([0, 1, 1, 1, 2]))))
        count = 1
        for n in sizes:
            count *= n
        # Bytes under 0x7C are finite as the upper half of an fp16; any byte now and then.
        data = bytes(rng.randrange(0x7C if rng.random() < 0.999 else 256) for _ in range(count // block * nbytes))
        tensors.append((f"blk.{i}.weight", kind, sizes, data))
    metadata = {
        "general.architecture": "llama", "general.alignment": 32, "llama.block_count": 2, "x.flags": [True, False],
        "x.sizes": [1, 2, 3], "x.words": ["a", "é", ""], "x.nested": [[1, 2], [3]], "x.scale": 1.5,
    }  # fmt: skip
    return metadata, tensors


def lying_gguf(rng: random.Random, metadata: dict, tensors: list) -> bytes:
    way = rng.randrange(4)
    if way == 0:
        metadata = {k: v for k, v in ((k, changed(v, rng, 0.05)) for k, v in metadata.items()) if v is not None}
    data = Liar(rng, rng.choice([0.002, 0.01, 0.1]) if way == 1 else 0).gguf(metadata, tensors)
    return damaged(data, rng) if way >= 2 else data


def safetensors(rng: random.Random, names: str = "abcd") -> bytes:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name in names[: rng.randrange(2, 5)]:
        dtype, size = rng.choice([("F32", 4), ("BF16", 2), ("I64", 8), ("BOOL", 1), ("F8_E4M3", 1), ("U16", 2)])
        shape = [rng.choice([0, 1, 2, 3, 5]) for _ in range(rng.randrange(4))]
        count = size
        for n in shape:
            count *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + count]}
        data += bytes(rng.randrange(2) for _ in range(count))
    way = rng.randrange(6)  # 4 and 5: none
    if way == 0:
        header = changed(header, rng, 0.05)
    text = json.dumps(header).encode()
    text = damaged(text, rng) if way == 1 else text
    out = Liar(rng, 0.3 if way == 2 else 0).number("Q", len(text)) + text + data
    return damaged(out, rng) if way == 3 else out


def use_tokenizer(made: tokenizer.Tokenizer) -> None:
    try:
        ids = made.encode(TEXT)
    except ValueError as e:
        if not str(e).startswith("text: "):
            raise
        return
    made.decode(ids)
    stream = made.stream()
    for i in [*ids, *range(min(made.vocab_size, 50)), 10**7]:
        stream.push(i)
    stream.end()


class Fuzzer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs = [self._spec(byte_level(), "ByteLevel"), self._spec(sentencepiece(), "ByteFallback")]

    @staticmethod
    def _spec(metadata: dict, decoder: str) -> dict:
        """A tokenizer.json, as the tokenizers package writes it."""
        backend = tokenizer.from_gguf(gguf.GGUF("seed", (), metadata, {}))._backend
        spec = json.loads(backend.to_str())
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        spec["decoder"] = byte_level if decoder == "ByteLevel" else {"type": decoder}
        spec["post_processor"] = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                                  "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}  # fmt: skip
        return spec

    def write(self, name: str, content: bytes) -> int:
        (self.folder / name).write_bytes(content)
        return len(content)

    # Each of these writes a file, uses it, and gives the size of what it wrote.

    def tensors(self, rng: random.Random):
        size = self.write("a.gguf", lying_gguf(rng, *tensor_file(rng)))
        yield size
        file = gguf.load(self.folder / "a.gguf")
        for name in file.tensors:
            try:
                file.tensors[name]
            except FileError:
                continue  # the next may be right

    def _metadata(self, rng: random.Random, metadata: dict):
        yield self.write("a.gguf", lying_gguf(rng, metadata, []))
        use_tokenizer(tokenizer.from_gguf(gguf.load(self.folder / "a.gguf")))

    def byte_level(self, rng: random.Random):
        return self._metadata(rng, byte_level(rng.choice(["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])))

    def sentencepiece(self, rng: random.Random):
        return self._metadata(rng, sentencepiece())

    def safetensors(self, rng: random.Random):
        yield self.write("model.safetensors", safetensors(rng)) + self.write("config.json", b"{}")
        self.read_checkpoint()

    def read_checkpoint(self) -> None:
        loaded = checkpoint.load(self.folder)
        for name in loaded.tensors:
            try:
                loaded.tensors[name]
            except FileError:
                continue

    def shards(self, rng: random.Random):
        (self.folder / "model.safetensors").unlink(missing_ok=True)
        size = self.write("x.safetensors", safetensors(rng)) + self.write("y.safetensors", safetensors(rng, "efgh"))
        index = {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors", "e": "y.safetensors"}}
        text = json.dumps(changed(index, rng, rng.choice([0, 0.02, 0.1]))).encode()
        text = damaged(text, rng) if rng.random() < 0.3 else text
        config = b'{"hidden_size": 64, "layers": [1, 2]}'
        config = damaged(config, rng) if rng.random() < 0.2 else config
        yield size + self.write("model.safetensors.index.json", text) + self.write("config.json", config)
        self.read_checkpoint()

    def tokenizer_json(self, rng: random.Random):
        spec = rng.choice(self.specs)
        strength = rng.choice([0, 0.0003, 0.001, 0.01, 0.1])
        text = json.dumps(changed(spec, rng, strength), ensure_ascii=rng.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
        text = damaged(text, rng) if rng.random() < 0.2 or not strength else text
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "x"}
        beside = json.dumps(changed(config, rng, 0.1)).encode()
        yield self.write("tokenizer.json", text) + self.write("tokenizer_config.json", beside)
        use_tokenizer(tokenizer.from_folder(self.folder))

    def warm_up(self) -> None:
        """Imports what the readers import when they are first used."""
        for kind in KINDS:
            with contextlib.suppress(FileError):
                for _ in getattr(self, kind)(random.Random(0)):
                    pass


KINDS = ["tensors", "byte_level", "sentencepiece", "safetensors", "shards", "tokenizer_json"]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--files", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--first", type=int, default=0, help="index of the first file")
    options.add_argument("--only", choices=KINDS)
    options.add_argument("--progress", default=os.devnull, help="where the index of the current file is written")
    o = options.parse_args()
    os.environ["RUST_BACKTRACE"] = "0"
    torch.set_num_threads(1)
    faulthandler.enable()
    folder = Path(tempfile.mkdtemp(prefix="pyarch-fuzz-"))
    fuzzer = Fuzzer(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
    fuzzer.warm_up()
    tracemalloc.start()
    counts = {k: {"files": 0, "accepted": 0, "refused": 0} for k in ([o.only] if o.only else KINDS)}
    slowest, largest = 0.0, 0
    failures: list[str] = []
    progress = os.open(o.progress, os.O_WRONLY | os.O_CREAT, 0o644)
    for i in range(o.first, o.first + o.files):
        kind = o.only or KINDS[i % len(KINDS)]
        os.pwrite(progress, f"{i:12d} {kind:20s}\n".encode(), 0)
        faulthandler.dump_traceback_later(30, exit=True)
        steps = getattr(fuzzer, kind)(random.Random(f"{o.seed}.{i}"))
        size = next(steps)
        tracemalloc.reset_peak()
        before, started = tracemalloc.get_traced_memory()[0], time.perf_counter()
        result, fault = "accepted", None
        try:
            next(steps, None)
        except FileError:
            result = "refused"
        except BaseException as e:  # a Rust panic is no Exception
            fault = f"{type(e).__name__}: {e}"
        seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1] - before
        counts[kind]["files"] += 1
        counts[kind][result] += 1
        slowest, largest = max(slowest, seconds), max(largest, peak)
        if seconds > SECONDS:
            fault = f"took {seconds:.1f} s"
        if peak > BASE + FACTOR * size:
            fault = f"allocated {peak} bytes for a file of {size}"
        if fault:
            failures.append(f"file {i} ({kind}): {fault}"[:300])
            print(failures[-1], file=sys.stderr, flush=True)
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(folder)
    print(json.dumps({"seed": o.seed, "first": o.first, "kinds": counts, "slowest_s": round(slowest, 3),
                      "largest_peak_bytes": largest, "failures": len(failures)}))  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
