"""Small tokenizers as GGUF metadata, for the tests of files from outside."""

from pyarch.io import tokenizer
from pyarch.io.gguf import GGUF

BYTE_OF = tokenizer._BYTE_OF
CHAR_OF = {b[0]: c for c, b in BYTE_OF.items()}
TEXT = "The the cat, the hat; 1234 thé 漢字 🎉 in\n\nthat\t  bath "


def spelled(text):
    return "".join(CHAR_OF[b] for b in text.encode())


def byte_level(pre="gpt-2", **extra):
    """A byte-level model: all bytes, a few merges, a control token and a user's token."""
    pairs = ["t h", "th e", "Ġ the", "a t", "i n", "Ġ a", "Ã ©", "1 2", "12 3", "Ġ Ġ", "Ċ Ċ"]
    tokens = [CHAR_OF[b] for b in range(256)] + [p.replace(" ", "") for p in pairs] + ["<|im_end|>", "<|x|>", "my cat"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": pairs, "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.eos_token_id": tokens.index("<|x|>"), "tokenizer.ggml.bos_token_id": tokens.index("<|x|>"),
    }  # fmt: skip
    return {k: v for k, v in (metadata | extra).items() if v is not None}


def sentencepiece(**extra):
    """A SentencePiece model: control tokens, byte tokens, letters, pieces with distinct scores."""
    pieces = ["▁t", "he", "▁the", "at", "▁a", "in", "th", "▁th", "▁▁", "hat", "▁that", "ba", "▁ba", "the"]
    letters = [*"▁thecainb,;.1234é漢"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *pieces, "[INST]"]
    scores = [0.0] * 259 + [-100.0 - i for i in range(len(letters))] + [-1.0 - i for i in range(len(pieces))] + [0.0]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(letters) + len(pieces)) + [4]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    return {k: v for k, v in (metadata | extra).items() if v is not None}


def made(metadata):
    return tokenizer.from_gguf(GGUF("model.gguf", (), metadata, {}))
