"""Kernels for a plan: the constants a plan is compiled with, and compiling without a device."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optwatch.codecs import Codec, Kind
from optwatch.kernels.plan import PlanSpec
from optwatch.kernels.triton import functions
from optwatch.kernels.triton.step import step

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Shape:
    """How a kernel cuts its work: the plan's parameters of speed, without influence on weights and codes."""

    item: int = 1 << 14  # elements of a program
    tile: int = 2048  # elements worked on at once
    levels: int = 4  # log2 of the neighbouring elements of a thread
    warps: int = 4


DEVICE_SHAPE = Shape()
#: The interpreter pays for each operation, however large the tile.
INTERPRETER_SHAPE = Shape(tile=1 << 14, levels=0)


def functions_of(package: str) -> Any:
    """``FUNCTIONS`` of the ``triton`` module in a rule's or codec's package, or None if it has none."""
    try:
        module = importlib.import_module(f"{package}.triton")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.triton":
            raise
        return None
    return module.FUNCTIONS


def codec_functions(codec: Codec, kind: Kind) -> Any:
    """The ``(load, store)`` functions of a codec, or None."""
    found = functions_of(type(codec).__module__.rpartition(".")[0])
    return None if found is None else found.get(kind)


def step_functions(spec: PlanSpec) -> tuple[Any, tuple[Any, ...]]:
    """The rule's functions, and those of each slot's codec."""
    rule = functions_of(type(spec.rule).__module__.rpartition(".")[0])
    kinds = (slot.kind for slot in spec.rule.slots)
    return rule, tuple(codec_functions(codec, kind) for codec, kind in zip(spec.codecs, kinds, strict=True))


def constants(spec: PlanSpec, shape: Shape, full: bool, math: int) -> dict[str, Any]:
    """The compile-time arguments of the step kernel, except for the functions."""
    return {
        "SCALARS": len(spec.rule.scalars),
        "PARAM": TYPES[spec.param_dtype],
        "GRAD": TYPES[spec.grad_dtype],
        "SECOND": sum(1 << s for s, slot in enumerate(spec.rule.slots) if slot.kind is Kind.SECOND_MOMENT),
        "ITEM": shape.item,
        "TILE": shape.tile,
        "LEVELS": shape.levels,
        "FULL": full,
        "MATH": math,
    }


def compile_step(spec: PlanSpec, target: GPUTarget, full: bool, shape: Shape = DEVICE_SHAPE) -> Any:
    """The step kernel compiled for ``target``, which need not be there. The result's ``asm`` holds the machine code."""
    math = (functions.PTX if target.backend == "cuda" else functions.GENERIC).value
    rule, slots = step_functions(spec)
    types = {"table": "*i64", "grads": "*i64", "scalars": "*fp32", "keys": "*u32", "items": "*i32", "partials": "*fp32",
             "count": "i32"}  # fmt: skip
    fixed = constants(spec, shape, full, math)
    signature = {
        **types,
        "RULE": ("constexpr",) * len(rule),
        "SLOTS": tuple(("constexpr",) * len(slot) for slot in slots),
        **dict.fromkeys(fixed, "constexpr"),
    }
    at = len(types)
    constexprs: dict[Any, Any] = {(at, i): function for i, function in enumerate(rule)}
    constexprs |= {(at + 1, s, i): function for s, slot in enumerate(slots) for i, function in enumerate(slot)}
    source = ASTSource(step, signature, constexprs | fixed, {(i,): [["tt.divisibility", 16]] for i in range(6)})
    return triton.compile(source, target=target, options=options(shape))


def options(shape: Shape) -> dict[str, Any]:
    """The compiler's options. Fusion is explicit in the kernels, so that weights do not depend on what else is summed."""
    return {"num_warps": shape.warps, "enable_fp_fusion": False}
