"""The Triton kernels on the GPU of this machine: first whether they are right, then how fast they are.

    python -m benchmarks.gpu [--parameters 134217728] [--output DIRECTORY]

Every plan takes steps beside the reference, and replays of captured steps beside ordinary ones; what disagrees ends the
run before anything is timed. Then: the
bandwidth of a plain copy, steps of each format as a share of it (bytes that a step must move, over its time), the
host's time for a step of 300 tensors, and steps under torch's check for synchronisation. Results go to
``results/gpu.json``; the exit code is 1 if a plan is wrong or something waits for the device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optwatch.codecs import FORMATS
from optwatch.kernels import BoundPlan, PlanSpec, PlanTensor, backend
from optwatch.kernels.random import keys
from optwatch.metrics.fields import CHEAP_FIELDS
from optwatch.optim import LAMB, SGD, AdamW, Lion, Optimizer
from optwatch.rules import RULES

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.gpu"
TYPES = (torch.float32, torch.bfloat16)
#: Share of the copy bandwidth that an 8-bit step is to reach, and the host's time for a step of 300 tensors.
TARGETS = {"int8 float32 plain": 0.75, "int8 bfloat16 plain": 0.55, "host_us": 150.0}
SIZES = (1, 127, 4097, 16_384, 1_000_003)  # of the tensors that are checked
REPEATS = 30
OPTIONS = {
    "lr": np.array([1e-3]),
    "betas": np.array([[0.9, 0.999]]),
    "eps": np.array([1e-8]),
    "weight_decay": np.array([0.1]),
    "maximize": np.array([0.0]),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, write, print."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=int, default=1 << 27, help="elements of the timed steps (2**27)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write gpu.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"{COMMAND}: torch {torch.__version__} sees no CUDA device, nothing to measure", file=sys.stderr
        )
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    problems = list(wrong_plans(device))
    if problems:
        print("\n".join(["the kernels disagree with the reference:", *problems]), file=sys.stderr)
        return 1
    print("every plan agrees with the reference", flush=True)
    problems = list(wrong_replays(device))
    if problems:
        print("\n".join(["replays of a CUDA graph are no steps:", *problems]), file=sys.stderr)
        return 1
    print("replays of captured steps are ordinary steps", flush=True)

    result = measure(device, options.parameters)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)
    return 1 if result["synchronises"] else 0


def measure(device: torch.device, parameters: int) -> dict[str, Any]:
    """All figures, with what they were measured on."""
    import triton

    copy = copy_bandwidth(device)
    steps = {}
    for fmt, dtype in itertools.product(FORMATS, TYPES):
        for full in (False, True):
            name = f"{fmt} {str(dtype).removeprefix('torch.')} {'full' if full else 'plain'}"
            seconds, nbytes = step_time(device, fmt, dtype, full, parameters)
            steps[name] = {
                "ms": 1e3 * seconds,
                "gb_per_s": nbytes / seconds / 1e9,
                "of_copy": nbytes / seconds / copy,
            }
    return {
        "command": COMMAND,
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "parameters": parameters,
        "copy_gb_per_s": copy / 1e9,
        "steps": steps,
        "torch_fused_float32_ms": 1e3 * torch_fused_time(device, parameters),
        "host_us": host_times(device),
        "synchronises": synchronises(device),
    }


def print_table(result: dict[str, Any]) -> None:
    """The figures for people."""
    print(f"{result['device']}, torch {result['torch']}, Triton {result['triton']}")
    print(f"copy {result['copy_gb_per_s']:.0f} GB/s; steps of {result['parameters']:,} parameters:")
    for name, step in result["steps"].items():
        target = f"  (target {TARGETS[name]:.0%})" if name in TARGETS else ""
        print(
            f"  {name:22} {step['ms']:8.3f} ms {step['gb_per_s']:7.0f} GB/s {step['of_copy']:6.1%} of copy{target}"
        )
    print(f"  {'torch fused float32':22} {result['torch_fused_float32_ms']:8.3f} ms")
    for name, time_us in result["host_us"].items():
        print(f"host, 300 tensors, {name}: {time_us:.0f} us  (target {TARGETS['host_us']:.0f})")
    print(f"synchronisation: {result['synchronises'] or 'none'}")


# ---- correctness -----------------------------------------------------------------------------------------------


def spec_of(rule: str, formats: Sequence[str], param: torch.dtype, grad: torch.dtype) -> PlanSpec:
    """A plan by the names of its parts."""
    slots = RULES[rule].slots
    codecs = tuple(FORMATS[fmt][slot.kind] for fmt, slot in zip(formats, slots, strict=True))
    return PlanSpec(RULES[rule], codecs, param, grad)


def tensors_of(spec: PlanSpec, sizes: Sequence[int], device: torch.device) -> list[PlanTensor]:
    """Random weights without state, always the same."""
    gen = torch.Generator(device).manual_seed(0)
    return [
        PlanTensor(
            (0.1 * torch.randn(size, generator=gen, device=device)).to(spec.param_dtype),
            tuple(codec.allocate(size, device) for codec in spec.codecs),
        )
        for size in sizes
    ]


def inputs(spec: PlanSpec, n: int, step: int) -> tuple[Any, Any]:
    """Scalars and keys of ``n`` tensors."""
    scalars = np.repeat(spec.rule.prepare(OPTIONS, np.array([float(step)])), n, axis=0)
    numbers = keys(
        np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64), len(spec.codecs) + 1, np.full(n, float(step))
    )
    return scalars, numbers


def gradients(spec: PlanSpec, sizes: Sequence[int], step: int, device: torch.device) -> list[Tensor | None]:
    """Heavy-tailed gradients, one of them starting at an odd element, one missing in every second step."""
    gen = torch.Generator(device).manual_seed(step)
    made: list[Tensor | None] = []
    for i, size in enumerate(sizes):
        room = torch.randn(2, size + 1, generator=gen, device=device)
        grad = (room[0] * torch.exp(2 * room[1])).to(spec.grad_dtype)
        made.append(None if i == step % 2 else grad[1:] if i == len(sizes) - 2 else grad[:-1])
    return made


def wrong_plans(device: torch.device) -> Iterator[str]:
    """What is wrong with each plan that the backend offers to run."""
    for name, rule in RULES.items():
        for formats in itertools.product(FORMATS, repeat=len(rule.slots)):
            for param, grad in itertools.product(TYPES, TYPES):
                spec = spec_of(name, formats, param, grad)
                reason = backend("triton").why_not(spec, device)
                if reason is not None:
                    print(f"not checked: {spec}: {reason}", flush=True)
                    continue
                yield from (f"{spec}: {problem}" for problem in problems_of(spec, device))


def problems_of(spec: PlanSpec, device: torch.device, steps: int = 4) -> Iterator[str]:
    """Steps of the reference and of both kernels, each step from the reference's state."""
    truth, plain, full = (tensors_of(spec, SIZES, device) for _ in range(3))
    reference = backend("reference").bind(spec, truth)
    plans = [backend("triton").bind(spec, tensors) for tensors in (plain, full)]
    for step in range(1, steps + 1):
        grads = gradients(spec, SIZES, step, device)
        scalars, numbers = inputs(spec, len(SIZES), step)
        expected = reference.run(grads, scalars, numbers, True)
        cheap, rows = (plan.run(grads, scalars, numbers, bool(i)) for i, plan in enumerate(plans))
        for a, b, c in zip(truth, plain, full, strict=True):
            for (what, x), (_, y), (_, z) in zip(named(a), named(b), named(c), strict=True):
                if not torch.equal(y, z):
                    yield f"step {step}: {what} of {len(a.param)} elements differs with full statistics"
                if not close(what, x, y):
                    yield f"step {step}: {what} of {len(a.param)} elements is off"
                y.copy_(x)
                z.copy_(x)
        sums = len(CHEAP_FIELDS)
        # Most sums hold squares; a sum with a sign may cancel, which 2e-3 of the largest row allows for.
        room = 1e-3 * expected.abs() + 2e-3 * expected.abs().amax(0)
        if not bool(((rows - expected).abs() <= room).all()):
            yield f"step {step}: statistics are off by {((rows - expected).abs() - room).amax(0).tolist()}"
        if not torch.allclose(cheap[:, :sums], rows[:, :sums], rtol=1e-4):
            yield f"step {step}: the cheap sums differ"


def named(tensor: PlanTensor) -> list[tuple[str, Tensor]]:
    """All tensors of a plan's tensor, by name."""
    return [
        ("weight", tensor.param),
        *((f"{i}.{n}", b) for i, s in enumerate(tensor.slots) for n, b in s.items()),
    ]


def close(what: str, expected: Tensor, actual: Tensor) -> bool:
    """Codes: one apart at most, and one in a thousand at most; fp32: to a millionth of the largest; bf16: to an ulp."""
    difference = (expected.double() - actual.double()).abs()
    if not expected.dtype.is_floating_point:
        return bool(difference.max() <= 1) and bool(
            (difference > 0).double().mean() <= 1e-3 + 1 / len(expected)
        )
    relative = 1e-5 if what.endswith("grid") else 4e-6 if expected.dtype is torch.float32 else 2.0**-7
    size = expected.double().abs() + (0.05 if what == "weight" else expected.double().abs().max() * 1e-2)
    return bool((difference <= relative * size).all())


def wrong_replays(device: torch.device) -> Iterator[str]:
    """What differs between an optimizer whose step is replayed by a CUDA graph and one that takes the same steps."""
    for kind, state in itertools.product((AdamW, LAMB, Lion, SGD), ("fp32", "int8", "bf16")):
        for settings in ({}, {"max_grad_norm": 1.0, "nonfinite": "skip"}):
            params = [[torch.nn.Parameter(torch.ones(n, device=device)) for n in SIZES] for _ in range(2)]
            rates = [torch.tensor(1e-3, device=place) for place in (device, "cpu")]
            captured, plain = (
                kind(ours, lr=rate, state=state, backend="triton", capturable=rate.is_cuda, **settings)
                for ours, rate in zip(params, rates, strict=True)
            )
            replays_and_steps(captured, plain, rates)
            for size, mine, other in zip(SIZES, *params, strict=True):
                values = captured.state[mine], plain.state[other]
                same = torch.equal(mine, other) and all(
                    torch.equal(values[0][key].cpu(), values[1][key].cpu()) for key in values[1]
                )
                if not same:
                    yield f"{kind.__name__}, {state}, {settings}: {size} elements"


def replays_and_steps(captured: Optimizer, plain: Optimizer, rates: Sequence[Tensor]) -> None:
    """The same ten steps of both, the first two of them ordinary ones; the gradients of one are not finite."""
    optimizers = captured, plain
    params = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    for param in itertools.chain(*params):
        param.grad = torch.empty_like(param)
    graph = torch.cuda.CUDAGraph()
    for step in range(10):
        for i, pair in enumerate(zip(*params, strict=True)):
            gen = torch.Generator(rates[0].device).manual_seed(100 * step + i)
            grad = torch.randn(len(pair[0]), generator=gen, device=rates[0].device)
            if captured.nonfinite and step == 5:
                grad[-1] = torch.inf
            for param in pair:
                param.grad.copy_(grad)
        for rate in rates:
            rate.fill_(1e-3 / (1 + step))
        if step == 2:
            with torch.cuda.graph(graph):
                captured.step()
        if step < 2:
            captured.step()
        else:
            graph.replay()
        plain.step()
    for optimizer in optimizers:
        optimizer.state_dict()  # waits for what the device has decided


# ---- speed -----------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object]) -> float:
    """Median device time of ``run``, after some to warm up."""
    times = []
    for i in range(REPEATS + 5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the device copying 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def bound(
    spec: PlanSpec, sizes: Sequence[int], device: torch.device
) -> tuple[BoundPlan, list[Tensor | None]]:
    """A plan of random tensors with gradients."""
    gen = torch.Generator(device).manual_seed(1)
    grads: list[Tensor | None] = [
        torch.randn(size, generator=gen, device=device, dtype=torch.float32).to(spec.grad_dtype)
        for size in sizes
    ]
    return backend("triton").bind(spec, tensors_of(spec, sizes, device)), grads


def step_time(
    device: torch.device, fmt: str, dtype: torch.dtype, full: bool, parameters: int
) -> tuple[float, int]:
    """Seconds of a step of AdamW, and the bytes it must move: weights and state twice, gradients once."""
    spec = spec_of("adamw", (fmt,) * 2, dtype, dtype)
    sizes = [parameters // 8] * 8
    plan, grads = bound(spec, sizes, device)
    scalars, numbers = inputs(spec, len(sizes), 10)
    nbytes = sum(3 * dtype.itemsize * n + sum(2 * codec.nbytes(n) for codec in spec.codecs) for n in sizes)
    return seconds(lambda: plan.run(grads, scalars, numbers, full)), nbytes


def torch_fused_time(device: torch.device, parameters: int) -> float:
    """The same step by torch.optim.AdamW(fused=True), with fp32 state."""
    params = [torch.nn.Parameter(torch.randn(parameters // 8, device=device)) for _ in range(8)]
    for param in params:
        param.grad = torch.randn_like(param)
    return seconds(torch.optim.AdamW(params, fused=True).step)


def optimizer_of(device: torch.device) -> AdamW:
    """300 parameters of 64 Ki elements with gradients."""
    params = [torch.nn.Parameter(torch.randn(1 << 16, device=device)) for _ in range(300)]
    for param in params:
        param.grad = torch.randn_like(param)
    return AdamW(params, state="int8", backend="triton")


def host_times(device: torch.device) -> dict[str, float]:
    """Microseconds until the call returns, the device idle before each: the plan alone, and the optimizer's step."""
    spec = spec_of("adamw", ("int8",) * 2, torch.float32, torch.float32)
    plan, grads = bound(spec, [1 << 16] * 300, device)
    scalars, numbers = inputs(spec, 300, 10)
    optimizer = optimizer_of(device)
    return {
        "plan": host_time(lambda: plan.run(grads, scalars, numbers, False)),
        "optimizer.step": host_time(optimizer.step),
    }


def host_time(run: Callable[[], object]) -> float:
    """Median microseconds of 200 calls."""
    times = []
    for i in range(220):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if i >= 20:
            times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def synchronises(device: torch.device) -> str:
    """What torch says when a step waits for the device, or nothing."""
    optimizer = optimizer_of(device)
    for every in (1, 10**9):  # with full statistics in each step, and without
        unsubscribe = optimizer.subscribe(ignore, every=every)
        optimizer.step()  # binds and compiles, which may wait
        optimizer.step()
        try:
            with no_synchronisation():
                for _ in range(5):
                    optimizer.step()
        except RuntimeError as error:
            return str(error)
        unsubscribe()
    return ""


def ignore(stats: object) -> None:
    """A subscriber that wants nothing but to be called."""


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Let torch raise where something waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    sys.exit(main())
