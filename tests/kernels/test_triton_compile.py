"""The Triton kernels compile without a GPU, to code that is short, loads widely and keeps to its registers.

Instructions are counted in the loop over full tiles, all of them, address arithmetic and waiting included: per element,
that is the loop's length times the threads of a tile over its elements.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from optwatch.codecs import FORMATS
from optwatch.kernels import PlanSpec
from optwatch.kernels.triton.compiling import compile_step, device_shape, step_functions
from optwatch.kernels.triton.step import GATED, ZERO
from optwatch.rules import RULES
from tests.kernels.agreement import ALONE
from tests.kernels.sass import main_loop, resources, uses_stack

TYPES = (torch.float32, torch.bfloat16)
KERNELS = ("plain", "full")
CHIPS = (80, 90, 100)
#: Instructions an element on sm_90, at most: of each format's plain and full kernel.
BUDGET = {
    "fp32": (24, 42),
    "bf16": (42, 88),
    "int8": (80, 115),
    "int8_dynamic": (142, 210),
    "fp8": (86, 144),
    "int4": (146, 194),
}
#: The same of weight formats, with 8-bit state.
WEIGHT_BUDGET = {"stochastic": (92, 127), "split8": (98, 133), "split16": (90, 125)}


def spec_of(rule: str, fmt: str, param: torch.dtype, grad: torch.dtype) -> PlanSpec:
    codecs = tuple(FORMATS[fmt][slot.kind] for slot in RULES[rule].slots)
    return PlanSpec(RULES[rule], codecs, param, grad)


@functools.cache
def compiled(rule: str, fmt: str, param: torch.dtype, grad: torch.dtype, kernel: str, chip: int) -> Any:
    """One kernel for an NVIDIA chip; several tests look at it."""
    return compile_step(spec_of(rule, fmt, param, grad), GPUTarget("cuda", chip, 32), kernel == "full")


def has_kernel(rule: str, fmt: str) -> bool:
    """Whether rule and codecs have ``triton`` modules; without one a plan runs on the reference."""
    functions, _, slots = step_functions(spec_of(rule, fmt, torch.float32, torch.float32))
    return functions is not None and None not in slots


#: The rules with the largest kernel for each number of slots: those whose kernels with full statistics are compiled
#: in every run of the tests, as all plain ones are.
LARGEST = ("sgd", "lion", "adadelta", "ademamix")


def often(rule: str, fmt: str, dtype: torch.dtype, kernel: str, chip: int) -> bool:
    """Whether a plan is compiled in every run: AdamW's on sm_90, others in int8; and AdamW's of every step on all.

    Of the formats that are slow to compile, one kernel.
    """
    if fmt in ALONE:
        return (rule, dtype, kernel, chip) == ("adamw", torch.float32, "plain", 90)
    if rule != "adamw":
        return (fmt, dtype, chip) == ("int8", torch.float32, 90) and (kernel == "plain" or rule in LARGEST)
    return chip == 90 or (fmt, dtype, kernel) == ("int8", torch.bfloat16, "plain")


def ever(rule: str, fmt: str, dtype: torch.dtype, kernel: str, chip: int) -> bool:
    """Whether a plan is compiled at all: AdamW's in every way, others in int8, the largest kernels in every format.

    A rule and a codec meet in registers only, so the large ones speak for the rest.
    """
    if rule == "adamw":
        return True
    if dtype != torch.float32:
        return False
    return fmt == "int8" or (rule in LARGEST and (kernel, chip) == ("plain", 90))


def every_plan() -> list[Any]:
    """Rule × format × equal element types × kernel × chip, as far as `ever` goes."""
    return [
        pytest.param(*plan, marks=[] if often(*plan) else [pytest.mark.slow])
        for plan in itertools.product(RULES, FORMATS, TYPES, KERNELS, CHIPS)
        if has_kernel(*plan[:2]) and ever(*plan)
    ]


def adamw_plans() -> list[Any]:
    """AdamW on sm_90: format × equal element types × kernel."""
    return [
        pytest.param(*plan, marks=[] if often("adamw", *plan, 90) else [pytest.mark.slow])
        for plan in itertools.product(BUDGET, TYPES, KERNELS)
    ]


def test_every_rule_has_a_kernel() -> None:
    """In every format."""
    assert all(has_kernel(rule, fmt) for rule in RULES for fmt in FORMATS)


@pytest.mark.parametrize(("rule", "fmt", "dtype", "kernel", "chip"), every_plan())
def test_nothing_spills(rule: str, fmt: str, dtype: torch.dtype, kernel: str, chip: int) -> None:
    """No plan keeps anything in local memory, on any chip, and the plain kernels leave room for others."""
    binary = compiled(rule, fmt, dtype, dtype, kernel, chip)
    used = resources(binary)
    assert used["local"] == 0
    assert not uses_stack(binary)  # some reserve a few bytes that nothing touches
    limit = device_shape(spec_of(rule, fmt, dtype, dtype)).registers
    assert used["reg"] <= (limit if kernel == "plain" else 255)
    assert binary.metadata.enable_fp_fusion is False


@pytest.mark.parametrize(
    ("rule", "gate", "first"),
    [
        ("adamw", GATED.value, False),
        ("adamw", ZERO.value, False),
        ("lamb", ZERO.value, False),
        ("lamb", ZERO.value, True),
        ("lamb", 0, True),
    ],
)
def test_nothing_spills_in_steps_that_are_decided_and_in_first_passes(
    rule: str, gate: int, first: bool
) -> None:
    """Clipping costs no instruction an element, zeroing two; a first pass loads as widely and stores no tile."""
    spec = spec_of(rule, "int8", torch.float32, torch.float32)
    binary = compile_step(spec, GPUTarget("cuda", 90, 32), False, gate, first)
    used, shape = resources(binary), device_shape(spec)
    assert used["stack"] == used["local"] == 0
    assert used["reg"] <= shape.registers
    loop = main_loop(binary, stores=not first)
    assert loop.count("LDG.E.128") == 4
    if not first:
        elements = shape.tile // (32 * shape.warps)
        plain = compiled("adamw", "int8", torch.float32, torch.float32, "plain", 90)
        assert len(loop.body) <= len(main_loop(plain).body) + 2 * elements * (gate == ZERO.value) + 2


@pytest.mark.parametrize(("fmt", "dtype", "kernel"), adamw_plans())
def test_instructions_an_element(fmt: str, dtype: torch.dtype, kernel: str) -> None:
    """AdamW stays within its budget."""
    shape = device_shape(spec_of("adamw", fmt, dtype, dtype))
    loop = main_loop(compiled("adamw", fmt, dtype, dtype, kernel, 90))
    assert len(loop.body) * 32 * shape.warps / shape.tile <= BUDGET[fmt][kernel == "full"]


@pytest.mark.parametrize(("fmt", "dtype", "kernel"), adamw_plans())
def test_load_widths(fmt: str, dtype: torch.dtype, kernel: str) -> None:
    """Parameters, gradients and unpacked state 16 bytes at a time, codes 8; nothing else is large enough to matter."""
    spec = spec_of("adamw", fmt, dtype, dtype)
    shape = device_shape(spec)
    loop = main_loop(compiled("adamw", fmt, dtype, dtype, kernel, 90))
    elements = shape.tile // (32 * shape.warps)
    primaries = [codec.buffers[0] for codec in spec.codecs]
    packed = sum(buffer.packed > 1 for buffer in primaries)  # loaded four bytes at a time
    sizes = [dtype.itemsize] * 2 + [buffer.dtype.itemsize for buffer in primaries if buffer.packed == 1]
    assert loop.count("LDG.E.128") == sum(elements * size // 16 for size in sizes if size > 1)
    codes = sum(size == 1 for size in sizes)
    pairs = sum(buffer.per_block == 2 for codec in spec.codecs for buffer in codec.buffers)
    assert loop.count("LDG.E.64") == codes * elements // 8 + pairs
    # Beside them: one load for each block's scale, and stores as many as the width of a type asks for.
    scales = sum(buffer.per_block == 1 for codec in spec.codecs for buffer in codec.buffers)
    assert loop.count("LDG") == loop.count("LDG.E.128", "LDG.E.64") + scales + packed


@pytest.mark.parametrize("dtype", TYPES)
def test_random_numbers_are_shared(dtype: torch.dtype) -> None:
    """Neighbours share a hash: its first multiplication is there once for every two elements of a thread."""
    shape = device_shape(spec_of("adamw", "int8", dtype, dtype))
    loop = main_loop(compiled("adamw", "int8", dtype, dtype, "plain", 90))
    elements = shape.tile // (32 * shape.warps)
    assert sum("0x7feb352d" in operands for _, operands in loop.body) == elements // 2


@pytest.mark.parametrize(
    ("weights", "kernel", "chip"),
    [
        pytest.param(*plan, marks=[] if plan[1:] == ("plain", 90) else [pytest.mark.slow])
        for plan in itertools.product(WEIGHT_BUDGET, KERNELS, CHIPS)
    ],
)
def test_weight_formats(weights: str, kernel: str, chip: int) -> None:
    """No spills with 8-bit state; on sm_90 within a budget, and what lies beside the weights is loaded as widely."""
    spec = dataclasses.replace(spec_of("adamw", "int8", torch.bfloat16, torch.bfloat16), weights=weights)
    shape = device_shape(spec)
    binary = compile_step(spec, GPUTarget("cuda", chip, 32), kernel == "full")
    used, loop = resources(binary), main_loop(binary)
    assert used["stack"] == used["local"] == 0
    assert not loop.count("LDL", "STL")
    assert used["reg"] <= (shape.registers if kernel == "plain" else 255)
    if chip == 90:
        assert len(loop.body) * 32 * shape.warps / shape.tile <= WEIGHT_BUDGET[weights][kernel == "full"]
        beside = sum(buffer.dtype.itemsize for buffer in spec.weight.buffers[1:])
        assert loop.count("LDG.E.128") == 2 + (beside == 2)
        assert loop.count("LDG.E.64") == 3 + (beside == 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mixed_types(kernel: str) -> None:
    """fp32 weights with bf16 gradients, and each slot in a format of its own."""
    rule = RULES["adamw"]
    codecs = (FORMATS["bf16"][rule.slots[0].kind], FORMATS["int8"][rule.slots[1].kind])
    spec = PlanSpec(rule, codecs, torch.float32, torch.bfloat16)
    binary = compile_step(spec, GPUTarget("cuda", 90, 32), kernel == "full")
    assert resources(binary)["stack"] == 0
    assert main_loop(binary).count("LDG.E.128") == 4


@pytest.mark.parametrize("fmt", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_amd(fmt: str, kernel: str) -> None:
    """The same functions compile for an AMD chip, without instructions of another maker's."""
    binary = compile_step(
        spec_of("adamw", fmt, torch.bfloat16, torch.bfloat16),
        GPUTarget("hip", "gfx942", 64),
        kernel == "full",
    )
    assert ".vgpr_spill_count: 0" in binary.asm["amdgcn"]
