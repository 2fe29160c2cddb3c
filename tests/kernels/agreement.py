"""The checks that every backend must pass, as functions of the backend: it does what the reference does.

A case is a plan and a list of tensors, one for each awkward size and pattern of values. Both backends take a step from
the same state; the statistics of the step are compared with float64 sums over what the backend itself stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs import CORRECTION, FORMATS, VALUES, WEIGHTS, Codec, Kind
from optwatch.kernels import BoundPlan, PlanSpec, PlanTensor, backend
from optwatch.kernels.random import keys
from optwatch.kernels.reference import concluded
from optwatch.metrics.fields import CHEAP_FIELDS, row_fields
from optwatch.rules import RULES, Rule

SIZES = (0, 1, 31, 127, 128, 129, 4095, 4096, 4097)
LARGE = 1_000_003
DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")

#: Hyperparameters as arrays of one tensor, enough for every rule.
OPTIONS = {
    "lr": np.array([1e-2]),
    "betas": np.array([[0.9, 0.999]]),
    "eps": np.array([1e-8]),
    "weight_decay": np.array([0.1]),
    "maximize": np.array([0.0]),
    "momentum": np.array([0.9]),
    "dampening": np.array([0.1]),
    "nesterov": np.array([1.0]),
    "alpha": np.array([0.99]),
    "lr_decay": np.array([1e-3]),
    "rho": np.array([0.9]),
    "alpha_warmup": np.array([50.0]),
    "beta3_warmup": np.array([50.0]),
    "bs": np.array([64.0]),
    "bias_correction": np.array([1.0]),
    "trust_clip": np.array([0.0]),
    "always_adapt": np.array([1.0]),
}
#: What a rule reads in another sense than most.
OWN_OPTIONS = {
    "ademamix": {"betas": np.array([[0.9, 0.999, 0.9999]]), "alpha": np.array([5.0])},
    "sophiag": {"rho": np.array([0.04])},
    "lion": {"betas": np.array([[0.9, 0.99]])},
}
#: Rules that run with options that ask for something else than a step, and those options; in every second step.
ASIDE = {"sophiag": {"fold": np.array([1.0])}}
#: A slot that is never smaller than the square of another; twice as large here, so that their difference is exact.
AT_LEAST_SQUARE = {"square_avg": "grad_avg"}


class Case(NamedTuple):
    """A plan, by the names of its parts."""

    rule: str
    formats: tuple[str, ...]  # of each slot
    param: torch.dtype
    grad: torch.dtype
    weights: str = "native"

    def spec(self) -> PlanSpec:
        rule = RULES[self.rule]
        codecs = tuple(FORMATS[name][slot.kind] for name, slot in zip(self.formats, rule.slots, strict=True))
        return PlanSpec(rule, codecs, self.param, self.grad, self.weights)

    def __str__(self) -> str:
        types = "-".join(str(d).removeprefix("torch.") for d in (self.param, self.grad))
        types += f"-{self.weights}" if self.weights != "native" else ""
        return f"{self.rule}-{'+'.join(self.formats)}-{types}"


#: Formats that are tried in every combination, one that is exact, one without and one with blocks; as codecs do not
#: know each other, the others are tried by themselves.
COMBINED = ("fp32", "bf16", "int8")
ALONE = tuple(name for name in FORMATS if name not in COMBINED)
#: Codecs whose every step is one rounding that all backends do alike: their buffers are equal to the last bit.
EXACT = ("fp8", "fp8_stochastic", "int8_dynamic_signed", "int8_dynamic_unsigned", "int4_power")


def every_case(rules: Sequence[str] = ("adamw",)) -> list[Case]:
    """Each rule × format for each slot × element types: of one rule, since rules and codecs do not know each other."""
    return [
        Case(name, formats, param, grad)
        for name in rules
        for formats in itertools.product(COMBINED, repeat=len(RULES[name].slots))
        for param in DTYPES
        for grad in DTYPES
    ]


def lone_cases() -> list[Case]:
    """AdamW with each of the other formats and equal element types."""
    return [Case("adamw", (fmt, fmt), dtype, dtype) for fmt in ALONE for dtype in DTYPES]


def few_cases(rules: Sequence[str] = ("adamw",)) -> list[Case]:
    """Each rule with every format, once for a rule without slots, and with every pair of element types."""
    types = itertools.cycle(itertools.product(DTYPES, DTYPES))
    formats = (*FORMATS, "int8")  # an odd number, so that the pairs move on from rule to rule
    cases = [Case(name, (fmt,) * len(RULES[name].slots), *next(types)) for name in rules for fmt in formats]
    return list(dict.fromkeys(cases))


def weight_cases() -> list[Case]:
    """Each weight format with AdamW, which has a loop of its own for 8-bit state, and with a rule without slots."""
    types = torch.bfloat16, torch.bfloat16
    plans = (("adamw", ("int8", "int8")), ("adamw", ("fp32", "fp32")), ("sgd", ()))
    return [Case(*plan, *types, weights) for weights in WEIGHTS if weights != "native" for plan in plans]


def runs(name: str, case: Case) -> bool:
    """Whether backend ``name`` has kernels for the case's rule and codecs; a lacking library is another matter."""
    reason = backend(name).why_not(case.spec(), CPU)
    parts = (case.rule, *(codec.name for codec in (*case.spec().codecs, case.spec().weight)))
    return reason is None or not any(part in reason for part in parts)


def formats(name: str) -> list[str]:
    """The formats that backend ``name`` has kernels for, with AdamW."""
    types = (torch.float32, torch.float32)
    return [fmt for fmt in FORMATS if runs(name, Case("adamw", (fmt, fmt), *types))]


def _normal(numel: int, gen: torch.Generator) -> Tensor:
    return torch.randn(numel, generator=gen)


def _spread(numel: int, gen: torch.Generator) -> Tensor:
    return torch.randn(numel, generator=gen) * torch.exp(2 * torch.randn(numel, generator=gen))


def _with(value: float) -> object:
    def pattern(numel: int, gen: torch.Generator) -> Tensor:
        values = torch.randn(numel, generator=gen)
        if numel:
            values[numel // 2] = value
        return values

    return pattern


#: How the values of a gradient look.
PATTERNS = {
    "normal": _normal,
    "heavy tail": _spread,
    "small": lambda n, gen: 1e-6 * _spread(n, gen),
    "tiny": lambda n, gen: 1e-30 * _normal(n, gen),
    "huge": lambda n, gen: 1e30 * _normal(n, gen),
    "zero": lambda n, gen: torch.zeros(n),
    "one sign": lambda n, gen: _normal(n, gen).abs(),
    "mostly zero": lambda n, gen: _normal(n, gen) * (torch.rand(n, generator=gen) < 0.02),
    "constant": lambda n, gen: torch.full((n,), 0.5),
    "nan": _with(math.nan),
    "inf": _with(math.inf),
}


class Item(NamedTuple):
    """One tensor of a case, with the gradients of its steps."""

    label: str
    tensor: PlanTensor
    grads: list[Tensor | None]


def items(spec: PlanSpec, sizes: Sequence[int], patterns: Sequence[str], steps: int) -> list[Item]:
    """A tensor for each size and pattern, its state filled with what earlier gradients would have left."""
    made = []
    for size, pattern in itertools.product(sizes, patterns):
        gen = torch.Generator().manual_seed(size * 31 + len(pattern))
        draw = PATTERNS[pattern]
        scale = {"tiny": 1e-30, "huge": 1e15, "small": 1e-6}.get(
            pattern, 1.0
        )  # huge: v must stay within fp32
        slots, earlier = [], {}
        for slot, codec in zip(spec.rule.slots, spec.codecs, strict=True):
            values = scale * _spread(size, gen) if pattern != "zero" else torch.zeros(size)
            values = values.square() if slot.kind is Kind.SECOND_MOMENT else values
            if (below := AT_LEAST_SQUARE.get(slot.name)) in earlier:
                values += 2 * earlier[below].square()
            earlier[slot.name] = values
            buffers = codec.allocate(size, CPU)
            codec.store(values, buffers, torch.randint(0, 65536, (size,), generator=gen).float())
            slots.append(buffers)
        weight = torch.randn(size, generator=gen)
        param = weight.to(spec.param_dtype)
        split = spec.weight.allocate(size, CPU)
        if CORRECTION in split:
            spec.weight.store(weight, split, torch.randint(0, 65536, (size,), generator=gen).float())
            param = split[VALUES]
        grads: list[Tensor | None] = [draw(size, gen).to(spec.grad_dtype) for _ in range(steps)]
        made.append(Item(f"{pattern}[{size}]", PlanTensor(param, tuple(slots), split.get(CORRECTION)), grads))
    gone = items(spec, (sizes[-1],), ("normal",), steps)[0] if len(patterns) > 1 else None
    if gone is not None:
        made.append(Item("no gradient", gone.tensor, [None] * steps))
    return made


def clone(tensor: PlanTensor) -> PlanTensor:
    slots = tuple({name: buffer.clone() for name, buffer in slot.items()} for slot in tensor.slots)
    return PlanTensor(
        tensor.param.clone(), slots, None if tensor.correction is None else tensor.correction.clone()
    )


def weight_of(spec: PlanSpec, tensor: PlanTensor) -> Tensor:
    """The weight in fp32, a copy."""
    return spec.weight.load(tensor.weight).clone()


def copy_into(target: PlanTensor, source: PlanTensor) -> None:
    for name, buffer in target.weight.items():
        buffer.copy_(source.weight[name])
    for mine, theirs in zip(target.slots, source.slots, strict=True):
        for name, buffer in mine.items():
            buffer.copy_(theirs[name])


def scalars_of(rule: Rule, n: int, step: int) -> np.ndarray:
    options = OPTIONS | OWN_OPTIONS.get(rule.name, {}) | (ASIDE.get(rule.name, {}) if step % 2 else {})
    return np.repeat(rule.prepare(options, np.array([float(step)])), n, axis=0)


def of_the_last_pass(
    spec: PlanSpec, before: Sequence[PlanTensor], grads: Sequence[Tensor | None], scalars: np.ndarray
) -> np.ndarray:
    """The scalars that the step of a rule with norms gets, from float64."""
    rule = spec.rule
    if not rule.norms:
        return scalars
    sums = torch.zeros(len(grads), len(rule.norms), dtype=torch.float64)
    for i, (tensor, grad) in enumerate(zip(before, grads, strict=True)):
        if grad is not None:
            h = dict(zip(rule.scalars, scalars[i].tolist(), strict=True))
            old = [
                codec.load(s, len(grad)).double() for codec, s in zip(spec.codecs, tensor.slots, strict=True)
            ]
            weight = spec.weight.load(tensor.weight).double()
            sums[i] = torch.stack([x.square().sum() for x in rule.measure(old, grad.double(), weight, h)])
    return concluded(rule, scalars, sums)


def keys_of(spec: PlanSpec, n: int, step: int) -> np.ndarray:
    return keys(
        np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64), len(spec.codecs) + 1, np.full(n, float(step))
    )


def check_agreement(
    name: str,
    case: Case,
    sizes: Sequence[int],
    patterns: Sequence[str],
    steps: int = 2,
    exactly: bool = False,
) -> None:
    """One backend against the reference, step by step, each step from the reference's state.

    With ``exactly`` what can be equal in every bit has to be: the state of a rule whose arithmetic is exact, too, in
    one of the ``EXACT`` codecs.
    """
    spec = case.spec()
    cases = items(spec, sizes, patterns, steps)
    truth, own = [item.tensor for item in cases], [clone(item.tensor) for item in cases]
    reference, plan = backend("reference").bind(spec, truth), backend(name).bind(spec, own)
    for step in range(steps):
        before = [clone(tensor) for tensor in truth]
        grads = [item.grads[step] for item in cases]
        scalars, numbers = scalars_of(spec.rule, len(cases), step + 10), keys_of(spec, len(cases), step)
        reference.run(grads, scalars, numbers, True)
        rows = plan.run(grads, scalars, numbers, True).numpy().copy()
        scalars = of_the_last_pass(spec, before, grads, scalars)
        equal = total = 0
        for i, item in enumerate(cases):
            label = f"{case} {item.label} step {step}"
            same, count = compare_tensor(
                spec, truth[i], own[i], before[i], grads[i], scalars[i], label, exactly
            )
            equal, total = equal + same, total + count
            check_statistics(spec, before[i], own[i], grads[i], scalars[i], rows[i], label)
        assert equal >= 0.999 * total, f"{case}: {total - equal} of {total} codes differ"
        for target, source in zip(own, truth, strict=True):
            copy_into(target, source)


def compare_tensor(
    spec: PlanSpec, truth: PlanTensor, own: PlanTensor, before: PlanTensor, grad: Tensor | None, scalars: np.ndarray,
    label: str, exactly: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Weights and state of one tensor after one step; returns how many codes are equal, and of how many."""
    if grad is None:
        for a, b in _buffers(own, before):
            assert torch.equal(a, b), f"{label}: changed without a gradient"
        return 0, 0
    mine, theirs = (weight_of(spec, tensor) for tensor in (own, truth))
    unit = UNITS.get(spec.weight.name, 1e-6)
    close(mine, theirs, _magnitude(spec, before, grad, scalars), unit, f"{label}: weights")
    equal = total = 0
    for slot, codec, mine, theirs, old in zip(
        spec.rule.slots, spec.codecs, own.slots, truth.slots, before.slots, strict=True
    ):
        what = f"{label}: {slot.name}"
        primary = codec.buffers[0]
        if codec.block == 1:
            scale = codec.load(old).abs() + grad.float().abs() ** (
                2 if slot.kind is Kind.SECOND_MOMENT else 1
            )
            unit = 1e-6 if primary.dtype is torch.float32 else 2.0**-7
            close(codec.load(mine), codec.load(theirs), scale, unit, what)
            continue
        if exactly and codec.name in EXACT:
            for name, buffer in mine.items():
                assert same_bits(buffer, theirs[name]), f"{what}: {name} differs"
        codes = [bits(codec.codes(buffers, len(grad))).int() for buffers in (mine, theirs)]
        values = [codec.load(buffers, len(grad)) for buffers in (mine, theirs)]
        assert torch.equal(*(v.isfinite() for v in values)), f"{what}: not finite at other places"
        finite = values[0].isfinite()
        apart = (codes[0] - codes[1]).abs()[finite]
        if primary.packed > 1:  # codes of four bits are kept modulo 16
            apart = torch.minimum(apart, 16 - apart)
        near = ((values[0] - values[1]).abs() <= 1e-5 * values[1].abs())[finite]
        assert ((apart <= 1) | near).all(), f"{what}: {apart.max()} codes apart"
        equal += int(((apart == 0) | near).sum())
        total += len(apart)
    return equal, total


def _magnitude(spec: PlanSpec, before: PlanTensor, grad: Tensor, scalars: np.ndarray) -> Tensor:
    """The size of what a weight is summed up from; the sum itself may be small because its terms cancel."""
    h = dict(zip(spec.rule.scalars, scalars.tolist(), strict=True))
    old = [
        codec.load(buffers, len(grad)).abs() for codec, buffers in zip(spec.codecs, before.slots, strict=True)
    ]
    weight = weight_of(spec, before).abs()
    update = spec.rule.step(old, grad.float().abs(), weight, h)[1].abs()
    # Values decoded from codes may differ by 1e-5, ten times what arithmetic may.
    coded = any(not codec.buffers[0].dtype.is_floating_point for codec in spec.codecs)
    return weight + (10 * update if coded else update)


#: Where rounding may fall the other way, one unit in the last place of what a weight is kept in.
UNITS = {"native_bfloat16": 2.0**-7, "stochastic_bfloat16": 2.0**-7, "split8": 2.0**-15}


def close(mine: Tensor, theirs: Tensor, scale: Tensor, unit: float, what: str) -> None:
    """Equal to 1e-6 of the magnitudes that went into it, or to the unit in the last place of what it is kept in."""
    mine, theirs, scale = mine.float(), theirs.float(), scale.float().nan_to_num(0.0, 0.0, 0.0)
    assert torch.equal(mine.isfinite(), theirs.isfinite()), f"{what}: not finite at other places"
    finite = mine.isfinite()
    error = (mine - theirs).abs()[finite].double()
    magnitude = torch.maximum(theirs.abs(), scale)[finite].double()
    worst = (error - unit * magnitude - 2.0**-126).max() if len(error) else torch.tensor(-1.0)
    assert worst <= 0, f"{what}: off by {error.max():.3g}"
    if unit == 2.0**-7 and len(error) > 1000:
        assert (error > 1e-6 * magnitude).double().mean() < 2e-3, f"{what}: too many bf16 roundings differ"


def _buffers(a: PlanTensor, b: PlanTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights and state of both, bit by bit."""
    for name, buffer in a.weight.items():
        yield buffer, b.weight[name]
    for mine, theirs in zip(a.slots, b.slots, strict=True):
        for name in mine:
            yield bits(mine[name]), bits(theirs[name])


def bits(buffer: Tensor) -> Tensor:
    """``buffer``, as integers where torch cannot compare its type."""
    return buffer.view(torch.uint8) if buffer.dtype == torch.float8_e4m3fn else buffer


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two buffers are equal byte by byte."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def exact_row(
    spec: PlanSpec, before: PlanTensor, after: PlanTensor, grad: Tensor, scalars: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Each field of a row in float64, with the sum of magnitudes that its error is measured by."""
    rule, g = spec.rule, grad.double()
    load = [
        (codec.load(old, len(grad)), codec.load(new, len(grad)))
        for codec, old, new in zip(spec.codecs, before.slots, after.slots, strict=True)
    ]
    old, new = (weight_of(spec, tensor) for tensor in (before, after))
    single, exact, u, again, error = _exactly(spec, load, old, grad, scalars)
    moved = new
    if spec.weight.stochastic:
        h = dict(zip(rule.scalars, scalars.tolist(), strict=True))
        moved = rule.apply(old, rule.step([x for x, _ in load], grad.float(), old, h)[1], h)
    row = {
        "grad_sq": (g.square(), g.square()),
        "nonfinite": ((~g.isfinite()).double(),) * 2,
        "update_sq": (u.square(), u.square()),
        "update_error_sq": (error.square(), _difference(error, again)),
        "weight_sq": (new.double().square(),) * 2,
        "moment_grad": (exact[0] * g, (exact[0] * g).abs())
        if rule.compares_moment
        else (torch.zeros_like(g),) * 2,
        "unchanged": ((moved == old).double(),) * 2,
    }
    for slot, codec, buffers, x, narrow, (_, y) in zip(
        rule.slots, spec.codecs, after.slots, exact, single, load, strict=True
    ):
        fields = _slot_row(slot.kind, codec, buffers, x, narrow, y.double())
        row |= {f"{slot.name}.{field}": value for field, value in fields.items()}
    summed = {field: tuple(float(v.sum()) for v in pair) for field, pair in row.items()}
    for slot, x in zip(rule.slots, exact, strict=True):
        largest = float(x.abs().max()) if len(x) else 0.0
        summed[f"{slot.name}.absmax"] = (largest, largest)
    return summed  # type: ignore[return-value]


def _exactly(
    spec: PlanSpec, load: Sequence[tuple[Tensor, Tensor]], weight: Tensor, grad: Tensor, scalars: np.ndarray
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor, Tensor]:
    """New state in fp32 and as exact as fp32 can hold it, the update, the update from that state, and its error.

    In float64; but where a moment goes beyond the range of fp32, everything follows from what became of it there, and
    where rounding decides on a sign, it does so in fp32.
    """
    rule, h = spec.rule, dict(zip(spec.rule.scalars, scalars.tolist(), strict=True))

    def evaluate(dtype: torch.dtype) -> tuple[Sequence[Tensor], list[Tensor]]:
        old, stored = [x.to(dtype) for x, _ in load], [y.to(dtype) for _, y in load]
        g = grad.to(dtype)
        new, u = rule.step(old, g, weight.to(dtype), h)
        rounded = [x.float().to(dtype) for x in new]
        return rounded, [u, rule.update(rounded, g, h), rule.update(stored, g, h)]

    (single, beyond), (exact, within) = evaluate(torch.float32), evaluate(torch.float64)
    inside = torch.stack([torch.ones_like(grad, dtype=torch.bool), *(x.isfinite() for x in single)]).all(0)
    exact = [torch.where(inside, x, y.double()) for x, y in zip(exact, single, strict=True)]
    updates = [
        torch.where(inside & ((x - y).abs() < 0.5 * x.abs()), x, y.double())
        for x, y in zip(within, beyond, strict=True)
    ]
    return single, exact, updates[0], updates[1], updates[2] - updates[1]


def _difference(d: Tensor, a: Tensor) -> Tensor:
    """The magnitude of d = a - b squared when a or b is off by a millionth of a: 1e-4 of it is what that does."""
    return d.square() + 2e-2 * (d * a).abs() + 1e-8 * a.square()


def _slot_row(
    kind: Kind, codec: Codec, buffers: dict[str, Tensor], x: Tensor, single: Tensor, y: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    a, b = (x.sqrt(), y.sqrt()) if kind is Kind.SECOND_MOMENT else (x, y)
    return {
        "error_sq": ((a - b).square(), _difference(a - b, a)),
        "exact_sq": (a.square(), a.square()),
        "sum": (x, x.abs()),
        "absmax": (x, x),
        "underflow": (((single != 0) & (y == 0)).double(),) * 2,
        "saturated": (codec.saturated(single, buffers).double(),) * 2,
    }


def check_statistics(
    spec: PlanSpec, before: PlanTensor, after: PlanTensor, grad: Tensor | None, scalars: np.ndarray, row: np.ndarray,
    label: str,
) -> None:  # fmt: skip
    """A row against float64: to 1e-4 of the sum of magnitudes, counts exactly.

    Squares are formed in fp32 by most backends, so what lies outside its range may be infinite or lost.
    """
    fields = row_fields([slot.name for slot in spec.rule.slots])
    if grad is None:
        assert not row.any(), f"{label}: a row without a gradient"
        return
    truth = exact_row(spec, before, after, grad, scalars)
    for field, value in zip(fields, row.tolist(), strict=True):
        expected, magnitude = truth[field]
        what = f"{label}: {field} is {value}, expected {expected}"
        if field == "unchanged" and spec.weight.stochastic:  # the last bit of the exact new weight decides
            assert abs(value - expected) <= 1e-3 * len(grad), what
        elif field.endswith(("nonfinite", "unchanged", "saturated")):
            assert value == expected, what
        elif field.endswith("error_sq") and value == 0 and all(codec.name == "fp32" for codec in spec.codecs):
            pass  # what is stored exactly has no error, not even where it is not a number
        elif not math.isfinite(expected) or magnitude > 1e37:
            assert not math.isfinite(value) or abs(value - expected) <= 1e-4 * magnitude, what
        elif field.endswith("underflow"):
            assert abs(value - expected) <= 1e-3 * len(grad), (
                what
            )  # an element at the edge may round either way
        else:
            assert abs(value - expected) <= 1e-4 * magnitude + len(grad) * 1e-37, what


def check_weight_stores(
    plan_of: Callable[[PlanSpec, PlanTensor], BoundPlan], weights: str, values: Tensor
) -> None:
    """Storing ``values`` as bf16 weights leaves the reference's bits, and so does storing them again.

    They come from gradients: SGD with a rate of 1 takes a weight of zero to minus the gradient, exactly.
    """
    spec = Case("sgd", (), torch.bfloat16, torch.float32, weights).spec()
    options = OPTIONS | {"lr": np.array([1.0]), "weight_decay": np.array([0.0])}
    scalars, numbers = spec.rule.prepare(options, np.ones(1)), keys_of(spec, 1, 3)
    kept = []
    for bind in (plan_of, lambda spec, tensor: backend("reference").bind(spec, [tensor])):
        split = spec.weight.allocate(len(values), CPU)
        tensor = PlanTensor(split[VALUES], (), split.get(CORRECTION))
        plan = bind(spec, tensor)
        plan.run([-values], scalars, numbers, False)
        plan.run([torch.zeros_like(values)], scalars, numbers, False)
        kept.append((tensor.weight, spec.weight.load(tensor.weight).isnan()))
    (own, lost), (truth, nan) = kept
    assert torch.equal(lost, nan)
    for name, buffer in own.items():  # what a NaN looks like is nobody's business
        assert torch.equal(*(b.view(UNSIGNED[b.itemsize])[~nan] for b in (buffer, truth[name]))), name


UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def check_full_changes_nothing(name: str, case: Case, sizes: Sequence[int], steps: int) -> None:
    """Weights and codes of the two kernels are equal in every bit, step after step; the cheap sums to 1e-4."""
    spec = case.spec()
    cases = items(spec, sizes, ("heavy tail",), steps)
    plain, full = ([clone(item.tensor) for item in cases] for _ in range(2))
    plans = [backend(name).bind(spec, tensors) for tensors in (plain, full)]
    for step in range(steps):
        grads = [item.grads[step] for item in cases]
        scalars, numbers = scalars_of(spec.rule, len(cases), step + 1), keys_of(spec, len(cases), step)
        rows = [plan.run(grads, scalars, numbers, bool(i)).numpy().copy() for i, plan in enumerate(plans)]
        cheap = len(CHEAP_FIELDS)
        np.testing.assert_allclose(rows[0][:, :cheap], rows[1][:, :cheap], rtol=1e-4)
        assert not rows[0][:, cheap:].any()
    for a, b in zip(plain, full, strict=True):
        assert all(torch.equal(x, y) for x, y in _buffers(a, b)), f"{case}: weights or state differ"


def check_norms_of_pieces(name: str) -> None:
    """Two pieces whose norms are put together step as the whole does; a plan with nothing to step is asked as well."""
    spec = Case("lamb", ("fp32", "fp32"), *DTYPES).spec()
    (whole,) = items(spec, (300,), ("normal",), 1)
    pieces, nothing = (
        [_part(whole.tensor, part) for part in (slice(start, cut), slice(cut, stop))]
        for start, cut, stop in ((0, 129, 300), (0, 0, 0))
    )
    asked: list[Tensor] = []

    def combine(sums: Tensor) -> Tensor:
        asked.append(sums.clone())
        return sums.sum(0, keepdim=True).expand_as(sums).contiguous()

    (grad,), scalars, numbers = whole.grads, scalars_of(spec.rule, 2, 10), keys_of(spec, 2, 0)
    assert grad is not None
    backend(name).bind(spec, [whole.tensor]).run([grad], scalars[:1], numbers[:1], False)
    for tensors in (pieces, nothing):
        given = (
            list(grad.split([len(tensor.param) for tensor in tensors]))
            if tensors is pieces
            else [grad[:0]] * 2
        )
        backend(name).bind(spec, tensors, combine).run(given, scalars, numbers, False)
    found = torch.cat([piece.param for piece in pieces])
    torch.testing.assert_close(found, whole.tensor.param, rtol=1e-6, atol=1e-6)
    assert [sums.any().item() for sums in asked] == [True, False]


def _part(tensor: PlanTensor, part: slice) -> PlanTensor:
    """A copy of some of a tensor whose buffers have a value for each element."""
    slots = tuple({name: buffer[part].clone() for name, buffer in slot.items()} for slot in tensor.slots)
    return PlanTensor(tensor.param[part].clone(), slots)


def check_the_largest_second_moment(name: str) -> None:
    """A block that reaches to the largest fp32 number is read as finite, whatever the last bits of its exponents do."""
    spec = Case("adamw", ("fp32", "int8"), torch.float32, torch.float32).spec()
    codec, blocks = spec.codecs[1], 64
    grad = torch.logspace(1, 19, blocks).repeat_interleave(codec.block)
    grad[-2 * codec.block :] = 2.0**64 * (1 - 2.0**-10)  # two blocks that are narrow
    grad[:: codec.block] = 2.0**64 * (1 - 2.0**-24)  # whose square is the largest number but one
    state = codec.allocate(len(grad), CPU)
    codec.store(grad.square(), state, torch.zeros(len(grad)))
    tensor = PlanTensor(torch.zeros(len(grad)), ({"values": torch.zeros(len(grad))}, state))
    scalars, numbers = scalars_of(spec.rule, 1, 10), keys_of(spec, 1, 0)
    rows = backend(name).bind(spec, [tensor]).run([grad], scalars, numbers, True)
    lowest, step = state["grid"].view(-1, 2).unbind(1)
    assert (lowest * torch.exp2(254 * step)).isfinite().all()
    assert codec.load(state).max() > 0.9999 * torch.finfo(torch.float32).max
    found = dict(zip(row_fields([slot.name for slot in spec.rule.slots]), rows[0], strict=True))
    assert found["exp_avg_sq.absmax"].isfinite()  # a sum of such values may well overflow
