"""The BPE models of GGUF metadata, rebuilt on the `tokenizers` package. `tokenizer.py` makes tokenizers of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from . import FileError, require
from .gguf import GGUF

MAX_PIECE = 256  # characters of a SentencePiece token: all its splits are looked up

# How words are cut before BPE, as each model's own tokenizer.json says; without a pattern as GPT-2's, the default of
# the tokenizers package.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE: dict[str, dict[str, Any]] = {  # tokenizer.ggml.pre
    "gpt-2": dict(),
    "smollm": dict(digits=True),
    "starcoder": dict(digits=True),
    "llama-bpe": dict(pattern=_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": dict(pattern=_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": dict(pattern=_LLAMA3, ignore_merges=True, add_bos=True),
    "smaug-bpe": dict(pattern=_LLAMA3),
    "qwen2": dict(pattern=_QWEN2, nfc=True),
    "deepseek-r1-qwen": dict(pattern=_QWEN2),
    "tekken": dict(pattern=_TEKKEN, ignore_merges=True, add_bos=True),
}
UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type


@contextlib.contextmanager
def foreign(what: str, error: type[ValueError] = ValueError, *args: str) -> Iterator[None]:
    """Errors of the tokenizers package, a Rust panic too (no Exception), as ours."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise error(*args, f"{what}: {e}") from None


class Metadata:
    """Typed look-ups in GGUF metadata: a missing or foreign value is a FileError."""

    def __init__(self, gguf: GGUF) -> None:
        self.path, self.values = gguf.path, gguf.metadata

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value is not default and type(value) is not kind:
            raise FileError(self.path, f"{key} must be a {kind.__name__}, not {type(value).__name__}")
        return value

    def list(self, key: str, kind: type, length: int | None = None) -> list:
        value = self.values.get(key)
        if type(value) is not list or any(type(v) is not kind for v in value):
            raise FileError(self.path, f"{key} must be a list of {kind.__name__}")
        if length is not None and len(value) != length:
            raise FileError(self.path, f"{key} has {len(value)} values for {length} tokens")
        return value

    def token(self, key: str, count: int) -> int | None:
        value = self.get(key, int)
        if value is not None and not 0 <= value < count:
            raise FileError(self.path, f"{key} is {value}, outside the {count} tokens")
        return value


def byte_level(meta: Metadata, vocab: dict[str, int]) -> tuple[Any, bool]:
    """A "gpt2" model: merges are given; the cut into words goes by name."""
    name = meta.get("tokenizer.ggml.pre", str)
    if name not in _PRE:
        raise FileError(meta.path, f"tokenizer.ggml.pre is {name!r}; supported are {', '.join(_PRE)}")
    pre = _PRE[name]
    merges = [tuple(m.split(" ")) for m in meta.list("tokenizer.ggml.merges", str)]
    for m in merges:
        if len(m) != 2 or m[0] not in vocab or m[1] not in vocab or m[0] + m[1] not in vocab:
            raise FileError(meta.path, f"tokenizer.ggml.merges has {' '.join(m)[:100]!r}, which is no pair of tokens")
    t = require("tokenizers")
    with foreign("tokenizer", FileError, meta.path):
        backend = t.Tokenizer(t.models.BPE(vocab, merges, ignore_merges=pre.get("ignore_merges", False)))
        steps = [t.pre_tokenizers.Digits(individual_digits=True)] if pre.get("digits") else []
        if "pattern" in pre:
            steps.append(t.pre_tokenizers.Split(t.Regex(pre["pattern"]), "isolated"))
        steps.append(t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="pattern" not in pre))
        backend.pre_tokenizer = t.pre_tokenizers.Sequence(steps)
        if pre.get("nfc"):
            backend.normalizer = t.normalizers.NFC()
    return backend, pre.get("add_bos", False)


def sentencepiece(
    meta: Metadata, tokens: list[str], vocab: dict[str, int], types: list[int], unknown: int | None, prefix: bool
) -> Any:
    """A "llama" model: SentencePiece joins the neighbours whose union has the best score, so every split of a token
    into two tokens is a merge, ranked by the score of the token."""
    scores = meta.list("tokenizer.ggml.scores", float, len(tokens))
    if not all(map(math.isfinite, scores)):
        raise FileError(meta.path, "tokenizer.ggml.scores has a value that is not finite")
    ranked = []
    for i, token in enumerate(tokens):
        if types[i] in (CONTROL, USER, UNKNOWN, BYTE):
            continue
        if len(token) > MAX_PIECE:
            raise FileError(meta.path, f"token {i} has {len(token)} characters; at most {MAX_PIECE} are read")
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right))
    ranked.sort()
    t = require("tokenizers")
    with foreign("tokenizer", FileError, meta.path):
        merges = [(tokens[left], tokens[right]) for _, _, left, right in ranked]
        unk = None if unknown is None else tokens[unknown]
        backend = t.Tokenizer(t.models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
        spaces = [t.normalizers.Replace(" ", "\u2581")]
        backend.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("\u2581")] * prefix + spaces)
    return backend
