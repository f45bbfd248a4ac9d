"""DecoderBlock: one operator after the first checked call, the same bits, and what makes it check again."""

import copy
import pickle

import pytest
import torch

import pyarch
from pyarch import nn
from pyarch._instruments import Operators


class Steps:
    """A quantised block with a cache, fed one random row at a time."""

    def __init__(self, seed=0, **options):
        torch.manual_seed(seed)
        self.block = nn.DecoderBlock(
            nn.RMSNorm(64, 1e-5), nn.Attention(64, 4, 2, 16, **options), nn.RMSNorm(64, 1e-5), nn.SwiGLU(64, 96)
        )
        attention, mlp = self.block.attention, self.block.mlp
        for owner, name in ((attention, "qkv"), (attention, "out"), (mlp, "gate_up"), (mlp, "down")):
            layer = nn.QuantizedLinear.from_float(getattr(owner, name), group_size=32)
            setattr(owner, name, layer)
        self.rope, self.cache = nn.RotaryEmbedding(16), nn.PagedKVCache(64, 4, 1, 2, 16)
        self.sequence = self.cache.allocate()
        self.x, self.residual = torch.randn(2, 1, 64)

    def step(self, block=None, residual=True, x=None):
        """(operators that ran, y, residual) of one token in a copy of the sequence."""
        fork = self.cache.fork(self.sequence)
        batch = nn.PagedBatch.append(self.cache, [fork], [1])
        with Operators() as seen:
            y, r = (block or self.block)(
                self.x if x is None else x, self.residual if residual else None, self.rope, batch, 0
            )
        self.cache.free(fork)
        return [call.name().removeprefix("pyarch::") for call, _ in seen.calls], y, r

    def agrees(self, residual=True, short=True):
        """Whether the next step is the checked one, bit for bit, by the short way or not."""
        self.step(residual=residual)  # learns, if anything is new
        operators, y, r = self.step(residual=residual)
        _, want_y, want_r = self.step(self.block._whole, residual)
        assert (self.block._short is not None) == (operators == ["decoder_block__cpu"]) == short
        return torch.equal(y, want_y) and torch.equal(r, want_r)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
class TestShortWay:
    """After its first cached call a DecoderBlock makes the same operator calls without their checks."""

    @pytest.mark.parametrize("options", [{}, dict(qk_norm=True, qkv_bias=True, out_bias=True), dict(window=2)], ids=str)
    def test_same_bits(self, options):
        steps = Steps(**options)
        for residual in (True, False, True):
            assert steps.agrees(residual)
        assert steps.step()[0] == ["decoder_block__cpu"]
        assert {name.removesuffix("__cpu") for name in steps.step(steps.block._whole)[0]} == nn.DecoderBlock.OPS

    @pytest.mark.parametrize(
        ("place", "change", "message"),
        [(-3, lambda t: t[:-1], "tensors: must be 28"), (-3, lambda t: [None, *t[1:]], "tensors: entry 0"),
         (-3, lambda t: [t[1][:3], *t[1:]], "weight: "), (-2, lambda n: n[1:], "sizes: must be 20"),
         (-2, lambda n: [3, *n[1:]], "qkv: "), (-2, lambda n: [*n[:4], 2**40, *n[5:]], "q: "),
         (-1, lambda n: [*n, 0.0], "numbers: must be 9")],
    )  # fmt: skip
    def test_operator_refuses(self, place, change, message):
        steps = Steps()
        steps.step()
        fork = steps.cache.fork(steps.sequence)
        batch = nn.PagedBatch.append(steps.cache, [fork], [1])
        with Operators() as seen:
            steps.block(steps.x, None, steps.rope, batch, 0)
        ((operator, args),) = seen.calls
        bits = steps.cache.k[0].view(torch.int32)  # unwritten slots may be NaN
        before = bits.clone()
        wrong = list(args)
        wrong[place] = change(wrong[place])
        with pytest.raises((ValueError, RuntimeError), match=message):
            operator(*wrong)
        assert torch.equal(bits, before)

    def test_learns_without_a_residual_too(self):
        steps = Steps()
        for residual in (False, True, False):
            assert steps.agrees(residual)

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
        steps.step()
        assert seen == [1]
        handle.remove()
        assert steps.agrees()

    def test_other_layers_take_the_checked_way(self):
        steps = Steps()
        steps.block.mlp.down = nn.Linear(96, 64)
        assert steps.agrees(short=False)

    def test_layouts_and_gradients(self):
        steps = Steps()
        _, want, _ = steps.step()
        wide = torch.randn(1, 128)
        wide[:, ::2] = steps.x
        assert torch.equal(steps.step(x=wide[:, ::2])[1], want)
        with torch.enable_grad():
            y, _ = steps.block(steps.x[None].clone().requires_grad_(), None, steps.rope)
        assert y.requires_grad

    def test_copies_learn_anew(self):
        steps = Steps()
        steps.step()
        for other in (copy.deepcopy(steps.block), pickle.loads(pickle.dumps(steps.block))):
            assert other._short is None
            assert torch.equal(steps.step(other)[1], steps.step()[1])
