"""DecoderBlocks: one operator after the first checked call, the same bits, and what makes it check again."""

import copy
import pickle
from unittest import mock

import pytest
import torch

import pyarch
from pyarch import nn
from pyarch._instruments import Operators
from pyarch.nn import block as block_module

_CHECKED = ["rms_norm", "quant_matmul", "rotary_append", "paged_attention", "quant_matmul", "rms_norm", "quant_matmul",
            "swiglu", "quant_matmul"]  # fmt: skip


class Steps:
    """Quantised blocks with a cache, fed one random row at a time."""

    def __init__(self, seed=0, count=2, cache_dtype=torch.float32, **options):
        torch.manual_seed(seed)
        self.blocks = nn.DecoderBlocks(self.make(**options) for _ in range(count))
        self.block = self.blocks[0]
        self.rope, self.cache = nn.RotaryEmbedding(16), nn.PagedKVCache(64, 4, count, 2, 16, dtype=cache_dtype)
        self.sequence = self.cache.allocate()
        self.x = torch.randn(1, 64)

    def make(self, **options):
        block = nn.DecoderBlock(
            nn.RMSNorm(64, 1e-5), nn.Attention(64, 4, 2, 16, **options), nn.RMSNorm(64, 1e-5), nn.SwiGLU(64, 96)
        )
        for owner, name in ((block.attention, "qkv"), (block.attention, "out"), (block.mlp, "gate_up"),
                            (block.mlp, "down")):  # fmt: skip
            setattr(owner, name, nn.QuantizedLinear.from_float(getattr(owner, name), group_size=32))
        return block

    def step(self, blocks=None, x=None, checked=False):
        """(operators that ran, y, residual) of the tokens x in a copy of the sequence."""
        x = self.x if x is None else x
        fork = self.cache.fork(self.sequence)
        batch = nn.PagedBatch.append(self.cache, [fork], [len(x)])
        with Operators() as seen:
            if checked:
                residual = None
                for i, block in enumerate(self.blocks):
                    x, residual = block(x, residual, self.rope, batch, i)
            else:
                x, residual = (blocks or self.blocks)(x, self.rope, batch)
        self.cache.free(fork)
        ran = [call.name().removeprefix("pyarch::") for call, _ in seen.calls]
        return [name.removesuffix("__cpu") for name in ran if name.endswith("__cpu")], x, residual

    def agrees(self, operators=("decoder_blocks",), x=None):
        """Whether the next step is the checked one, bit for bit, by these operators."""
        self.step(x=x)  # learns, if anything is new
        ran, y, r = self.step(x=x)
        _, want_y, want_r = self.step(x=x, checked=True)
        assert ran == list(operators)
        return torch.equal(y, want_y) and torch.equal(r, want_r)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.forward
@pytest.mark.usefixtures("no_grad")
class TestShortWay:
    """After their first cached call blocks make the same operator calls in one."""

    @pytest.mark.parametrize("options", [{}, dict(qk_norm=True, qkv_bias=True, out_bias=True), dict(window=2),
                                         dict(cache_dtype=torch.int8)], ids=str)  # fmt: skip
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_same_bits(self, options, tokens):
        steps = Steps(**options)
        assert steps.agrees(x=torch.randn(tokens, 64))
        assert set(steps.step(checked=True)[0]) == nn.DecoderBlock.OPS

    def test_a_cache_of_another_dtype_is_learnt_anew(self):
        steps, other = Steps(), nn.PagedKVCache(64, 4, 2, 2, 16, dtype=torch.int8)
        for _ in range(2):
            assert steps.agrees()
            steps.cache, steps.sequence, other = other, other.allocate(), steps.cache
            assert steps.step()[0] != ["decoder_blocks"]

    def test_threads(self):
        steps, threads = Steps(count=4), torch.get_num_threads()
        try:
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                for _ in range(20):
                    assert steps.agrees(x=torch.randn(2, 64))
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize(
        ("place", "change", "message"),
        [(0, lambda t: t[:-1], "tensors: must be 28"), (0, lambda t: [None, *t[1:]], "tensors: entry 0"),
         (0, lambda t: [t[0].to("meta"), *t[1:]], "tensors: must be on the CPU"),
         (0, lambda t: [t[1][:3], *t[1:]], "weight: "), (1, lambda n: n[1:], "sizes: must be 20"),
         (1, lambda n: [3, *n[1:]], "qkv: "), (1, lambda n: [*n[:4], 2**40, *n[5:]], "q: "),
         (2, lambda n: [*n, 0.0], "numbers: must be 9")],
    )  # fmt: skip
    def test_what_is_kept_is_refused(self, place, change, message):
        self.refuses(lambda lists, args: lists.__setitem__(place, change(lists[place])), message)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [("layers", 10**12, "layers: none are kept"), ("first", 2, "k_cache: must have layers"),
         ("first", -1, "k_cache: must have layers"), ("k_cache", torch.zeros(2, 4, 2, 16), "k_cache: must have layers"),
         ("v_cache", torch.zeros(0, 64, 4, 2, 16), "v_cache: must have layers"), ("x", torch.zeros(1, 63), "weight: "),
         ("k_scale", torch.zeros(1, 64, 4, 2), "k_scale: is for int8"),
         ("positions", torch.zeros(2, dtype=torch.int64), "positions: ")],
    )  # fmt: skip
    def test_call_is_refused(self, place, value, message):
        names = ("x", "residual", "cos", "sin", "positions", "k_cache", "v_cache", "k_scale", "v_scale", "slot_mapping",
                 "block_table", "seq_lens", "cu_seqlens_q", "interleaved", "layers", "first")  # fmt: skip
        self.refuses(lambda lists, args: args.__setitem__(names.index(place), value), message)

    def refuses(self, change, message):
        """The operator refuses lists for keep_decoder_blocks and arguments after this change; nothing is written."""
        steps = Steps(count=1)
        noted = []
        constants = block_module._constants
        with mock.patch.object(block_module, "_constants", lambda *a: noted.append(constants(*a)) or noted[-1]):
            steps.step()
        lists = [list(v) for v in noted[0]]
        with Operators() as ran:
            steps.step()
        args = list(ran.calls[0][1])
        bits = steps.cache.layers_k.view(torch.int32)  # unwritten slots may be NaN
        before = bits.clone()
        change(lists, args)

        def call():
            if args[-2] != 10**12:
                args[-2] = torch.ops.pyarch.keep_decoder_blocks(*lists)
            torch.ops.pyarch.decoder_blocks__cpu(*args)

        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
        assert torch.equal(bits, before)

    def test_kept_layers_are_dropped_once(self):
        steps = Steps()
        steps.step()
        number = steps.blocks._short.runs[0][1]
        steps.blocks._short = None
        with pytest.raises((ValueError, RuntimeError), match="layers: none are kept"):
            torch.ops.pyarch.drop_decoder_blocks(number)

    def test_backend_in_force(self):
        steps = Steps()
        _, want, _ = steps.step()
        with pyarch.use_backend("reference"):
            operators, y, _ = steps.step()
            assert operators == []
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        assert steps.agrees()

    def test_what_changes_is_seen(self):
        steps, other = Steps(), Steps(1)
        block, mlp = steps.block, steps.block.mlp
        changes = {
            "module": lambda: setattr(mlp, "down", other.block.mlp.down),
            "sub-block": lambda: setattr(block, "attention", other.block.attention),
            "block": lambda: steps.blocks.__setitem__(1, other.blocks[1]),
            "order": lambda: steps.blocks.__init__([steps.blocks[1], steps.blocks[0]]),
            "buffer": lambda: setattr(mlp.gate_up, "scale", mlp.gate_up.scale * 2),
            "in place": lambda: block.mlp_norm.weight.mul_(1.5),
            "parameter": lambda: setattr(block.attention_norm, "weight", torch.nn.Parameter(torch.rand(64))),
            "new bias": lambda: setattr(block.attention.out, "bias", torch.nn.Parameter(torch.rand(64))),
            "act_bits": lambda: setattr(mlp.gate_up, "act_bits", 8),
            "eps": lambda: setattr(block.mlp_norm, "eps", 0.5),
            "state": lambda: block.load_state_dict(other.block.state_dict(), strict=False, assign=True),
        }
        for name, change in changes.items():
            assert steps.agrees(), name
            _, before, _ = steps.step()
            change()
            _, after, _ = steps.step()
            assert not torch.equal(before, after), name
            assert steps.agrees(), name

    def test_hooks_run(self):
        steps, seen = Steps(), []
        steps.step()
        handle = steps.block.mlp.register_forward_hook(lambda *_: seen.append(1))
        for count in (1, 2):
            steps.step()
            assert len(seen) == count
        handle.remove()
        assert steps.agrees()

    def test_other_blocks_take_the_checked_way(self):
        steps = Steps(count=4)
        steps.blocks[1].mlp.down = nn.Linear(96, 64)
        assert steps.agrees(["decoder_blocks", *_CHECKED[:-1], "decoder_blocks"])

    def test_more_than_the_nine_operators_is_not_left_out(self):
        class Adapter(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x) + 0.5 * x

        class Rewired(nn.DecoderBlock):  # the same operators, the mlp on something else
            def forward(self, x, residual, rope, batch=None, layer=0):
                y, residual = (self.attention_norm(x), x) if residual is None else self.attention_norm(x, residual)
                _, residual = self.mlp_norm(self.attention(y, rope, batch, layer), residual)
                return self.mlp(y), residual

        changes = [
            lambda block: setattr(block, "mlp", Adapter(block.mlp)),
            lambda block: setattr(block, "__class__", Rewired),
            lambda block: block.attention.out.register_forward_hook(lambda module, args, out: 2 * out),
        ]
        for change in changes:
            steps, learnt = Steps(), Steps()
            learnt.step()
            for each in (steps, learnt):
                change(each.block)
                each.step()
            assert steps.agrees([*_CHECKED, "decoder_blocks"])
            hooked = [*_CHECKED, *_CHECKED]  # as it learnt when there was no hook
            assert learnt.agrees(hooked if learnt.block.attention.out._forward_hooks else [*_CHECKED, "decoder_blocks"])

    def test_a_switch_in_a_foreign_module(self):
        class Switched(torch.nn.Module):
            on = False

            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x) + x if self.on else self.inner(x)

        steps = Steps()
        steps.block.mlp = Switched(steps.block.mlp)
        assert steps.agrees([*_CHECKED, "decoder_blocks"])
        steps.block.mlp.on = True
        assert steps.agrees([*_CHECKED, "decoder_blocks"])

    def test_layouts_gradients_and_long_calls(self):
        steps = Steps()
        _, want, _ = steps.step()
        wide = torch.randn(1, 128)
        wide[:, ::2] = steps.x
        assert torch.equal(steps.step(x=wide[:, ::2])[1], want)
        with torch.enable_grad():
            y, _ = steps.blocks(steps.x[None].clone().requires_grad_(), steps.rope)
        assert y.requires_grad
        assert "decoder_blocks" not in steps.step(x=torch.randn(nn.DecoderBlocks.FEW + 1, 64))[0]

    def test_copies_learn_anew(self):
        steps = Steps()
        steps.step()
        for other in (copy.deepcopy(steps.blocks), pickle.loads(pickle.dumps(steps.blocks))):
            assert other._short is None
            assert torch.equal(steps.step(other)[1], steps.step()[1])
