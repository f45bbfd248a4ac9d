"""The layers of a decoder, and their short way: the operators that their checked calls made, in one call."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ..dispatch import forced
from ..native import Recorder, define, operator
from ._watched import Watched
from .attention import Attention, PagedBatch
from .linear import QuantizedLinear
from .mlp import SwiGLU
from .norm import RMSNorm
from .rotary import RotaryEmbedding

_OPS = ("rms_norm", "quant_matmul", "rotary_append", "paged_attention", "quant_matmul", "rms_norm", "quant_matmul",
        "swiglu", "quant_matmul")  # fmt: skip
_STEPS = [operator(name, "cpu") for name in _OPS]


def _fake(x, *_):
    return torch.empty_like(x), torch.empty_like(x)


define(
    "decoder_blocks",
    "(Tensor x, Tensor? residual, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor slot_mapping, Tensor block_table, Tensor seq_lens,"
    " Tensor? cu_seqlens_q, bool interleaved, int layers, int first) -> (Tensor, Tensor)",
    _fake,
)
_blocks = operator("decoder_blocks", "cpu")
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.flatten.using_ints}
_SETTINGS = ("act_bits", "eps", "window", "num_heads", "num_kv_heads", "head_dim", "forward")
_GLOBAL_HOOKS = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]


class DecoderBlock(Watched):
    """x + attention(norm(x)), then x + mlp(norm(x)). The sum is formed inside the next norm, so a block takes and
    returns a pair: forward(x, residual, rope, batch, layer) -> (y, residual), whose sum is the layer's output.

    residual  like x, or None in the first layer
    batch     None: x (B, S, hidden_size) are whole sequences. A PagedBatch: x (T, hidden_size) are its new tokens,
              whose keys and values go to layer `layer` of its cache
    """

    OPS = frozenset(_OPS)  # what the operator decoder_blocks consists of

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: SwiGLU) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = attention_norm, attention, mlp_norm, mlp

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, rope: RotaryEmbedding,
                batch: PagedBatch | None = None, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        y, residual = (self.attention_norm(x), x) if residual is None else self.attention_norm(x, residual)
        y, residual = self.mlp_norm(self.attention(y, rope, batch, layer), residual)
        return self.mlp(y), residual


class DecoderBlocks(torch.nn.ModuleList):
    """Blocks one after the other: forward(x, rope, batch) -> (y, residual) of the last, arguments as a block's.

    Public functions check their arguments and choose a backend in every call, which for one token costs more than the
    small ops do. So the first cached call of few tokens notes what each block did. Where that was the nine CPU
    operators of quantised projections and nothing else, the next calls do the same in one
    (csrc/cpu/decoder_blocks.cpp), as long as nothing that decided it has changed: dtypes, `use_backend`, the modules,
    their tensors, settings and hooks, no autograd, no compiler. CPU operators recheck all that memory safety needs.
    """

    FEW = 16  # tokens: in longer calls checks cost nothing beside the work, which then can be interrupted in between

    def __init__(self, blocks: Iterable[DecoderBlock] = ()) -> None:
        super().__init__(blocks)
        self._short: _ShortWay | None = None

    def forward(self, x: torch.Tensor, rope: RotaryEmbedding, batch: PagedBatch | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        if batch is not None and len(x) <= self.FEW and x.is_cpu and x.ndim == 2 and not (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):  # fmt: skip
            key = (x.dtype, batch.cache.layers_k.dtype, forced())
            if self._short is None or not self._short.holds(key):
                return self._learn(key, x, rope, batch)
            if not self._short.hooked():
                return self._short(x.contiguous(), rope, batch)
        residual = None
        for i, block in enumerate(self):
            x, residual = block(x, residual, rope, batch, i)
        return x, residual

    def _learn(self, key, x, rope, batch):
        residual, noted = None, []
        rope.tables(batch.length, x.device)  # makes what is missing, which is no part of a block
        for i, block in enumerate(self):
            inputs = x, residual
            with Recorder() as seen:
                x, residual = block(x, residual, rope, batch, i)
            noted.append(_constants(seen, inputs, (x, residual)) if _known(block.modules()) else None)
        self._short = _ShortWay(key, self, noted)
        return x, residual

    def __getstate__(self):
        return {**self.__dict__, "_short": None}


def _known(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether _SETTINGS are all that their results depend on besides tensors and modules."""
    return all(type(module) in (DecoderBlock, RMSNorm, Attention, SwiGLU, QuantizedLinear) for module in modules)


def _constants(seen: Recorder, inputs: tuple, outputs: tuple) -> tuple[list, list, list] | None:
    """What a block's operators get besides activations, the cache and positions, in the order that
    csrc/cpu/decoder_blocks.cpp names; None if the block did anything but pass results through the nine."""
    if [call for call, _ in seen.calls] != _STEPS or not seen.others <= _VIEWS:
        return None
    norm, qkv, rotary, attend, out, mlp_norm, gate_up, swiglu, down = (args for _, args in seen.calls)
    normed, qkv_y, q, attended, out_y, mlp_normed, gate_up_y, activated, y = seen.results
    passed = [
        (norm[0], inputs[0]), (norm[2], inputs[1]), (qkv[0], normed[0]), (rotary[0], qkv_y), (attend[0], q),
        (out[0], attended[0]), (mlp_norm[0], out_y), (mlp_norm[2], inputs[0] if inputs[1] is None else normed[1]),
        (gate_up[0], mlp_normed[0]), (swiglu[0], gate_up_y), (down[0], activated), (outputs[0], y),
        (outputs[1], mlp_normed[1]),
    ]  # fmt: skip
    if not all(a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr()) for a, b in passed):
        return None
    matmuls = [args[1:] for args in (qkv, out, gate_up, down)]
    head_norms, num_heads, head_eps = rotary[7:9], rotary[11], rotary[13]
    causal, left, right, softcap, scale = attend[9:]
    return (
        [norm[1], mlp_norm[1], *head_norms, *(t for args in matmuls for t in args[:6])],
        [num_heads, int(causal), left, right, *(n for args in matmuls for n in args[6:10])],
        [norm[3], mlp_norm[3], head_eps, softcap, scale, *(args[10] for args in matmuls)],
    )


class _ShortWay:
    """Runs of blocks in one call each, and all that must be as it was for that to be right."""

    def __init__(self, key: tuple, blocks: DecoderBlocks, noted: list[tuple[list, list, list] | None]) -> None:
        self.key, self.blocks = key, list(blocks)
        # (first block, number of its run in the library) or (block, None)
        self.runs: list[tuple[int, int | None]] = []
        i = 0
        while i < len(noted):
            run = list(itertools.takewhile(lambda block: block is not None, noted[i:]))
            kept = None
            if run:
                tensors, sizes, numbers = ([v for block in run if block for v in block[part]] for part in range(3))
                kept = torch.ops.pyarch.keep_decoder_blocks(tensors, sizes, numbers)
                weakref.finalize(self, torch.ops.pyarch.drop_decoder_blocks, kept).atexit = False
            self.runs.append((i, kept))
            i += max(len(run), 1)
        held: list[tuple[dict, str, Any]] = [(blocks._modules, name, block) for name, block in blocks._modules.items()]
        settings: list[tuple[dict, str, Any]] = []
        self.modules = [m for block, lists in zip(blocks, noted, strict=True) if lists for m in block.modules()]
        self.hooks = list(_GLOBAL_HOOKS)
        for module in self.modules:
            for values in (module._parameters, module._buffers, module._modules):
                held += [(values, name, value) for name, value in values.items()]
            settings += [(module.__dict__, name, module.__dict__.get(name)) for name in _SETTINGS]
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        self.held, self.settings = tuple(zip(*held, strict=True)), tuple(zip(*settings, strict=True))
        self.hooks_at = self.changes_at = -1

    def holds(self, key: tuple) -> bool:
        if key != self.key or not _same(*self.held):
            return False
        if self.changes_at != Watched.changes:
            if not _same(*self.settings) or not _known(self.modules):
                return False
            self.changes_at = Watched.changes
        return True

    def hooked(self) -> bool:
        if self.hooks_at != RemovableHandle.next_id:  # which every new hook counts up
            if any(self.hooks):
                return True
            self.hooks_at = RemovableHandle.next_id
        return False

    def __call__(self, x: torch.Tensor, rope: RotaryEmbedding, batch: PagedBatch):
        residual = None
        cos, sin = rope.tables(batch.length, x.device)
        for first, kept in self.runs:
            if kept is None:
                x, residual = self.blocks[first](x, residual, rope, batch, first)
            else:
                x, residual = _blocks(
                    x, residual, cos, sin, batch.positions, batch.cache.layers_k, batch.cache.layers_v,
                    batch.cache.layers_k_scale, batch.cache.layers_v_scale, batch.slots, batch.block_table,
                    batch.seq_lens, batch.cu_seqlens, rope.interleaved, kept, first,
                )  # fmt: skip
        return x, residual


def _same(places: Iterable[dict] = (), names: Iterable[str] = (), values: Iterable = ()) -> bool:
    """Whether places[i][names[i]] is values[i] for every i. All in C: a token pays for it."""
    return all(map(is_, map(dict.get, places, names), values))
