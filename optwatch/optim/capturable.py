"""Steps whose numbers come to be on the device, so that a CUDA graph can hold them (``capturable=True``).

The count of steps is a vector there, which a step adds to by itself. Scalars and random keys follow from it by the
formulas of the host (:meth:`optwatch.rules.Rule.prepare`, :mod:`optwatch.kernels.random`), options that are tensors on
the device are read there, and everything else that the host knows is a constant of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from optwatch.kernels import CAPTURING, PlanSpec, capture, choose_backend
from optwatch.kernels.capture import Sent, addresses_of
from optwatch.kernels.plan import DECISION, CapturablePlan
from optwatch.kernels.random import device_keys, offsets, streams
from optwatch.optim.binding import Binding, State, with_gradients
from optwatch.optim.gate import Deferred, Verdict
from optwatch.optim.stats import PlanStats

#: Of a capture that would have to do more than a replay may do again.
NOT_BOUND = (
    "step() is being captured into a CUDA graph, and has to make state or tables that a replay must not make again: "
    "take a step like it before the capture, with the same parameters, types of gradients, formats and settings"
)

_SKIPPED = DECISION.index("skipped")


def binding_class(
    capturable: bool, spec: PlanSpec, device: torch.device, backend: str | None
) -> type[Binding]:
    """The kind of binding for a plan. On a CPU, where there is nothing to capture, ``capturable`` changes nothing.

    Raises a ``ValueError`` where the plan runs on another device without a backend whose steps can be captured.
    """
    if not capturable:
        return Binding
    chosen = choose_backend(spec, device, backend).name
    if chosen in CAPTURING:
        return CapturableBinding
    if device.type == "cpu":
        return Binding
    raise ValueError(
        f"capturable=True: the backend {chosen!r}, which runs {spec} on {device}, cannot be captured"
    )


class CapturableBinding(Binding):
    """A binding whose steps a CUDA graph can hold, after a first one outside of it."""

    counted_by_host = False

    def _share_steps(self, states: Sequence[State]) -> None:
        """Make every ``state["step"]`` a view of one vector on the device."""
        device = self.device
        self._count = torch.tensor([float(state["step"]) for state in states], dtype=torch.float32).to(device)
        for i, state in enumerate(states):
            state["step"] = self._count[i]
        self._members = torch.from_numpy(self._group_of.astype(np.int64)).to(device)
        self._sent: dict[str, Sent] = {}
        self._loaded: set[tuple[object, ...]] = set()  # by which the kernels of the steps so far were chosen
        self._summed: tuple[Sequence[Tensor | None], Tensor] | None = None  # the step's, with their addresses

    @property
    def device(self) -> torch.device:
        """Where its steps can be captured."""
        return self.params[0].device

    @property
    def defers(self) -> bool:
        """Always: the device counts."""
        return True

    def uncount(self, stepped: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Nothing to do: a step that was skipped was never counted."""

    def sum_gradients(self, grads: Sequence[Tensor | None]) -> Tensor:
        """As every binding's."""
        self._summed = grads, self._send("addresses", addresses_of(grads))
        return self._capturable.sum_there(self._summed[1])

    def run(
        self,
        groups: Sequence[Mapping[str, Any]],
        options: Sequence[str],
        grads: Sequence[Tensor | None],
        full: bool,
        aside: Mapping[str, float],
        verdict: Verdict | Deferred | None = None,
    ) -> PlanStats | None:
        """As every binding's, without a number that the host computes from the step."""
        if all(grad is None for grad in grads):
            return None
        summed, self._summed = self._summed, None
        known = summed is not None and summed[0] is grads
        self._check_loaded((full, verdict is not None, verdict is not None and verdict.zero, *aside))
        addresses = summed[1] if summed and known else self._send("addresses", addresses_of(grads))
        there = addresses != 0
        step = (self._count if aside else self._count + there).double()
        values = self._values(groups, options) | {
            name: torch.full_like(step, value) for name, value in aside.items()
        }
        scalars = self.spec.rule.prepare(values, step.clamp(min=1))
        decision = self._decision(verdict)
        self._copy_in()
        rows = self._capturable.run_there(
            addresses, scalars, self._keys(groups, step, aside), full, verdict is not None and verdict.zero, decision
        )  # fmt: skip
        self._copy_out()
        if not aside:
            self._count += there if decision is None else there & (decision[_SKIPPED] == 0)
        return PlanStats(self.layout, rows if verdict is None else with_gradients(rows, verdict))

    def _check_loaded(self, kernels: tuple[object, ...]) -> None:
        """Raise a ``RuntimeError`` in a capture of kernels that are not compiled and loaded yet."""
        if capture.capturing(self.device):
            if kernels not in self._loaded:
                raise RuntimeError(NOT_BOUND)
        else:
            self._loaded.add(kernels)

    @property
    def _capturable(self) -> CapturablePlan:
        return cast(CapturablePlan, self._plan)

    def _send(self, name: str, values: np.ndarray[Any, Any]) -> Tensor:
        """``values`` on the device; ``name`` is what they are the newest of."""
        if name not in self._sent:
            dtype = torch.from_numpy(values[:0]).dtype
            self._sent[name] = Sent(values.shape, dtype, self.device)
        return self._sent[name].send(values)

    def _values(self, groups: Sequence[Mapping[str, Any]], options: Sequence[str]) -> dict[str, Tensor]:
        """Each option of every tensor as float64, ``[n]`` or ``[n, k]``; tensors on the device are read there."""
        device, columns, at = self.device, dict[str, int | slice](), 0
        table: list[list[float | None]] = [[] for _ in groups]
        found: list[tuple[int, int, Tensor]] = []
        for name in options:
            for row, group in enumerate(groups):
                parts = group[name] if isinstance(group[name], (tuple, list)) else [group[name]]
                for part in parts:
                    if isinstance(part, Tensor) and part.device == device:
                        found.append((row, len(table[row]), part))
                    table[row].append(_number(part, device))
            width = len(table[0]) - at
            several = isinstance(groups[0][name], (tuple, list))
            columns[name] = slice(at, at + width) if several else at
            at += width
        values = self._send("options", np.array(table, np.float64))
        if found:
            values = values.clone()
            for row, column, part in found:
                values[row, column] = part.detach().reshape(())
        values = values[self._members]
        return {name: values[:, column] for name, column in columns.items()}

    def _keys(self, groups: Sequence[Mapping[str, Any]], step: Tensor, aside: Mapping[str, float]) -> Tensor:
        """The random keys of a step; zeros that nobody reads without stochastic rounding."""
        if not self.spec.stochastic:
            none = np.zeros((len(self.params), len(self.spec.codecs) + 1, 2), np.int32)
            return self._send("no keys", none).view(torch.uint32)
        seeds = np.array([group["seed"] % 2**64 for group in groups], np.uint64)[self._group_of]
        fixed = streams(~seeds if aside else seeds, self._indices, len(self.spec.codecs) + 1).view(np.int64)
        added = offsets(self._first).view(np.int32)
        return device_keys(
            self._send("aside" if aside else "streams", fixed), self._send("offsets", added), step
        )

    def _decision(self, verdict: Verdict | Deferred | None) -> Tensor | None:
        """``DECISION`` on the device; one that the host has made, for other plans' sake, is sent there."""
        if verdict is None:
            return None
        device = self.device
        if isinstance(verdict, Deferred):
            return verdict.decision.to(device, non_blocking=True)
        made = dict.fromkeys(DECISION, 0.0)
        made |= {"clip": verdict.clip, "unscale": verdict.unscale, "skipped": float(verdict.skip)}
        return torch.tensor(list(made.values()), dtype=torch.float64).to(device)


def check_capture(nonfinite: str | None, bindings: Sequence[Binding] | None) -> None:
    """Raise a ``RuntimeError`` for a step that is being captured and needs the host when it is replayed."""
    if nonfinite == "raise":
        raise RuntimeError(
            'step() is being captured into a CUDA graph, whose replays cannot raise: set nonfinite to "skip" or "zero"'
        )
    for binding in bindings or ():
        if binding.counted_by_host:
            raise RuntimeError(
                f"step() is being captured into a CUDA graph, and the plan {binding.spec} on "
                f"{binding.params[0].device} cannot be: set capturable=True in every group, and all parameters on GPUs"
            )


def _number(part: Any, device: torch.device) -> float | None:
    """An option that the host knows; what lies on the device takes its place there."""
    if isinstance(part, Tensor):
        return 0.0 if part.device == device else part.item()
    return part  # type: ignore[no-any-return]
