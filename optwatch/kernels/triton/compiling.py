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

from optwatch.codecs import Kind
from optwatch.kernels.plan import PlanSpec
from optwatch.kernels.triton import functions
from optwatch.kernels.triton.passes import measure
from optwatch.kernels.triton.step import step

MATHEMATICS = {"cuda": functions.PTX, "hip": functions.GENERIC, "interpreter": functions.INTERPRETED}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Shape:
    """How a kernel cuts its work: the plan's parameters of speed, without influence on weights and codes."""

    item: int  # elements of a program
    tile: int  # elements worked on at once; a multiple of every block
    levels: int  # log2 of the neighbouring elements that a thread loads at once
    warps: int
    registers: int  # that a thread of the kernel of every step may use, on NVIDIA chips


#: The interpreter pays for each operation; tiles of a small tensor's size leave full and partial ones in most tests.
INTERPRETER_SHAPE = Shape(item=1 << 14, tile=1 << 12, levels=0, warps=1, registers=0)


def device_shape(spec: PlanSpec) -> Shape:
    """The shape for a GPU.

    A thread has eight elements: sixteen would share what is computed once a block among more of them, but need twice
    the registers and so halve the number of threads that hide each other's waiting. Loads are as wide as the
    narrowest type allows, up to 16 bytes; a thread that sums other neighbours than it loads would exchange them.
    With 128 registers four programs fit a multiprocessor; three slots, a correction of the weight beside two, or codes
    that share a byte need some more, and with 168 it is three; with all of that two.
    """
    types = [spec.grad_dtype, *(codec.buffers[0].dtype for codec in (spec.weight, *spec.codecs))]
    widest = max(16 // dtype.itemsize for dtype in types)
    levels = min(widest, 8).bit_length() - 1
    packed = any(codec.buffers[0].packed > 1 for codec in spec.codecs)
    kept = len(spec.codecs) + len(spec.weight.buffers) + 2 * packed
    registers = 128 if kept < 4 else 168 if kept < 6 else 255
    return Shape(item=1 << 14, tile=1024, levels=levels, warps=4, registers=registers)


def functions_of(owner: object, key: object) -> Any:
    """What the ``triton`` module beside a rule's or codec's definition has for ``key``, or None."""
    package = type(owner).__module__.rpartition(".")[0]
    try:
        module = importlib.import_module(f"{package}.triton")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.triton":
            raise
        return None
    return module.FUNCTIONS.get(key)


def step_functions(spec: PlanSpec) -> tuple[Any, Any, tuple[Any, ...]]:
    """The functions of the rule, of the weight's codec, and of each slot's."""
    slots = zip(spec.codecs, spec.rule.slots, strict=True)
    return (
        functions_of(spec.rule, spec.rule.name),
        functions_of(spec.weight, spec.weight.name),
        tuple(functions_of(codec, slot.kind) for codec, slot in slots),
    )


def constants(spec: PlanSpec, shape: Shape, full: bool, gate: int, math: int) -> dict[str, Any]:
    """The compile-time arguments of the step kernel, except for the functions."""
    return {
        "SCALARS": len(spec.rule.scalars),
        "NORMS": len(spec.rule.norms),
        "STOCHASTIC": spec.weight.stochastic,
        "GRAD": TYPES[spec.grad_dtype],
        "SECOND": sum(1 << s for s, slot in enumerate(spec.rule.slots) if slot.kind is Kind.SECOND_MOMENT),
        "ITEM": shape.item,
        "TILE": shape.tile,
        "LEVELS": shape.levels,
        "FULL": full,
        "GATE": gate,
        "MATH": math,
    }


def compile_step(spec: PlanSpec, target: GPUTarget, full: bool, gate: int = 0, first: bool = False) -> Any:
    """The step kernel compiled for ``target``, which need not be there. The result's ``asm`` holds the machine code.

    ``first`` compiles the pass before it, of a rule that takes norms.
    """
    shape = device_shape(spec)
    math = MATHEMATICS[target.backend].value
    rule, weight, slots = step_functions(spec)
    types = {"table": "*i64", "grads": "*i64", "scalars": "*fp32", "keys": "*u32", "items": "*i32", "partials": "*fp32",
             "norms": "*fp64", "decision": "*fp64", "behind": "*i32", "known": "*i32",
             "count": "i32", "tensors": "i32"}  # fmt: skip
    fixed = constants(spec, shape, full, gate, math)
    kernel = measure if first else step
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    signature = {
        **types,
        "RULE": ("constexpr",) * len(rule),
        "WEIGHT": ("constexpr",) * len(weight),
        "SLOTS": tuple(("constexpr",) * len(slot) for slot in slots),
        **dict.fromkeys(fixed, "constexpr"),
    }
    at = len(types)
    constexprs: dict[Any, Any] = {(at, i): function for i, function in enumerate(rule)}
    constexprs |= {(at + 1, i): function for i, function in enumerate(weight)}
    constexprs |= {
        (at + 2, s, i): function for s, slot in enumerate(slots) for i, function in enumerate(slot)
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs | fixed,
        {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"},
    )
    return triton.compile(source, target=target, options=options(shape, full, target.backend))


def options(shape: Shape, full: bool, backend: str) -> dict[str, Any]:
    """The compiler's options.

    Fusion is explicit in the kernels, so that weights and codes do not depend on what else is summed. Registers of the
    kernel of every step are limited, so that programs share a multiprocessor; the other one, taken now and then,
    would spill.
    """
    limit = {"maxnreg": shape.registers} if backend == "cuda" and not full else {}
    return {"num_warps": shape.warps, "enable_fp_fusion": False, **limit}
