"""Tokenizers of Hugging Face folders: the same as from GGUF, and broken or hostile ones refused."""

import json
import re
import time

import pytest
from io_files import TEXT, byte_level, made, sentencepiece

from pyarch.io import FileError
from pyarch.io import tokenizer as tokenizers

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

MESSAGES = [{"role": "user", "content": "Hi"}]


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
        (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[]", "must be a JSON object"),
        (b"\xff{}", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"), (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"), (b"{}" + b" " * (64 << 20), "at most 67108864"),
    ],
)  # fmt: skip
def test_bad_json(tmp_path, content, says):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FileError, match=f"tokenizer.json: .*{says}"):
        tokenizers.from_folder(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(FileError, match=r"tokenizer\.json: no such file"):
        tokenizers.from_folder(tmp_path)
