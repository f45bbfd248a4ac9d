"""A decoder layer, and its short way: the operators that its checked call made, in one call without the checks."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as torch_module

from ..dispatch import forced
from ..native import Recorder, define, operator
from .attention import Attention, PagedBatch
from .mlp import SwiGLU
from .norm import RMSNorm
from .rotary import RotaryEmbedding

_OPS = ("rms_norm", "quant_matmul", "rotary_append", "paged_attention", "quant_matmul", "rms_norm", "quant_matmul",
        "swiglu", "quant_matmul")  # fmt: skip
_STEPS = [operator(name, "cpu") for name in _OPS]


def _fake(x, residual, *_):
    return torch.empty_like(x), torch.empty_like(x)


define(
    "decoder_block",
    "(Tensor x, Tensor? residual, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor slot_mapping, Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q, bool interleaved,"
    " Tensor?[] tensors, int[] sizes, float[] numbers) -> (Tensor, Tensor)",
    _fake,
)
_block = operator("decoder_block", "cpu")
_SETTINGS = ("act_bits", "eps", "window", "num_heads", "num_kv_heads", "head_dim", "forward")
_GLOBAL_HOOKS = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]


class DecoderBlock(torch.nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The sum is formed inside the next norm, so a block takes and
    returns a pair: forward(x, residual, rope, batch, layer) -> (y, residual), whose sum is the layer's output.

    residual  like x, or None in the first layer
    batch     None: x (B, S, hidden_size) are whole sequences. A PagedBatch: x (T, hidden_size) are its new tokens,
              whose keys and values go to layer `layer` of its cache

    Public functions check their arguments and choose a backend in every call, which for one token costs more than the
    small ops do. So the first cached call notes which operators it made; where they are the nine CPU operators of
    quantised projections, the next calls make the same ones in one (csrc/cpu/decoder_block.cpp), as long as nothing
    that decided it has changed: dtype, `use_backend`, the modules, their tensors, settings and hooks, no autograd, no
    compiler. CPU operators recheck all that memory safety needs.
    """

    OPS = frozenset(_OPS)  # what the operator decoder_block consists of

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: SwiGLU) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = attention_norm, attention, mlp_norm, mlp
        self._short: _ShortWay | None = None
        self._tried: tuple | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, rope: RotaryEmbedding,
                batch: PagedBatch | None = None, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if batch is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.is_cpu:
            return self._whole(x, residual, rope, batch, layer)
        key = (x.dtype, forced())
        short = self._short
        if short is not None and self._tried == key and short.holds():
            if x.ndim == 2 and x.is_contiguous() and (residual is None or residual.is_contiguous()):
                return short(x, residual, rope, batch, layer)
        elif short is not None or self._tried != key:
            self._short, self._tried = None, key
            with Recorder() as noted:
                result = self._whole(x, residual, rope, batch, layer)
            if [call for call, _ in noted.calls] == _STEPS:
                self._short = _ShortWay(self, [args for _, args in noted.calls])
            return result
        return self._whole(x, residual, rope, batch, layer)

    def _whole(self, x, residual, rope, batch, layer):
        y, residual = (self.attention_norm(x), x) if residual is None else self.attention_norm(x, residual)
        y, residual = self.mlp_norm(self.attention(y, rope, batch, layer), residual)
        return self.mlp(y), residual

    def __getstate__(self):
        return {**self.__dict__, "_short": None, "_tried": None}


class _ShortWay:
    """The nine operators with the arguments that stay, and all that must be as it was for them to be right."""

    def __init__(self, block: DecoderBlock, calls: list[tuple]) -> None:
        norm, qkv, rotary, attend, out, mlp_norm, gate_up, _, down = calls
        matmuls = [args[1:] for args in (qkv, out, gate_up, down)]
        (*head_norms, num_heads), head_eps = rotary[7:10], rotary[11]
        causal, left, right, softcap, scale = attend[7:]
        # In the order that csrc/cpu/decoder_block.cpp names.
        self.tensors = [norm[1], mlp_norm[1], *head_norms, *(t for args in matmuls for t in args[:6])]
        self.sizes = [num_heads, int(causal), left, right, *(n for args in matmuls for n in args[6:10])]
        self.numbers = [norm[3], mlp_norm[3], head_eps, softcap, scale, *(args[10] for args in matmuls)]
        self.kept: list[tuple[dict, str, Any]] = []
        self.hooks = list(_GLOBAL_HOOKS)
        for module in block.modules():
            for values in (module._parameters, module._buffers, module._modules):
                self.kept += [(values, name, value) for name, value in values.items()]
            if module is not block:
                self.kept += [(module.__dict__, name, module.__dict__.get(name)) for name in _SETTINGS]
                self.hooks += [module._forward_hooks, module._forward_pre_hooks]

    def holds(self) -> bool:
        for values, name, value in self.kept:
            if values.get(name) is not value:
                return False
        return not any(self.hooks)

    def __call__(self, x, residual, rope, batch, layer):
        cos, sin = rope.tables(batch.length, x.device)
        return _block(x, residual, cos, sin, batch.positions, batch.cache.k[layer], batch.cache.v[layer], batch.slots,
                      batch.block_table, batch.seq_lens, batch.cu_seqlens, rope.interleaved, self.tensors, self.sizes,
                      self.numbers)  # fmt: skip
