"""Tiny Hugging Face models with weights of a formula, and `python tests/golden/hf_models.py`, which lets transformers
compute their logits and writes hf_logits.json beside this file. The tests then need no transformers.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch

COMMON = dict(
    vocab_size=48, hidden_size=36, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu",
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
CONFIGS: dict[str, dict] = {
    "llama": dict(model_type="llama", rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "llama-scaled-tied": dict(model_type="llama", rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-bias": dict(model_type="llama", attention_bias=True, mlp_bias=True,
                       rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1000.0)),
    "mistral": dict(model_type="mistral", sliding_window=5,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "qwen2": dict(model_type="qwen2", num_attention_heads=4, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen3": dict(model_type="qwen3", rope_parameters=dict(rope_type="default", rope_theta=1e6)),
}  # fmt: skip
TOKENS = [5, 17, 40, 2, 2, 33, 9, 21, 47, 0, 11, 30, 8]


def config(name: str) -> dict:
    return {**COMMON, "tie_word_embeddings": False, **CONFIGS[name]}


def tensors(name: str) -> dict[str, torch.Tensor]:
    """The state dict: numbers of an integer hash, so that they are the same everywhere."""
    c = config(name)
    d, hidden, mlp = c["head_dim"], c["hidden_size"], c["intermediate_size"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        at, ff = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes |= {at + f"{p}_proj.weight": (n, hidden) for p, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {at + "o_proj.weight": (hidden, q), ff + "down_proj.weight": (hidden, mlp)}
        shapes |= {ff + f"{p}_proj.weight": (mlp, hidden) for p in ("gate", "up")}
        if c["model_type"] == "qwen2" or c.get("attention_bias"):
            shapes |= {at + f"{p}_proj.bias": (n,) for p, n in (("q", q), ("k", kv), ("v", kv))}
        if c.get("attention_bias"):
            shapes |= {at + "o_proj.bias": (hidden,), ff + "down_proj.bias": (hidden,)}
            shapes |= {ff + f"{p}_proj.bias": (mlp,) for p in ("gate", "up")}
        if c["model_type"] == "qwen3":
            shapes |= {at + "q_norm.weight": (d,), at + "k_norm.weight": (d,)}
        shapes |= {f"model.layers.{i}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    return {key: _hashed(key, shape) for key, shape in shapes.items()}


def _hashed(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Multiples of 2^-10 between -1/4 and 1/4, norms around 1: exact in float16."""
    i = torch.arange(int(torch.tensor(shape).prod())) + zlib.crc32(key.encode())
    i = (i * 2654435761 % 2**32 ^ i >> 3) * 2246822519 % 2**32 >> 23
    values = (i - 256).float() / 1024
    return (values + 1 if "norm" in key else values).view(shape)


def write_folder(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The model as a Hugging Face folder, in one safetensors file."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config(name)))
    save_file({k: v.to(dtype) for k, v in tensors(name).items()}, folder / "model.safetensors")


def main() -> None:
    import tempfile

    import transformers

    logits = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(name, Path(folder))
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            out = model(torch.tensor([TOKENS]), use_cache=False).logits[0].double()
        logits[name] = [[round(v, 6) for v in row] for row in out.tolist()]
    text = json.dumps({"transformers": transformers.__version__, "logits": logits}, separators=(",", ":"))
    Path(__file__).with_name("hf_logits.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
