"""From the tensors of a file to a Llama: names, shapes, and which module holds a weight.

A file is foreign: every size of its header is compared with the tensors it has before anything is built from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import nn
from ..quantized import QuantizedTensor
from .transformer import Llama, LlamaConfig

Tensors = Mapping[str, Any]  # name -> torch.Tensor or QuantizedTensor, read at each access
Infos = Mapping[str, Any]  # name -> what the header says of a tensor: its shape
Progress = Callable[[Iterable], Iterable]

GGUF_NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "blk.{}.attn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "out": "blk.{}.attn_output",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "mlp_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
}
HF_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "out": "model.layers.{}.self_attn.o_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}


def from_gguf(source: Any, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
              act_bits: int | None = None, dequantize: bool = False, progress: Progress = iter) -> Llama:  # fmt: skip
    """A Llama of a GGUF file.

    source      a path, or what pyarch.io.gguf.load returned
    dtype       of activations, the cache, and weights that the file does not quantise
    act_bits    None, or 8 to round activations to int8 in the matmuls (changes answers)
    dequantize  hold every weight as numbers in `dtype`: for comparison
    progress    wraps the iterable of layers, as tqdm does
    Quantised weights are prepacked (nn.prepack) for the device's kernels, where these take dtype and the format: GPU
    kernels take bfloat16 and float16. explain(quant_matmul, x, layer.weight) says which kernel a layer has.
    Raises ValueError for a file that is not a model of architecture llama, qwen2 or qwen3.
    """
    if isinstance(source, (str, Path)):
        from ..io import gguf

        source = gguf.load(source)
    config = gguf_config(source.metadata, source.infos, source.tensors)
    ignored = {"rope_freqs.weight"}
    return _build(config, source.tensors, GGUF_NAMES, ignored, dtype, device, act_bits, dequantize, progress)


def from_pretrained(source: Any, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                    act_bits: int | None = None, progress: Progress = iter) -> Llama:  # fmt: skip
    """A Llama of a Hugging Face folder with config.json and safetensors; options as in `from_gguf`.

    Raises ValueError for a folder that is not a model of type llama, mistral, qwen2 or qwen3.
    """
    if isinstance(source, (str, Path)):
        from ..io import checkpoint

        source = checkpoint.load(source)
    config = hf_config(source.config, source.infos)
    ignored = {n for n in source.tensors if n.endswith("rotary_emb.inv_freq")}
    if config.tied:
        ignored.add("lm_head.weight")
    return _build(config, source.tensors, HF_NAMES, ignored, dtype, device, act_bits, False, progress)


def gguf_config(metadata: Mapping[str, Any], infos: Infos, tensors: Tensors) -> LlamaConfig:
    """The shape of a GGUF file's model. Raises ValueError naming the key."""
    arch = metadata.get("general.architecture")
    if arch not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"general.architecture: must be llama, qwen2 or qwen3, not {arch!r}")

    def key(name: str) -> str:
        return f"{arch}.{name}"

    hidden, heads = _count(metadata, key("embedding_length")), _count(metadata, key("attention.head_count"))
    head_dim = _count(metadata, key("attention.key_length"), hidden // heads)
    if _count(metadata, key("attention.value_length"), head_dim) != head_dim:
        raise ValueError(f"{key('attention.value_length')}: must be equal to key_length")
    if _count(metadata, key("rope.dimension_count"), head_dim) != head_dim:
        raise ValueError(
            f"{key('rope.dimension_count')}: must be the head size {head_dim} (partial rotary is not built)"
        )
    scaling = {
        "rope_type": metadata.get(key("rope.scaling.type"), "default"),
        "factor": metadata.get(key("rope.scaling.factor"), 1.0),
    }
    theta = _number(metadata, key("rope.freq_base"), 10000.0)
    factors = _rope_factors(scaling, head_dim, theta)
    if "rope_freqs.weight" in tensors:
        factors = tuple(tensors["rope_freqs.weight"].float().flatten().tolist())
    return LlamaConfig(
        vocab_size=_vocabulary(infos, GGUF_NAMES),
        hidden_size=hidden,
        intermediate_size=_count(metadata, key("feed_forward_length")),
        num_layers=_layers(_count(metadata, key("block_count")), infos, GGUF_NAMES),
        num_heads=heads,
        num_kv_heads=_count(metadata, key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        max_positions=_count(metadata, key("context_length")),
        norm_eps=_number(metadata, key("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_factors=factors,
        rope_interleaved=arch == "llama",  # the converter permutes q and k rows of this architecture only
        window=_count(metadata, key("attention.sliding_window"), 0) or None,
        **_present(infos, GGUF_NAMES),
    )


def hf_config(config: Mapping[str, Any], infos: Infos) -> LlamaConfig:
    """The shape of a Hugging Face model. Raises ValueError naming the key of config.json."""
    kind = config.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"model_type: must be llama, mistral, qwen2 or qwen3, not {kind!r}")
    if config.get("quantization_config"):
        raise ValueError("quantization_config: quantised Hugging Face checkpoints are not read yet; a GGUF file is")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act: must be silu, not {config['hidden_act']!r}")
    if kind.startswith("qwen") and config.get("use_sliding_window"):
        raise ValueError("use_sliding_window: windows on some layers only are not built")
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    head_dim = _count(config, "head_dim", hidden // heads)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = _number(rope if "rope_theta" in rope else config, "rope_theta", 10000.0)
    window = _count(config, "sliding_window", 0) if kind == "mistral" else 0
    present = _present(infos, HF_NAMES)
    return LlamaConfig(
        vocab_size=_vocabulary(infos, HF_NAMES),
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_layers=_layers(_count(config, "num_hidden_layers"), infos, HF_NAMES),
        num_heads=heads,
        num_kv_heads=_count(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        max_positions=_count(config, "max_position_embeddings"),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_factors=_rope_factors(rope, head_dim, theta),
        window=window or None,
        **{**present, "tied": bool(config.get("tie_word_embeddings", False)) or present["tied"]},
    )


def _count(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size of the header: an integer that no honest file exceeds."""
    value = values.get(key)
    if value is None:
        value = default
    least = 0 if default == 0 else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 24:
        raise ValueError(f"{key}: must be an integer from {least} to {(1 << 24) - 1}, not {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{key}: must be a positive number, not {value!r}")
    return float(value)


def _rope_factors(scaling: Mapping[str, Any], head_dim: int, theta: float) -> tuple[float, ...] | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "none"):
        return None
    if kind == "linear":
        return (_number(scaling, "factor"),) * (head_dim // 2)
    if kind == "llama3":
        return nn.llama3_factors(
            head_dim, theta, factor=_number(scaling, "factor"),
            low_freq_factor=_number(scaling, "low_freq_factor"), high_freq_factor=_number(scaling, "high_freq_factor"),
            original_positions=_count(scaling, "original_max_position_embeddings"),
        )  # fmt: skip
    raise ValueError(f"rope_type: must be default, linear or llama3, not {kind!r}")


def _vocabulary(infos: Infos, names: Mapping[str, str]) -> int:
    name = names["embed"] + ".weight"
    if name not in infos or len(infos[name].shape) != 2:
        raise ValueError(f"{name}: must be a matrix of this file")
    return infos[name].shape[0]


def _layers(count: int, infos: Infos, names: Mapping[str, str]) -> int:
    for i in range(count):  # ends at the first that is missing, whatever the header claims
        if (name := names["attention_norm"].format(i) + ".weight") not in infos:
            raise ValueError(f"{name}: is missing, though the header counts {count} layers")
    return count


def _present(infos: Infos, names: Mapping[str, str]) -> dict[str, bool]:
    """The parts that a model has or has not, told by its first layer."""
    first = {part: name.format(0) for part, name in names.items()}
    return {
        "qkv_bias": any(first[p] + ".bias" in infos for p in "qkv"),
        "out_bias": first["out"] + ".bias" in infos,
        "mlp_bias": any(first[p] + ".bias" in infos for p in ("gate", "up", "down")),
        "qk_norm": first["q_norm"] + ".weight" in infos,
        "tied": first["head"] + ".weight" not in infos,
    }


def _build(config: LlamaConfig, tensors: Tensors, names: Mapping[str, str], ignored: set[str], dtype: torch.dtype,
           device, act_bits: int | None, dequantize: bool, progress: Progress) -> Llama:  # fmt: skip
    unused = set(tensors) - ignored

    def take(part: str, layer: int, *shape: int, bias: bool = False, optional: bool = False) -> Any:
        """One tensor in its final form: matrices in dtype or quantised, vectors in float32."""
        name = names[part].format(layer) + (".bias" if bias else ".weight")
        if name not in tensors:
            if optional:
                return None
            raise ValueError(f"{name}: is missing")
        unused.discard(name)
        value = tensors[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: shape must be {shape}, not {tuple(value.shape)}")
        if isinstance(value, QuantizedTensor):
            if len(shape) != 2:
                raise ValueError(f"{name}: must not be quantised")
            return value.dequantize(dtype).to(device) if dequantize else value.to(device)
        if not value.is_floating_point():
            raise ValueError(f"{name}: dtype must be floating, not {value.dtype}")
        return value.to(device, dtype if len(shape) == 2 or bias else torch.float32)

    def project(parts: dict[str, int], layer: int, columns: int) -> nn.Module:
        """Projections of the same input: part -> rows."""
        weights = [take(p, layer, rows, columns) for p, rows in parts.items()]
        biases = [take(p, layer, rows, bias=True, optional=True) for p, rows in parts.items()]
        return packed(nn.parallel(weights, biases, act_bits=act_bits))

    def packed(layer: nn.Module) -> nn.Module:
        """In the order of its device's kernels, where one takes it."""
        nn.prepack(layer.eval(), dtype)
        return layer

    c, heads, kv = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    with torch.device("meta"):
        model = Llama(c)
    table = take("embed", 0, c.vocab_size, c.hidden_size)
    head: Any = nn.linear(table if c.tied else take("head", 0, c.vocab_size, c.hidden_size), act_bits=act_bits)
    model.head = packed(head)
    if isinstance(table, QuantizedTensor):  # not packed for its own sake: only rows are picked
        model.embed = nn.QuantizedEmbedding(head.weight if c.tied else table, dtype=dtype)
    else:
        model.embed = nn.Embedding.from_pretrained(table, freeze=False)
        if c.tied:
            head.weight = model.embed.weight
    for i, block in progress(list(enumerate(model.layers))):
        attention, mlp = block.attention, block.mlp
        block.attention_norm.weight = _parameter(take("attention_norm", i, c.hidden_size))
        attention.qkv = project({"q": heads, "k": kv, "v": kv}, i, c.hidden_size)
        if c.qk_norm:
            attention.q_norm = _parameter(take("q_norm", i, c.head_dim))
            attention.k_norm = _parameter(take("k_norm", i, c.head_dim))
        attention.out = project({"out": c.hidden_size}, i, heads)
        block.mlp_norm.weight = _parameter(take("mlp_norm", i, c.hidden_size))
        mlp.gate_up = project({"gate": c.intermediate_size, "up": c.intermediate_size}, i, c.hidden_size)
        mlp.down = project({"down": c.hidden_size}, i, c.intermediate_size)
    model.norm.weight = _parameter(take("norm", 0, c.hidden_size))
    if unused:
        raise ValueError(f"tensors: the model has no place for {', '.join(sorted(unused)[:5])}")
    return model.eval()


def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value)
