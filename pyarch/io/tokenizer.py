"""Tokenizers: text to token ids and back, the chat template, and the ids that end a turn.

`from_gguf` rebuilds a tokenizer from GGUF metadata, `from_folder` reads a Hugging Face folder (tokenizer.json). Both
encode with the `tokenizers` package. Decoding is done here, token by token as bytes, so that text can be streamed
without ever cutting a UTF-8 character, and so that a stream says exactly what `decode` says.

Two families of BPE are read; anything else is refused by name:
    byte-level   ("gpt2" in GGUF) each byte of the text is a symbol, written as a printable character
    SentencePiece ("llama" in GGUF) a space is U+2581, a character outside the vocabulary becomes <0xNN> byte tokens
"""

from __future__ import annotations

import codecs
import json
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from . import FileError, read_json, read_small, require
from .bpe import CONTROL, UNKNOWN, USER, Metadata, byte_level, foreign, sentencepiece
from .chat_template import render
from .gguf import GGUF

MAX_JSON = 64 << 20
MAX_TEMPLATE = 1 << 20
MAX_TOKENS = 1 << 22


_END_NAMES = {  # control tokens that end a turn, whatever the file's eos is
    "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
}  # fmt: skip
_PARTS = {  # what a tokenizer.json may be made of
    "normalizer": {"Sequence", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Strip", "Lowercase"},
    "pre_tokenizer": {"Sequence", "ByteLevel", "Digits", "Split", "Metaspace", "Whitespace", "Punctuation"},
    "decoder": {"Sequence", "ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Metaspace"},
    "model": {"BPE"},
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Tokenizer:
    """A model's tokenizer, made by from_gguf or from_folder.

    vocab_size     ids are 0 .. vocab_size - 1
    bos_id         the token that begins a text, or None; add_bos says whether encode puts it there
    eos_ids        the tokens that end a turn
    chat_template  Jinja text, or None
    """

    def __init__(
        self,
        backend: Any,
        source: str,
        *,
        vocab_size: int,
        kind: Literal["bytes", "spaces"],
        space_prefix: bool,
        bos_id: int | None,
        add_bos: bool,
        eos_ids: set[int],
        names: dict[str, str],
        chat_template: str | None,
    ) -> None:
        self._backend, self._source, self._kind, self._space_prefix = backend, source, kind, space_prefix
        self.bos_id, self.add_bos, self.eos_ids, self.chat_template = bos_id, add_bos, eos_ids, chat_template
        self.vocab_size, self._names = vocab_size, names
        self._added = backend.get_added_tokens_decoder()
        self._special = {i for i, token in self._added.items() if token.special}
        self.eos_ids |= {i for i in self._special if self._added[i].content in _END_NAMES}
        self._bytes: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"Tokenizer({self._source!r}, vocab_size={self.vocab_size})"

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Text to ids. Names of control tokens in the text become those tokens, as a rendered chat needs.

        add_bos None does what the file says; a text that already begins with that token does not get it twice. What
        the vocabulary cannot spell (a byte-level vocabulary may lack rare bytes) is left out, as the model's own
        tokenizer does.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: must be a str, not {type(text).__name__}")
        with foreign("text: cannot be tokenized"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Ids to text. Bytes that are no UTF-8 become U+FFFD; ids without a token say nothing."""
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.end()])

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> Stream:
        """A decoder that takes one id at a time. `continues`: the text goes on from a prompt, so the space before its
        first word stays (SentencePiece writes one before every text, which decode takes away)."""
        return Stream(self, skip_special, strip=self._space_prefix and not continues)

    def chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation: messages are dicts with "role" and "content"; variables reach the template.

        The template is foreign code; see chat_template.py. Raises ValueError where it refuses or fails.
        """
        if self.chat_template is None:
            raise ValueError(f"{self._source}: has no chat template")
        if not isinstance(messages, (list, tuple)) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError('messages: must be a list of dicts with "role" and "content"')
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **self._names, **variables}
        return render(self.chat_template, given)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the text; control tokens their name."""
        token = _id(token)
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        text = self._backend.id_to_token(token) if token < self.vocab_size else None
        if text is None:
            return b""
        if self._kind == "bytes":
            return b"".join(_BYTE_OF[c] if c in _BYTE_OF else c.encode() for c in text)
        match = _BYTE_TOKEN.match(text)
        return bytes([int(match[1], 16)]) if match else text.replace("\u2581", " ").encode()


class Stream:
    """Turns ids into text as they come: `push` gives the text that is certain by now, `end` the rest."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, strip: bool) -> None:
        self._tokenizer, self._strip = tokenizer, strip
        self._skip = tokenizer._special if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if _id(token) in self._skip:
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


def _id(token: Any) -> int:
    """A Python int of any integer, a tensor of one too: those hash by identity."""
    try:
        number = operator.index(token)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"ids: a token must be an int of at least 0, not {token!r}")
    return number


def _byte_characters() -> dict[str, bytes]:
    """The characters that stand for bytes in a byte-level vocabulary: printable Latin-1 stands for itself, the other
    bytes in their order for U+0100 onwards."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in own]
    return {chr(b): bytes([b]) for b in own} | {chr(256 + i): bytes([b]) for i, b in enumerate(other)}


_BYTE_OF = _byte_characters()


# GGUF


def from_gguf(gguf: GGUF) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file; FileError if it is incomplete or of an unknown kind."""
    meta = Metadata(gguf)
    model = meta.get("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise FileError(gguf.path, f"tokenizer.ggml.model is {model!r}; supported are 'gpt2' and 'llama'")
    tokens = meta.list("tokenizer.ggml.tokens", str)
    count = len(tokens)
    if count > MAX_TOKENS:
        raise FileError(gguf.path, f"has {count} tokens; at most {MAX_TOKENS} are read")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != count:
        raise FileError(gguf.path, "tokenizer.ggml.tokens has the same token twice")
    types = meta.list("tokenizer.ggml.token_type", int, count)
    ids = {
        n: meta.token(f"tokenizer.ggml.{n}_token_id", count) for n in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    if model == "gpt2":
        backend, add_bos = byte_level(meta, vocab)
        space_prefix = False
    else:
        space_prefix = meta.get("tokenizer.ggml.add_space_prefix", bool, True)
        backend, add_bos = sentencepiece(meta, tokens, vocab, types, ids["unknown"], space_prefix), True
    package = require("tokenizers")
    control = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    user = [t for t, kind in zip(tokens, types, strict=True) if kind == USER]
    with foreign("special tokens", FileError, gguf.path):
        backend.add_special_tokens([package.AddedToken(t, normalized=False, special=True) for t in control])
        backend.add_tokens([package.AddedToken(t, normalized=False) for t in user])
    names = {f"{n}_token": tokens[i] for n, i in ids.items() if i is not None and n in ("bos", "eos")}
    return Tokenizer(
        backend,
        gguf.path,
        vocab_size=count,
        kind="bytes" if model == "gpt2" else "spaces",
        space_prefix=space_prefix,
        bos_id=ids["bos"],
        add_bos=meta.get("tokenizer.ggml.add_bos_token", bool, add_bos),
        eos_ids={i for n, i in ids.items() if i is not None and n in ("eos", "eot", "eom")},
        names=names,
        chat_template=_bounded(gguf.path, meta.get("tokenizer.chat_template", str)),
    )


def _bounded(path: str, template: str | None) -> str | None:
    if template is not None and len(template) > MAX_TEMPLATE:
        raise FileError(path, f"has a chat template of {len(template)} characters; at most {MAX_TEMPLATE} are read")
    return template


# Hugging Face folders


def from_folder(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, with tokenizer_config.json, generation_config.json,
    config.json and chat_template.jinja where they are. FileError if something is wrong or of an unknown kind."""
    folder = Path(path)
    file = folder / "tokenizer.json"
    spec = read_json(file, MAX_JSON)
    for part, allowed in _PARTS.items():
        for kind in _types(spec.get(part)):
            if kind not in allowed:
                raise FileError(file, f"{part} {kind!r} is not supported; supported are {', '.join(sorted(allowed))}")
    if not isinstance(spec.get("model"), dict):
        raise FileError(file, "has no model")
    spec["truncation"] = spec["padding"] = None  # both would change what encode gives
    spec["model"]["dropout"] = None
    decoders = {str(d.get("type")): d for d in _parts(spec.get("decoder"))}
    if "ByteLevel" not in decoders and not decoders.keys() & {"ByteFallback", "Metaspace"}:
        raise FileError(file, f"decoder {', '.join(decoders) or None} is not byte-level or SentencePiece's")
    prefix = "Strip" in decoders or decoders.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    with foreign("is no tokenizer", FileError, os.fspath(file)):
        backend = require("tokenizers").Tokenizer.from_str(json.dumps(spec))
        begins = backend.encode("").ids[:1]
    config, generation, model = (
        read_json(folder / n, MAX_JSON) if (folder / n).exists() else {}
        for n in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    names = {n: text for n in ("bos_token", "eos_token", "unk_token", "pad_token") if (text := _content(config.get(n)))}
    with foreign("special tokens", FileError, os.fspath(folder)):
        ids = {n: backend.token_to_id(text) for n, text in names.items()}
    ends = [ids.get("eos_token")]
    for value in (generation.get("eos_token_id"), model.get("eos_token_id")):
        ends += value if isinstance(value, list) else [value]
    bos = ids["bos_token"] if "bos_token" in ids else model.get("bos_token_id")
    bos = bos if type(bos) is int and bos >= 0 else None
    return Tokenizer(
        backend,
        os.fspath(folder),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        kind="bytes" if "ByteLevel" in decoders else "spaces",
        space_prefix=prefix,
        bos_id=bos,
        add_bos=bos is not None and begins == [bos],
        eos_ids={i for i in ends if type(i) is int and i >= 0},
        names=names,
        chat_template=_bounded(os.fspath(folder), _folder_template(folder, config)),
    )


def _parts(spec: Any) -> Iterator[dict]:
    """A component of tokenizer.json and those inside its sequences."""
    if isinstance(spec, dict):
        yield spec
        for inner in ("normalizers", "pretokenizers", "decoders"):
            parts = spec.get(inner)
            for part in parts if isinstance(parts, list) else ():
                yield from _parts(part)


def _types(spec: Any) -> Iterator[str]:
    return (str(part.get("type")) for part in _parts(spec))


def _content(token: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _folder_template(folder: Path, config: dict) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_small(file, MAX_TEMPLATE).decode("utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None
