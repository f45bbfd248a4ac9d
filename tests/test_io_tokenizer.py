"""Tokenizers from GGUF metadata: encoding against the algorithms' definitions, streaming against decoding."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from io_files import TEXT, byte_level, made, sentencepiece, spelled

from pyarch.cli import weights
from pyarch.io import FileError
from pyarch.io import gguf as gguf_file
from pyarch.io import tokenizer as tokenizers

pytest.importorskip("tokenizers")
pytest.importorskip("gguf")


def merge_by_rank(symbols, rank):
    """The definition of BPE: of the neighbours that may be joined, join the best, the leftmost of equals."""
    while True:
        best = min(((rank[p], i) for i, p in enumerate(itertools.pairwise(symbols)) if p in rank), default=None)
        if best is None:
            return symbols
        i = best[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


near = st.text(st.sampled_from("thecainb t  \n.é1234漢x🎉'"), max_size=60)  # what the small vocabularies have, mostly


def test_byte_level_is_bpe_on_bytes():
    metadata = byte_level()
    rank = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = made(metadata)

    @settings(max_examples=300, deadline=None)
    @given(near)
    @example(TEXT)
    def check(text):
        words = re.findall(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text)
        ids = [vocab[s] for w in words for s in merge_by_rank([*spelled(w)], rank)]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text

    check()


def test_sentencepiece_joins_the_best_score():
    metadata = sentencepiece()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {t: i for i, t in enumerate(tokens)}
    joins = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 1]
    rank = {(t[:i], t[i:]): -scores[vocab[t]] for t in joins for i in range(1, len(t))}
    tokenizer = made(metadata)

    @settings(max_examples=300, deadline=None)
    @given(near)
    @example("that bath, the  hat in 2 漢 é")
    def check(text):
        if not text:
            return
        pieces = merge_by_rank([*("▁" + text.replace(" ", "▁"))], rank)
        ids = [i for p in pieces for i in ([vocab[p]] if p in vocab else [vocab[f"<0x{b:02X}>"] for b in p.encode()])]
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.decode([1, *ids]) == text

    check()


def test_sentencepiece_falls_back_to_bytes():
    tokenizer = made(sentencepiece())
    ids = tokenizer.encode("🎉z", add_bos=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b" ", *(bytes([b]) for b in "🎉z".encode())]
    assert tokenizer.decode(ids) == "🎉z"
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_space_prefix():
    with_prefix, without = made(sentencepiece()), made(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    assert with_prefix.encode("the", add_bos=False) != without.encode("the", add_bos=False)
    for tokenizer in (with_prefix, without):
        for text in ("the hat", " the hat", "  the", "", " "):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = with_prefix.encode("the", add_bos=False)
    stream = with_prefix.stream(continues=True)
    assert "".join(map(stream.push, ids)) + stream.end() == " the"


def test_control_and_user_tokens():
    tokenizer = made(byte_level())
    tokens = byte_level()["tokenizer.ggml.tokens"]
    end, other, user = (tokens.index(t) for t in ("<|im_end|>", "<|x|>", "my cat"))
    ids = tokenizer.encode("my cat<|im_end|>in<|x|>")
    assert ids == [user, end, tokens.index("in"), other]
    assert tokenizer.decode(ids) == "my catin"
    assert tokenizer.decode(ids, skip_special=False) == "my cat<|im_end|>in<|x|>"
    assert tokenizer.eos_ids == {end, other}  # the file's eos, and the one every chat model means
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids)) == "my catin"
    with pytest.raises(ValueError, match="ids"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match="ids"):
        tokenizer.decode(["a"])
    with pytest.raises(TypeError, match="text"):
        tokenizer.encode(b"a")
    with pytest.raises(ValueError, match="text"):
        tokenizer.encode("\ud800")


def test_bos_is_added_once():
    bos = byte_level()["tokenizer.ggml.bos_token_id"]
    plain = made(byte_level())
    assert plain.encode("a", add_bos=True)[0] == bos
    assert plain.encode("a")[0] != bos
    file_says = made(byte_level(**{"tokenizer.ggml.add_bos_token": True}))
    assert file_says.encode("a") == plain.encode("a", add_bos=True)
    assert file_says.encode("<|x|>a") == file_says.encode("a")
    assert made(byte_level("llama-bpe")).encode("")[0] == bos
    assert made(sentencepiece(**{"tokenizer.ggml.add_bos_token": False})).encode("") == []


CUTS = {  # pre-tokenizer -> how it cuts "It's 12345 déjà\n\n  x"
    "gpt-2": ["It", "'s", " 12345", " déjà", "\n\n ", " x"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", "5", " déjà", "\n\n ", " x"],
    "llama-bpe": ["It", "'s", " ", "123", "45", " déjà", "\n\n", " ", " x"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " déjà", "\n\n", " ", " x"],
    "tekken": ["It", "'s", " ", "1", "2", "3", "4", "5", " déjà", "\n\n", " ", " x"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_words_are_cut_as_the_model_cuts_them(pre):
    backend = made(byte_level(pre))._backend
    cut = [w for w, _ in backend.pre_tokenizer.pre_tokenize_str("It's 12345 déjà\n\n  x")]
    assert cut == [spelled(w) for w in CUTS[pre]]


@pytest.mark.parametrize("metadata", [byte_level(), sentencepiece()], ids=["bytes", "spaces"])
def test_any_text_comes_back(metadata):
    tokenizer = made(metadata)

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False).removeprefix("<s>").lstrip(
            " "
        ) == text.lstrip(" ")

    check()


@pytest.mark.parametrize("metadata", [byte_level(), sentencepiece()], ids=["bytes", "spaces"])
def test_a_stream_says_what_decode_says(metadata):
    tokenizer = made(metadata)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    def check(ids):
        stream, pieces = tokenizer.stream(), []
        for i in ids:
            pieces.append(stream.push(i))
            pieces[-1].encode()  # whole characters only
        assert "".join(pieces) + stream.end() == tokenizer.decode(ids)
        visible = b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer._special)
        text = visible.decode("utf-8", errors="replace")
        assert tokenizer.decode(ids) == (text.removeprefix(" ") if tokenizer._space_prefix else text)

    check()


def test_a_character_is_held_back_until_it_is_whole():
    tokenizer = made(byte_level())
    stream = tokenizer.stream()
    said = [stream.push(i) for i in tokenizer.encode("🎉") + tokenizer.encode("é")]
    assert said == ["", "", "", "🎉", "é"]
    assert stream.end() == ""
    stream.push(tokenizer.encode("🎉")[0])
    assert stream.end() == "\ufffd"


BROKEN = {
    "model": ({"tokenizer.ggml.model": "bert"}, "'bert'; supported are 'gpt2'"),
    "no model": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is None"),
    "pre": ({"tokenizer.ggml.pre": "mystery"}, "tokenizer.ggml.pre is 'mystery'"),
    "no pre": ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens must be a list of str"),
    "tokens of numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of str"),
    "token twice": ({"tokenizer.ggml.tokens": ["a", "a"]}, "same token twice"),
    "types short": ({"tokenizer.ggml.token_type": [1]}, "1 values for"),
    "no types": ({"tokenizer.ggml.token_type": None}, "token_type must be a list"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges must be a list"),
    "merge of three": ({"tokenizer.ggml.merges": ["a b c"]}, "no pair of tokens"),
    "merge of unknown": ({"tokenizer.ggml.merges": ["a qq"]}, "no pair of tokens"),
    "merge to unknown": ({"tokenizer.ggml.merges": ["a b"]}, "no pair of tokens"),
    "eos outside": ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, outside"),
    "bos text": ({"tokenizer.ggml.bos_token_id": "1"}, "bos_token_id must be a int"),
    "template a number": ({"tokenizer.chat_template": 5}, "chat_template must be a str"),
    "template long": ({"tokenizer.chat_template": "x" * (2 << 20)}, "chat template of 2097152"),
}
BROKEN_PIECES = {
    "no scores": ({"tokenizer.ggml.scores": None}, "scores must be a list of float"),
    "scores short": ({"tokenizer.ggml.scores": [0.0]}, "1 values for"),
    "score nan": ({"tokenizer.ggml.scores": [float("nan")] * len(sentencepiece()["tokenizer.ggml.tokens"])}, "finite"),
    "long piece": (
        {"tokenizer.ggml.tokens": ["a" * 10_000], "tokenizer.ggml.scores": [0.0], "tokenizer.ggml.token_type": [1]}
        | {f"tokenizer.ggml.{n}_token_id": 0 for n in ("bos", "eos", "unknown")},
        "10000 characters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_byte_level_metadata(case):
    change, says = BROKEN[case]
    with pytest.raises(FileError, match=re.escape("model.gguf: ") + ".*" + re.escape(says)):
        made(byte_level(**change))


@pytest.mark.parametrize("case", BROKEN_PIECES)
def test_broken_sentencepiece_metadata(case):
    change, says = BROKEN_PIECES[case]
    with pytest.raises(FileError, match=re.escape("model.gguf: ") + ".*" + re.escape(says)):
        made(sentencepiece(**change))


# The real thing, where the weights of the demo are


def smollm2():
    path = weights.find()
    if path is None:
        pytest.skip(f"the demo's weights are not here; {weights.HINT}")
    return gguf_file.load(path)


def test_smollm2():
    file = smollm2()
    tokenizer = tokenizers.from_gguf(file)
    assert (tokenizer.vocab_size, tokenizer.add_bos, tokenizer.bos_id) == (49152, False, 1)
    assert tokenizer.eos_ids == {0, 2}
    assert tokenizer.encode("What is the capital of France?") == [1780, 314, 260, 3575, 282, 4649, 47]
    text = "Café, 漢字 and 🎉 in 1984:\n\n\tdone."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1984")) == 4
    chat = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(chat)
    assert ids[:1] == [1]
    assert ids.count(2) == 2
    assert tokenizer.decode(ids, skip_special=False) == chat
    kinds = [info.type for info in file.infos.values()]
    assert (kinds.count("Q4_1"), kinds.count("Q8_0"), kinds.count("F32")) == (210, 1, 61)
