"""Formulas over merged sums: equal to the plain definition, merged by addition, absent where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest

from optwatch.metrics.catalogue import CATALOGUE
from optwatch.metrics.fields import CHEAP_FIELDS, SLOT_FIELDS, TENSOR_FIELDS, merge_rows, row_length
from optwatch.metrics.formulas import present, sums_of

SLOTS = 2
SPECS = [spec for spec in CATALOGUE.values() if spec.formula is not None]


def _tensor(seed: int, size: int) -> dict[str, np.ndarray]:
    """What a step knows of one tensor, element by element."""
    random = np.random.default_rng(seed)
    names = (
        "grad",
        "update",
        "update_stored",
        "weight",
        "moment",
        "moment_stored",
        "second",
        "second_stored",
    )
    values = {name: random.normal(size=size) for name in names}
    values["moment_stored"][:2] = 0.0
    values["second"], values["second_stored"] = values["second"] ** 2, values["second_stored"] ** 2
    values["unchanged"] = random.integers(0, 2, size).astype(bool)
    return values


def _row(t: dict[str, np.ndarray]) -> list[float]:
    """The row of sums of one tensor, as a kernel leaves it."""
    fields = {
        "grad_sq": t["grad"] @ t["grad"],
        "nonfinite": 0.0,
        "update_sq": t["update"] @ t["update"],
        "update_error_sq": np.sum((t["update_stored"] - t["update"]) ** 2),
        "weight_sq": t["weight"] @ t["weight"],
        "moment_grad": t["moment"] @ t["grad"],
        "unchanged": float(np.count_nonzero(t["unchanged"])),
    }
    row = [fields[name] for name in TENSOR_FIELDS]
    for exact, stored, root in (("moment", "moment_stored", np.array), ("second", "second_stored", np.sqrt)):
        x, y = t[exact], t[stored]
        slot = {
            "error_sq": np.sum((root(x) - root(y)) ** 2),
            "exact_sq": np.sum(root(x) ** 2),
            "sum": x.sum(),
            "absmax": np.abs(x).max(),
            "underflow": float(np.count_nonzero((x != 0) & (y == 0))),
            "saturated": 1.0,
        }
        row += [slot[name] for name in SLOT_FIELDS]
    return row


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


#: Metric -> its definition over the elements of a whole group; x, y: a slot's exact and stored values.
DEFINITIONS = {
    "gradient.norm": lambda t, x, y: np.linalg.norm(t["grad"]),
    "parameter.norm": lambda t, x, y: np.linalg.norm(t["weight"]),
    "update.norm": lambda t, x, y: np.linalg.norm(t["update"]),
    "update_to_parameter.ratio": lambda t, x, y: np.linalg.norm(t["update"]) / np.linalg.norm(t["weight"]),
    "moment_gradient_cosine": lambda t, x, y: _cosine(t["moment"], t["grad"]),
    "weights_unchanged.ratio": lambda t, x, y: np.mean(t["unchanged"]),
    "update_quantization_error.ratio": lambda t, x, y: (
        _rms(t["update_stored"] - t["update"]) / _rms(t["update"])
    ),
    "quantization_error.ratio": lambda t, x, y: _rms(x - y) / _rms(x),
    "quantization_underflow.ratio": lambda t, x, y: np.mean((x != 0) & (y == 0)),
    "quantization_saturated.ratio": lambda t, x, y: 3 / len(x),
    "moment.norm": lambda t, x, y: np.linalg.norm(x),
    "moment.mean": lambda t, x, y: np.mean(x),
    "moment.rms": lambda t, x, y: _rms(x),
    "moment.absmax": lambda t, x, y: np.abs(x).max(),
}
# What is estimated or accumulated on sampled blocks is the same ratio over other elements.
DEFINITIONS |= {
    "estimated_update_quantization_error.ratio": DEFINITIONS["update_quantization_error.ratio"],
    "estimated_quantization_error.ratio": DEFINITIONS["quantization_error.ratio"],
    "shadow_update_error.ratio": DEFINITIONS["update_quantization_error.ratio"],
    "shadow_moment_error.ratio": DEFINITIONS["quantization_error.ratio"],
}
#: Those of a slot that are about the second moment itself; the others are about its square root.
PLAIN = {"moment.mean", "moment.absmax"}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("slot", range(SLOTS))
def test_formula_is_the_definition_over_the_whole_group(spec, slot) -> None:
    """Rows of three tensors, merged and then put through the formula, give the value over all their elements."""
    if spec.level == "tensor" and slot:
        return
    tensors = [_tensor(seed, size) for seed, size in enumerate((31, 128, 1000))]
    merged = merge_rows(np.array([_row(t) for t in tensors]), np.array([0]), SLOTS)
    value = spec.formula.value(sums_of(merged, np.array([1159.0]), slot))
    whole = {name: np.concatenate([t[name] for t in tensors]) for name in tensors[0]}
    x, y = (
        (whole["moment"], whole["moment_stored"]) if slot == 0 else (whole["second"], whole["second_stored"])
    )
    name = spec.name.removeprefix("optwatch.")
    if slot == 1 and name not in PLAIN:
        x, y = np.sqrt(x), np.sqrt(y)
    assert value.shape == (1,)
    assert value[0] == pytest.approx(DEFINITIONS[name](whole, x, y), rel=1e-12)


def test_every_formula_has_a_definition() -> None:
    """A new metric comes with the definition that it is tested against."""
    assert {spec.name.removeprefix("optwatch.") for spec in SPECS} == set(DEFINITIONS)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_nothing_is_absent_and_not_zero(spec) -> None:
    """A group without elements has no value; zero elements are no measurement."""
    sums = sums_of(np.zeros((2, row_length(SLOTS))), np.zeros(2))
    assert not present(spec.formula, sums).any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_zero_over_zero_is_absent(spec) -> None:
    """Elements that are all zero: norms and fractions are 0, a ratio to nothing is absent; never an exception."""
    sums = sums_of(np.zeros((1, row_length(SLOTS))), np.array([10.0]))
    value = spec.formula.value(sums)[0]
    assert present(spec.formula, sums)[0] == (not np.isnan(value))
    assert np.isnan(value) or value == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_training_broke_is_shown(spec, bad) -> None:
    """NaN and Inf in a sum come out as a value that is present, and is not finite."""
    rows = np.ones((2, row_length(SLOTS)))
    rows[1] = bad
    sums = sums_of(rows, np.array([10.0, 10.0]))
    assert present(spec.formula, sums).all()
    value = spec.formula.value(sums)
    assert np.isfinite(value[0])
    assert not np.isfinite(value[1])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_cheap_rows_have_the_fields_of_cheap_formulas(spec) -> None:
    """A step without full statistics leaves short rows: enough exactly for the metrics that do not need more."""
    sums = sums_of(np.ones((1, len(CHEAP_FIELDS))), np.array([10.0]))
    assert all(field in sums for field in spec.formula.fields) == (not spec.needs_full)


def test_cosine_of_tiny_vectors_does_not_underflow() -> None:
    """The product of two tiny sums of squares is below the smallest float64; their roots are not."""
    formula = CATALOGUE["optwatch.moment_gradient_cosine"].formula
    assert formula is not None
    sums = {name: np.array([1e-200]) for name in formula.fields} | {"numel": np.array([4.0])}
    assert formula.value(sums)[0] == pytest.approx(1.0)
