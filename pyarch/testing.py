"""check_op: the one suite that every op passes. It needs torch alone; a room's test file hands it samples.

    def samples(dtype, device):                            # real shapes, odd sizes, sizes 0 and 1, every option
        yield Sample("odd", torch.randn(3, 77, dtype=dtype, device=device), torch.randn(77, dtype=dtype, device=device))

    @pytest.mark.parametrize("check", checks(pyarch.rms_norm, samples, gradients=("x", "weight")), ids=str)
    def test_suite(check):
        check()

What each part holds, for every backend that runs here and every dtype in its LIMITS:

    forward    error against the float64 reference at most `factor` times that of the same-dtype reference, plus a
               floor; outputs and scratch poisoned with NaN; every argument also padded and misaligned, column-major,
               and with a step, between guard bytes that must survive; nothing changes but what the reference changes;
               bitwise the same for any number of threads; the backend that was named is the one that ran
    gradient   gradcheck of the reference; native gradients by the same tolerance rule; a second derivative is right
               or refused, never silently wrong
    operator   opcheck; hostile calls of the torch operators, the gradient's too (other dtypes, ranks, sizes, numbers)
               raise or return, and write nothing out of bounds (a crash ends the process; `make sanitize` sees bad
               reads too)
    compile    torch.compile(fullgraph=True) runs the same operator and gives the same bits, once with Inductor too
    refusal    backends outside LIMITS, foreign dtypes, devices, layouts and types: an error that names the argument,
               and nothing changed
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ._instruments import Guarded, Operators, assert_close, poisoned, refused, same
from .dispatch import BACKENDS, Op, backends
from .explain import op_of

Named = dict[str, Any]
LAYOUTS = ("given", "padded", "reversed", "stepped")


@dataclass(frozen=True)
class Sample:
    """One call of the op, without `backend`. exact: every intermediate is representable, so the result is too."""

    name: str
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False


@dataclass(frozen=True)
class Refused:
    """A call that must raise `error` with a message that starts with '<argument>:'."""

    name: str
    error: type[Exception]
    argument: str
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """An op with what its checks need.

    samples      (dtype, device) -> samples; called anew for every check
    gradients    the arguments whose gradients are checked; empty for inference only
    refused      () -> calls that must be refused
    keep_layout  arguments whose strides are part of the contract: passed as the sample has them
    factor       how many times the error of same-dtype PyTorch is allowed
    floor        allowed besides, in units of the result dtype's eps times the truth's norm
    peer         the same-dtype PyTorch function that sets the allowed error; the room's reference if None
    """

    op: Callable
    samples: Callable[[torch.dtype, str], Iterable[Sample]]
    gradients: tuple[str, ...] = ()
    refused: Callable[[], Iterable[Refused]] = tuple
    keep_layout: tuple[str, ...] = ()
    factor: float = 1.5
    floor: float = 1.0
    peer: Callable | None = None

    @functools.cached_property
    def card(self) -> Op:
        return op_of(self.op)

    @functools.cached_property
    def reference(self) -> Callable:
        return getattr(sys.modules[self.op.__module__], f"{self.op.__name__}_reference")

    def named(self, sample: Sample | Refused) -> Named:
        return dict(inspect.signature(self.op).bind(*sample.args, **sample.kwargs).arguments)

    def runnable(self, backend: str, dtype: torch.dtype) -> Iterator[tuple[Sample, Named]]:
        """The samples that the backend permits; the others it must refuse."""
        ran = 0
        for sample in self.samples(dtype, _device(backend)):
            named = self.named(sample)
            if (reason := self.card.refuses(backend, self.card.check(**named))) is None:
                ran += 1
                yield sample, named
            else:
                with refused(sample.name, ValueError, "backend", reason):
                    self.op(**named, backend=backend)
        assert ran, f"no sample runs on {backend} in {dtype}"


@dataclass(frozen=True)
class Check:
    """One part of the suite on one backend and dtype; call it to run it."""

    suite: Suite
    part: str
    backend: str
    dtype: torch.dtype

    def __call__(self) -> None:
        torch._dynamo.reset()
        PARTS[self.part](self.suite, self.backend, self.dtype)

    def __str__(self) -> str:
        return f"{self.part}-{self.backend}-{str(self.dtype).removeprefix('torch.')}"


def checks(op: Callable, samples: Callable, **options) -> list[Check]:
    """All checks of an op that can run in this process; options are Suite's. Raises if the CPU library is missing."""
    suite = Suite(op, samples, **options)
    runs = backends()
    if "cpu" in suite.card.limits and (reason := runs["cpu"]):
        raise RuntimeError(f"the CPU backend cannot be checked: {reason}")
    found = []
    for backend, limits in suite.card.limits.items():
        if runs[backend] is None:
            parts = [part for part in PARTS if part != "gradient" or suite.gradients]
            found += [Check(suite, part, backend, dtype) for part in parts for dtype in limits.dtypes]
    return found


def check_op(op: Callable, samples: Callable, **options) -> None:
    """Runs every check of an op; raises AssertionError at the first that fails."""
    for check in checks(op, samples, **options):
        check()


def _device(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def _wide(named: Named) -> Named:
    """The same arguments with every float as float64."""
    widen = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
    return {n: tree_map(widen, v) for n, v in named.items()}


def _result(function: Callable, named: Named) -> list[torch.Tensor]:
    """All tensors after the call: what it returned, then its arguments."""
    out = function(**named)
    return [t.detach() for t in tree_leaves((out, named)) if isinstance(t, torch.Tensor)]


# ---- the parts


def _forward(suite: Suite, backend: str, dtype: torch.dtype) -> None:
    op, threads = functools.partial(suite.op, backend=backend), torch.get_num_threads()
    for sample, named in suite.runnable(backend, dtype):
        truth = _result(suite.reference, Guarded(_wide(named)).named)
        peer = _result(suite.peer or suite.reference, Guarded(named).named)
        before = [t for t in tree_leaves(Guarded(named).named) if isinstance(t, torch.Tensor)]
        outputs = len(peer) - len(before)  # the rest of a result is the arguments after the call
        first = None
        for layout in LAYOUTS:
            what = f"{sample.name}, {layout} layout"
            call = Guarded(named, layout, suite.keep_layout)
            with poisoned(), torch.no_grad(), Operators() as ran:
                got = _result(op, call.named)
            ran.check(what, backend, got[:outputs])
            call.check(what)
            for i, (g, t, p) in enumerate(zip(got, truth, peer, strict=True)):
                if i >= outputs and same(p, before[i - outputs]):
                    assert same(g, p), f"{what}: tensor argument {i - outputs} was changed"
                else:
                    assert_close(f"{what}, result {i}", g, t, p, suite.factor, suite.floor, sample.exact)
            first = first or got
        for count in (1, 3) if backend == "cpu" else ():
            torch.set_num_threads(count)
            try:
                again = _result(op, Guarded(named).named)
            finally:
                torch.set_num_threads(threads)
            assert all(map(same, first or got, again)), f"{sample.name}: other bits with {count} threads"


def _gradient(suite: Suite, backend: str, dtype: torch.dtype) -> None:
    for sample, named in suite.runnable(backend, dtype):
        truth = _derivatives(suite, suite.reference, Guarded(_wide(named)).named, dtype)
        peer = _derivatives(suite, suite.peer or suite.reference, Guarded(named).named, dtype)
        with poisoned(), Operators() as ran:
            got = _derivatives(suite, functools.partial(suite.op, backend=backend), Guarded(named).named, dtype)
        ran.check(sample.name, backend, got[0])
        assert got[2] == truth[2], f"{sample.name}: {got[2]} gradients can be differentiated, of {truth[2]}"
        for i in range(len(got[0])):
            assert_close(f"{sample.name}, gradient {i}", got[0][i], truth[0][i], peer[0][i], suite.factor, suite.floor)
        for i in range(len(got[1])):
            assert_close(f"{sample.name}, second {i}", got[1][i], truth[1][i], peer[1][i], suite.factor, suite.floor)
        inputs = [n for n in suite.gradients if isinstance(named.get(n), torch.Tensor)]
        if dtype == suite.card.limits[backend].dtypes[0] and 0 < sum(named[n].numel() for n in inputs) <= 4096:
            wide = Guarded(_wide(named)).named
            function = functools.partial(_outputs, suite.reference, wide, inputs)
            right = torch.autograd.gradcheck(
                function, [wide[n].requires_grad_() for n in inputs], fast_mode=True, raise_exception=False
            )
            assert right, f"{sample.name}: gradcheck of the reference fails"


def _outputs(function: Callable, named: Named, inputs: list[str], *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The differentiable outputs of a call with some arguments replaced."""
    out = tree_leaves(function(**named | dict(zip(inputs, values, strict=True))))
    return tuple(t for t in out if isinstance(t, torch.Tensor) and t.requires_grad)


def _derivatives(suite: Suite, function: Callable, named: Named, dtype: torch.dtype) -> tuple[list, list, int]:
    """Gradients of a fixed weighted sum of the outputs; those of a weighted sum of these gradients, for the arguments
    and the first weights (empty where the op refuses to be differentiated twice); how many of the first are in a graph.
    """

    def weights(tensors: Iterable[torch.Tensor], seed: int) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        return [torch.randn(t.shape, generator=random).to(dtype).to(t).requires_grad_() for t in tensors]

    inputs = [n for n in suite.gradients if isinstance(named.get(n), torch.Tensor)]
    values = [named[n].requires_grad_() for n in inputs]
    outputs = _outputs(function, named, inputs, *values)
    assert outputs, "no output has a gradient"
    first = weights(outputs, 1)
    gradients = torch.autograd.grad(outputs, values, first, create_graph=True, materialize_grads=True)
    chained = [(g, w) for g, w in zip(gradients, weights(gradients, 2), strict=True) if g.requires_grad]
    second: list[torch.Tensor] = []
    try:
        if chained:
            total = torch.stack([(g * w).sum().double() for g, w in chained]).sum()
            second += torch.autograd.grad(total, values + first, materialize_grads=True)
    except RuntimeError as error:
        assert "once_differentiable" in str(error), error
    return [g.detach() for g in gradients], second, len(chained)


def _operator(suite: Suite, backend: str, dtype: torch.dtype) -> None:
    seen = set()
    for sample, named in suite.runnable(backend, dtype):
        op = functools.partial(suite.op, backend=backend)
        with Operators() as ran:
            with torch.no_grad():
                op(**Guarded(named).named)
            if suite.gradients:
                with contextlib.suppress(Exception):  # which the part "gradient" judges
                    _gradients_of(suite, op, Guarded(named).named)
        for operator, arguments in ran.calls:
            args = tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, arguments)
            kind = (operator, *map(_kind, args))
            if kind in seen:
                continue
            seen.add(kind)
            verdict = torch.library.opcheck(
                operator, tuple(Guarded({"": a}).named[""] for a in args), raise_exception=False
            )
            assert all(v == "SUCCESS" for v in verdict.values()), (
                f"{sample.name}: opcheck of {operator.name()}: {verdict}"
            )
            for what, i, value in _hostile(args):
                call = Guarded({str(j): value if j == i else a for j, a in enumerate(args)})
                with contextlib.suppress(Exception):
                    operator(*call.named.values())
                call.check(f"{sample.name}: {operator.name()} with argument {i} {what}")


def _kind(value: Any) -> Any:
    """What calls of one kind share: checks that are slow run once for each kind."""
    return (value.dtype, value.numel() > 0) if isinstance(value, torch.Tensor) else type(value)


def _hostile(args: tuple) -> Iterator[tuple[str, int, Any]]:
    """(what, position, value): one argument replaced by something that the room would not pass."""
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            for dtype in (torch.float64, torch.float16, torch.int32, torch.int64, torch.uint8):
                if dtype != value.dtype:
                    yield f"as {dtype}", i, torch.nan_to_num(value).to(dtype)
            yield "with one dimension more", i, value[None]
            yield "empty", i, value.new_empty((0,) * value.dim())
            for d in range(value.dim()):
                yield f"without dimension {d}", i, value.select(d, 0) if value.shape[d] else value.sum(d).to(value)
                yield f"cut to half in dimension {d}", i, value.narrow(d, 0, value.shape[d] // 2)
                yield f"doubled in dimension {d}", i, torch.cat((value, value), d)
                yield (
                    f"with a step in dimension {d}",
                    i,
                    torch.cat((value, value), d)[(slice(None),) * d + (slice(None, None, 2),)],
                )
            if not value.is_floating_point() and value.dtype != torch.bool:
                for number in (-1, -2, torch.iinfo(value.dtype).max, torch.iinfo(value.dtype).min):
                    if number >= torch.iinfo(value.dtype).min:
                        yield f"full of {number}", i, torch.full_like(value, number)
        elif isinstance(value, int) and not isinstance(value, bool):
            for number in {-(2**63), -2, -1, 0, 1, value - 1, value + 1, 2 * value, 2**31, 2**62} - {value}:
                yield f"= {number}", i, number
        elif isinstance(value, float):
            for real in (float("nan"), float("inf"), -1.0, 0.0):
                yield f"= {real}", i, real


def _compile(suite: Suite, backend: str, dtype: torch.dtype) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    targets: set[str] = set()

    def keep(graph, _):
        for n in graph.graph.nodes:  # an operator that writes to its arguments is the first argument of a wrapper
            targets.update(str(t) for t in (n.target, *n.args[:1]) if str(t).startswith("pyarch."))
        return make_boxed_func(graph.forward)

    op = functools.partial(suite.op, backend=backend)
    for number, (sample, named) in enumerate(suite.runnable(backend, dtype)):
        if number == 3:
            break
        torch._dynamo.reset()
        compiled = torch.compile(op, fullgraph=True, dynamic=number == 2, backend=aot_autograd(fw_compiler=keep))
        with torch.no_grad():
            eager, graph = (_result(f, Guarded(named).named) for f in (op, compiled))
        assert all(map(same, eager, graph)), f"{sample.name}: other bits when compiled"
        assert {t.split("__")[1].split(".")[0] for t in targets} == {backend}, f"{sample.name}: ran {targets}"
        if number == 0 and dtype == suite.card.limits[backend].dtypes[0]:  # once: Inductor is slow to start
            with torch.no_grad():
                graph = _result(torch.compile(op, fullgraph=True), Guarded(named).named)
            assert all(map(same, eager, graph)), f"{sample.name}: other bits with Inductor"
        if suite.gradients:
            eager, graph = (_gradients_of(suite, f, Guarded(named).named) for f in (op, compiled))
            assert all(map(same, eager, graph)), f"{sample.name}: other gradients when compiled"


def _gradients_of(suite: Suite, function: Callable, named: Named) -> list[torch.Tensor]:
    inputs = [n for n in suite.gradients if isinstance(named.get(n), torch.Tensor)]
    values = [named[n].requires_grad_() for n in inputs]
    outputs = _outputs(function, named, inputs, *values)
    return list(torch.autograd.grad([t.float().square().sum() for t in outputs], values, materialize_grads=True))


def _refusal(suite: Suite, backend: str, dtype: torch.dtype) -> None:
    seen = set()
    for sample, named in suite.runnable(backend, dtype):
        key = tuple((name, _kind(value)) for name, value in named.items())
        if key in seen:
            continue
        seen.add(key)
        calls: list[tuple[str, type[Exception] | tuple, str | list[str], Named]] = [
            ("an unknown backend", ValueError, "backend", {"backend": "none such"})
        ]
        for other in BACKENDS:
            if suite.card.refuses(other, suite.card.check(**named)):
                calls.append((f"backend {other}", ValueError, "backend", {"backend": other}))
        for name, value in named.items():
            if isinstance(value, torch.Tensor):
                foreign = {"meta": value.to("meta"), "complex": value.to(torch.complex64), "sparse": value.to_sparse()}
                calls.append((f"{name} no tensor", TypeError, name, {name: "no tensor"}))
                for kind, changed in foreign.items():
                    calls.append((f"{name} {kind}", (ValueError, TypeError), [*named, "backend"], {name: changed}))
        for what, error, argument, changes in calls:
            _refuse(f"{sample.name}, {what}", suite.op, error, argument, {"backend": backend}, named, changes)
    if dtype == suite.card.limits[backend].dtypes[0]:
        for case in suite.refused():
            chosen = {} if "backend" in case.kwargs else {"backend": backend}
            _refuse(case.name, suite.op, case.error, case.argument, chosen, suite.named(case), {})


def _refuse(what: str, op: Callable, error, argument, chosen: Named, named: Named, changes: Named) -> None:
    call = Guarded(named)
    before = Guarded(named)
    with refused(what, error, argument):
        op(**chosen | call.named | changes)
    call.check(what)
    for a, b in zip(tree_leaves(before.named), tree_leaves(call.named), strict=True):
        assert not isinstance(a, torch.Tensor) or same(a, b), f"{what}: an argument was changed"


PARTS: dict[str, Callable[[Suite, str, torch.dtype], None]] = {
    "forward": _forward,
    "gradient": _gradient,
    "operator": _operator,
    "compile": _compile,
    "refusal": _refusal,
}
