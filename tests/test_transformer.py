"""Llama against transformers' logits, against itself (cached, in pieces, batched), and its loading of files."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyarch
from pyarch import nn
from pyarch.models import PRESETS, Llama, LlamaConfig, generate, perplexity

GOLDEN = Path(__file__).with_name("golden")
HF = SimpleNamespace(**runpy.run_path(str(GOLDEN / "hf_models.py")))
LOGITS = json.loads((GOLDEN / "hf_logits.json").read_text())["logits"]


@pytest.fixture
def tiny():
    torch.manual_seed(1)
    config = LlamaConfig(40, 32, 48, 2, 6, 2, 8, 64, rope_theta=100.0)
    return Llama(config).eval()


def logits_of(model: Llama, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens]))[0]


class TestAgainstTransformers:
    @pytest.mark.parametrize("name", LOGITS)
    def test_logits(self, name, tmp_path):
        pytest.importorskip("safetensors")
        HF.write_folder(name, tmp_path)
        got = logits_of(Llama.from_pretrained(tmp_path), HF.TOKENS)
        torch.testing.assert_close(got, torch.tensor(LOGITS[name]), rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("name", LOGITS)
    def test_judged_live(self, name, tmp_path):
        transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[judges]'")
        HF.write_folder(name, tmp_path)
        judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.inference_mode():
            want = judge(torch.tensor([HF.TOKENS]), use_cache=False).logits[0]
        torch.testing.assert_close(logits_of(Llama.from_pretrained(tmp_path), HF.TOKENS), want, rtol=1e-4, atol=2e-5)

    def test_half_precision_files(self, tmp_path):
        pytest.importorskip("safetensors")
        HF.write_folder("qwen3", tmp_path, torch.float16)  # the weights are exact in it
        got = logits_of(Llama.from_pretrained(tmp_path), HF.TOKENS)
        torch.testing.assert_close(got, torch.tensor(LOGITS["qwen3"]), rtol=1e-4, atol=2e-5)
        model = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert model.dtype == model.head.weight.dtype == torch.bfloat16
        assert (logits_of(model, HF.TOKENS).float() - got).abs().max() < 0.2


class TestCache:
    TOKENS = (3, 17, 4, 4, 39, 0, 25, 8, 8, 1, 30)

    def rows(self, model, pieces, page_size=4):
        cache = model.cache(8, page_size)
        sequence, rows = cache.allocate(), []
        with torch.inference_mode():
            for piece in pieces:
                rows.append(model.extend(cache, [sequence], [piece])[0])
        return rows

    @pytest.mark.parametrize("window", [None, 4])
    def test_cached_is_uncached(self, tiny, window):
        model = Llama(dataclasses.replace(tiny.config, window=window)).eval()
        model.load_state_dict(tiny.state_dict())
        whole = logits_of(model, list(self.TOKENS))
        steps = torch.stack(self.rows(model, [[t] for t in self.TOKENS]))
        torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)

    def test_prefill_in_pieces(self, tiny):
        t = list(self.TOKENS)
        whole = self.rows(tiny, [t])[-1]
        for pieces in ([t[:1], t[1:]], [t[:7], t[7:]], [[x] for x in t]):
            torch.testing.assert_close(self.rows(tiny, pieces)[-1], whole, rtol=1e-5, atol=1e-5)

    def test_batch_is_each_alone(self, tiny):
        prompts = [list(self.TOKENS), [5], [9, 9, 2, 31]]
        cache = tiny.cache(12, 4)
        sequences = [cache.allocate() for _ in prompts]
        with torch.inference_mode():
            first = tiny.extend(cache, sequences, prompts)
            mixed = tiny.extend(cache, sequences, [[6], [7, 8, 9], [1]])  # prefill and decode in one call
        for row, (prompt, more) in enumerate(zip(prompts, [[6], [7, 8, 9], [1]], strict=True)):
            alone = self.rows(tiny, [prompt, more])
            torch.testing.assert_close(first[row], alone[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mixed[row], alone[1], rtol=1e-5, atol=1e-5)

    def test_fork_goes_on_by_itself(self, tiny):
        cache = tiny.cache(12, 4)
        a = cache.allocate()
        with torch.inference_mode():
            tiny.extend(cache, [a], [list(self.TOKENS)])
            b = cache.fork(a)
            both = tiny.extend(cache, [a, b], [[1, 2], [3]])
        for row, more in enumerate([[1, 2], [3]]):
            want = self.rows(tiny, [list(self.TOKENS), more])[-1]
            torch.testing.assert_close(both[row], want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("tokens", "names"),
        [
            ([[40]], "tokens"),
            ([[-1]], "tokens"),
            ([[]], "tokens"),
            ([[1], [2]], "tokens"),
            ([[1] * 65], "context is 64"),
        ],
    )
    def test_refusals_change_nothing(self, tiny, tokens, names):
        cache = tiny.cache(20, 4)
        sequence = cache.allocate()
        with torch.inference_mode():
            tiny.extend(cache, [sequence], [[1, 2, 3]])
            with pytest.raises(ValueError, match=names):
                tiny.extend(cache, [sequence], tokens)
            with pytest.raises(ValueError, match="tokens"):
                tiny.extend(cache, [], [])
        assert cache.seq_lens([sequence]).tolist() == [3]

    def test_out_of_pages_changes_nothing(self, tiny):
        cache = tiny.cache(1, 4)
        sequence = cache.allocate()
        with torch.inference_mode():
            tiny.extend(cache, [sequence], [[1, 2, 3]])
            with pytest.raises(Exception, match="page"):
                tiny.extend(cache, [sequence], [[1, 2]])
        assert cache.seq_lens([sequence]).tolist() == [3]


class TestGenerate:
    def test_greedy_is_the_argmax_of_the_whole(self, tiny):
        tokens = [3, 1, 4]
        for token in generate(tiny, [3, 1, 4], max_tokens=8):
            assert token == int(logits_of(tiny, tokens)[-1].argmax())
            tokens.append(token)
        assert len(tokens) == 11

    def test_prompts_longer_than_a_piece(self, tiny, monkeypatch):
        whole = list(generate(tiny, list(range(20)), max_tokens=6))
        monkeypatch.setattr("pyarch.models.generation.PREFILL_TOKENS", 7)
        assert list(generate(tiny, list(range(20)), max_tokens=6)) == whole

    def test_seed_repeats(self, tiny):
        def draw(seed):
            return list(generate(tiny, [1, 2], max_tokens=20, temperature=1.5, top_k=30, seed=seed))

        assert draw(5) == draw(5)
        assert draw(5) != draw(6)

    def test_stops(self, tiny):
        free = list(generate(tiny, [3, 1, 4], max_tokens=8))
        assert list(generate(tiny, [3, 1, 4], max_tokens=8, stop={free[3]})) == free[: free.index(free[3])]
        assert list(generate(tiny, [3], max_tokens=0)) == []

    def test_ends_with_the_context(self, tiny):
        assert len(list(generate(tiny, [1] * 60, max_tokens=99))) == 5

    @pytest.mark.parametrize(
        ("prompt", "options", "names"),
        [
            ([], {}, "prompt"),
            ([40], {}, "prompt"),
            ([-1], {}, "prompt"),
            ([1] * 65, {}, "prompt"),
            ([1], dict(max_tokens=-1), "max_tokens"),
            ([1], dict(temperature=-1.0), "temperature"),
            ([1], dict(top_p=2.0), "top_p"),
        ],
    )
    def test_refuses_at_the_call(self, tiny, prompt, options, names):
        with pytest.raises(ValueError, match=names):
            generate(tiny, prompt, **options)

    def test_perplexity(self, tiny):
        with torch.no_grad():
            tiny.head.weight.zero_()
        assert abs(perplexity(tiny, [1, 2, 3]) - 40) < 1e-3


def test_trains(tiny):
    tiny.train()
    tokens = torch.randint(40, (2, 9))
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(tiny(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in tiny.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_has_gradients_after_it_answered(tiny):
    """What generation makes in inference mode and keeps is no obstacle to autograd."""
    list(generate(tiny, [1, 2, 3], max_tokens=2))
    tiny(torch.tensor([[1, 2, 3]])).sum().backward()
    assert tiny.head.weight.grad is not None


def test_presets_have_the_published_sizes():
    counts = {"smollm2-135m": 134_515_008, "llama-3.1-8b": 8_030_261_248, "mistral-7b": 7_241_732_096,
              "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920}  # fmt: skip
    for name, count in counts.items():
        with torch.device("meta"):
            model = Llama(PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == count, name


# ---- GGUF


QUANTISED = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
GGUF_SHAPES = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
               "ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}  # fmt: skip


def encoded(kind: str, shape: tuple[int, int], generator) -> tuple[object, object]:
    """(bytes of a GGUF matrix, the numbers that the gguf package reads in them)."""
    import gguf
    import numpy as np

    if kind in ("Q4_K", "Q5_K", "Q6_K"):
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        blocks = torch.randint(0, 256, (shape[0] * shape[1] // 256, block), generator=generator, dtype=torch.uint8)
        data = blocks.numpy()
        ends = np.array([6e-5 if kind == "Q6_K" else 3e-4], np.float16).view(np.uint8)
        at = (slice(-2, None),) if kind == "Q6_K" else (slice(0, 2), slice(2, 4))
        for span in at:
            data[:, span] = ends
        data = data.reshape(shape[0], -1)
    else:
        weights = (torch.randn(shape, generator=generator) * 0.08).numpy()
        data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    return data, gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def write_gguf(path, kinds: dict[str, str], *, arch="llama", layers=1, plain=False, skip=(), extra=(), **keys):
    """A one-layer model; kinds: tensor -> quantised type, F32 otherwise. plain: the same numbers, all F32."""
    import gguf
    import numpy as np

    generator = torch.Generator().manual_seed(7)
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in (
        dict(block_count=layers, context_length=64, embedding_length=256, feed_forward_length=512) | keys
    ).items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_uint32(f"{arch}.attention.head_count", 8)
    writer.add_uint32(f"{arch}.attention.head_count_kv", 4)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    shapes = {"token_embd": (48, 256), **{f"blk.0.{k}": v for k, v in GGUF_SHAPES.items()}}
    for name, shape in shapes.items():
        kind = kinds.get(name.removeprefix("blk.0."), "F32")
        data, numbers = encoded(kind, shape, generator)
        if name not in skip:
            if plain or kind == "F32":
                writer.add_tensor(name + ".weight", np.ascontiguousarray(numbers, dtype=np.float32))
            else:
                writer.add_tensor(name + ".weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm", *extra):
        if name not in skip:
            writer.add_tensor(name + ".weight", np.linspace(0.5, 1.5, 256, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGGUF:
    PROMPT = (5, 40, 0, 17, 17, 3)

    @pytest.fixture(autouse=True)
    def _needs_gguf(self):
        pytest.importorskip("gguf")

    def both(self, tmp_path, kinds, **keys):
        write_gguf(tmp_path / "a.gguf", kinds, **keys)
        write_gguf(tmp_path / "b.gguf", kinds, plain=True, **keys)
        return Llama.from_gguf(tmp_path / "a.gguf"), Llama.from_gguf(tmp_path / "b.gguf")

    @pytest.mark.parametrize("kind", [*QUANTISED, "F16", "BF16"])
    def test_types_are_used_exactly(self, kind, tmp_path):
        ours, plain = self.both(tmp_path, dict.fromkeys(["token_embd", *GGUF_SHAPES], kind))
        if kind in QUANTISED:
            assert isinstance(ours.layers[0].attention.qkv, nn.QuantizedLinear)
            assert isinstance(ours.embed, nn.QuantizedEmbedding)
        got, want = logits_of(ours, list(self.PROMPT)), logits_of(plain, list(self.PROMPT))
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * want.abs().max().item())

    def test_mixed_types(self, tmp_path):
        kinds = {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "ffn_gate": "Q4_K", "ffn_up": "Q4_K",
                 "ffn_down": "Q6_K", "token_embd": "Q6_K"}  # fmt: skip
        ours, plain = self.both(tmp_path, kinds)
        assert len(ours.layers[0].attention.qkv.parts) == 2
        got, want = logits_of(ours, list(self.PROMPT)), logits_of(plain, list(self.PROMPT))
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * want.abs().max().item())

    def test_dequantised(self, tmp_path):
        write_gguf(tmp_path / "a.gguf", dict.fromkeys(GGUF_SHAPES, "Q4_1"))
        ours = Llama.from_gguf(tmp_path / "a.gguf")
        plain = Llama.from_gguf(tmp_path / "a.gguf", dequantize=True)
        assert not any(isinstance(m, nn.QuantizedLinear) for m in plain.modules())
        want = logits_of(plain, list(self.PROMPT))
        atol = 2e-5 * want.abs().max().item()
        torch.testing.assert_close(logits_of(ours, list(self.PROMPT)), want, rtol=2e-5, atol=atol)
        with pyarch.use_backend("reference"):
            torch.testing.assert_close(logits_of(plain, list(self.PROMPT)), want, rtol=2e-5, atol=atol)

    def test_each_tensor_is_read_once(self, tmp_path, monkeypatch):
        from pyarch.io import gguf

        write_gguf(tmp_path / "a.gguf", {})
        read, get = [], gguf._Tensors.__getitem__
        monkeypatch.setattr(gguf._Tensors, "__getitem__", lambda self, name: read.append(name) or get(self, name))
        Llama.from_gguf(tmp_path / "a.gguf")
        assert sorted(read) == sorted(gguf.load(tmp_path / "a.gguf").infos)

    def test_answering_does_not_import_the_compiler(self, tmp_path):
        """It would be most of the time to the first token, and as much memory as the weights."""
        write_gguf(tmp_path / "a.gguf", dict.fromkeys(["token_embd", *GGUF_SHAPES], "Q4_1"))
        code = (
            "import sys; from pyarch.models import Llama, generate; from pyarch.cli.generate import operators\n"
            "model = Llama.from_gguf(sys.argv[1]); print(len(list(generate(model, [5, 40], max_tokens=3))))\n"
            "print(len(operators(model, [5])), 'torch._dynamo' in sys.modules)"
        )
        command = [sys.executable, "-P", "-c", code, str(tmp_path / "a.gguf")]  # this very pyarch, not the folder's
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.split() == ["3", "6", "False"], done.stderr

    def test_rotary_convention_of_the_architecture(self, tmp_path):
        write_gguf(tmp_path / "llama.gguf", {})
        write_gguf(tmp_path / "qwen.gguf", {}, arch="qwen2")
        assert Llama.from_gguf(tmp_path / "llama.gguf").config.rope_interleaved
        assert not Llama.from_gguf(tmp_path / "qwen.gguf").config.rope_interleaved

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            (dict(layers=2), "blk.1.attn_norm.weight: is missing"),
            (dict(layers=16_777_215), "blk.1.attn_norm.weight: is missing"),
            (dict(skip=("blk.0.attn_k",)), "blk.0.attn_k.weight: is missing"),
            (dict(skip=("token_embd",)), "token_embd.weight"),
            (dict(extra=("blk.0.ffn_exotic",)), "no place for blk.0.ffn_exotic"),
            (dict(embedding_length=128), "token_embd.weight: shape"),
            (dict(feed_forward_length=511), "blk.0.ffn_gate.weight: shape"),
            (dict(arch="mamba"), "general.architecture"),
        ],
        ids=str,
    )
    def test_foreign_files(self, tmp_path, options, names):
        write_gguf(tmp_path / "a.gguf", {}, **options)
        with pytest.raises(ValueError, match=names):
            Llama.from_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (dict(model_type="gpt2"), "model_type"),
        (dict(num_attention_heads=0), "num_attention_heads"),
        (dict(num_attention_heads=5), "num_kv_heads|q_proj"),
        (dict(num_hidden_layers=3), "model.layers.2.input_layernorm.weight: is missing"),
        (dict(num_hidden_layers="many"), "num_hidden_layers"),
        (dict(hidden_size=35), "shape"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "rope_type"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps"),
    ],
    ids=str,
)
def test_foreign_folders(tmp_path, change, names):
    pytest.importorskip("safetensors")
    HF.write_folder("llama", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF.config("llama") | change))
    with pytest.raises(ValueError, match=names):
        Llama.from_pretrained(tmp_path)
