"""A plan bound to the parameters and state tensors of an optimizer, and what has to be refreshed for each step."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optwatch.kernels import PlanSpec, PlanTensor, choose_backend
from optwatch.kernels.plan import Combine, DeferringPlan, Keys, Scalars
from optwatch.metrics.fields import TENSOR_FIELDS
from optwatch.optim.gate import Deferred, Verdict
from optwatch.optim.inputs import Counts, Inputs
from optwatch.optim.layout import flat, flat_copy, memory_order
from optwatch.optim.sharded import Shards, local, local_gradient, origin
from optwatch.optim.slots import buffer_key, flat_buffers, lay_out, shaped_like_parameter
from optwatch.optim.stats import PlanStats, StatsLayout
from optwatch.optim.weights import KEY, correction_of, flat_correction

State = MutableMapping[str, Any]

_GRAD_SQ, _NONFINITE, _MOMENT_GRAD = map(TENSOR_FIELDS.index, ("grad_sq", "nonfinite", "moment_grad"))

#: Of so many parts of the state tensors one is looked at in each step, whether its memory is still the same.
SAMPLES = 8

# A step asks these of every tensor; mapped in C they take a tenth of a microsecond each.
_GRAD, _DTYPE = operator.attrgetter("grad"), operator.attrgetter("dtype")
_ADDRESS, _CONTIGUOUS = torch.Tensor.data_ptr, torch.Tensor.is_contiguous


class Stale(Exception):  # noqa: N818 - not an error: it asks for a new binding
    """What the plan was bound to is no longer what the optimizer holds."""


class Binding:
    """One plan over the tensors of one device, element types and codecs, whatever parameter groups they are in."""

    #: Whether a step that its device skips has been counted before the host hears of it.
    counted_by_host = True

    def __init__(
        self,
        spec: PlanSpec,
        params: Sequence[Tensor],
        states: Sequence[State],
        indices: Sequence[int],  # of each parameter, counted through all groups: part of its random key
        group_of: Sequence[int],  # the position of each parameter's group
        backend: str | None,
    ) -> None:
        self.spec = spec
        self._given = list(params)
        #: What is stepped: this rank's pieces of parameters that are sharded.
        self.params = params = [local(param) for param in params]
        self._sharded = any(map(operator.is_not, params, self._given))
        # Pieces of a tensor draw other random numbers, by where they lie in it or by the number of the shard.
        origins = [origin(param) for param in self._given]
        shards = np.array([piece.shard for piece in origins], np.uint64) << np.uint64(40)
        self._indices = np.array(indices, np.uint64) + shards
        self._first = np.array([piece.element for piece in origins], np.uint64)
        self._group_of = np.array(group_of, np.intp)
        self._orders = [memory_order(p) for p in params]
        self._plain = all(p.is_contiguous() for p in params)
        # Parameters with gaps between their elements are stepped in a gapless copy.
        self._copies = {
            i: flat_copy(p.detach(), None).clone() for i, p in enumerate(params) if self._orders[i] is None
        }
        self._share_steps(states)
        device = params[0].device
        chosen = choose_backend(spec, device, backend)
        tensors = [self._tensor(i, state) for i, state in enumerate(states)]
        self._plan = chosen.bind(spec, tensors, self._combine() if spec.rule.norms else None)
        self.layout = StatsLayout(
            indices=tuple(indices),
            numel=tuple(p.numel() for p in params),
            slots=tuple(slot.name for slot in spec.rule.slots),
            second_moments=tuple(slot.kind.name == "SECOND_MOMENT" for slot in spec.rule.slots),
            codecs=tuple(codec.name for codec in spec.codecs),
            backend=chosen.name,
        )
        self._remember(states)

    def _combine(self) -> Combine | None:
        """How a rule that takes norms of whole tensors comes to those of tensors that are cut; None if none is."""
        shards = Shards(self._given, [range(len(self._given))])
        return (lambda sums: shards.add([sums])[0]) if shards else None

    def _share_steps(self, states: Sequence[State]) -> None:
        """Make every ``state["step"]`` a view of one vector, so that counting costs one operation."""
        self._counts = Counts(states)
        self._inputs = Inputs(self.spec, self._counts, self._group_of, self._indices, self._first)

    def _tensor(self, i: int, state: State) -> PlanTensor:
        """Tensor ``i`` with its state, flat. State in another memory order than its parameter is laid out anew."""
        param, order = self.params[i], self._orders[i]
        slots = []
        for slot, codec in zip(self.spec.rule.slots, self.spec.codecs, strict=True):
            if shaped_like_parameter(codec.buffers[0]) and flat(state[slot.name], order) is None:
                state.update(lay_out(codec, slot.name, param, state))
            slots.append(flat_buffers(codec, slot.name, state, order))
        weight = self._copies[i] if i in self._copies else flat(param.detach(), order)
        assert weight is not None
        return PlanTensor(weight, tuple(slots), flat_correction(self.spec.weight, param, state))

    def _remember(self, states: Sequence[State]) -> None:
        """Note everything that the plan holds a pointer to."""
        names = [
            buffer_key(codec, slot.name, buffer)
            for slot, codec in zip(self.spec.rule.slots, self.spec.codecs, strict=True)
            for buffer in codec.buffers
        ] + [KEY] * (correction_of(self.spec.weight) is not None)
        pairs = [(state, key) for state in states for key in ("step", *names)]
        self._states = [state for state, _ in pairs]
        self._state_keys = [key for _, key in pairs]
        self._state_tensors = [state[key] for state, key in pairs]
        self._pointers = [tensor.data_ptr() for tensor in self.params]
        samples = [self._state_tensors[i::SAMPLES] for i in range(min(SAMPLES, len(pairs)))]
        self._samples = itertools.cycle([(tensors, [t.data_ptr() for t in tensors]) for tensors in samples])

    def is_current(self) -> bool:
        """Whether the optimizer still holds the very tensors, at the same addresses, that the plan was bound to.

        People put tensors into ``optimizer.state``, move modules, and swap ``param.data``: a step would go on with
        memory that nobody sees any more, and a resumed fp32 state would be ignored. This runs in every step and is
        most of its time on the host. So of the state tensors, whose ``data`` is swapped all at once if ever, a part
        is looked at each time.
        """
        try:
            found = map(operator.getitem, self._states, self._state_keys)
            if not all(map(operator.is_, found, self._state_tensors)):
                return False
        except KeyError:
            return False
        sample, pointers = next(self._samples)
        params = list(map(local, self._given)) if self._sharded else self.params
        return list(map(_ADDRESS, params)) == self._pointers and list(map(_ADDRESS, sample)) == pointers

    def run(
        self,
        groups: Sequence[Mapping[str, Any]],
        options: Sequence[str],
        grads: Sequence[Tensor | None],
        full: bool,
        aside: Mapping[str, float],
        verdict: Verdict | Deferred | None = None,
    ) -> PlanStats | None:
        """Step every parameter that has a gradient; None if none has. ``options`` are the rule's hyperparameters.

        ``grads`` are those that :meth:`gradients` gave.

        Options given ``aside`` are added, and then this is no step: none is counted, and random numbers are others.
        With a ``verdict`` it is followed; a step that is skipped counts as none and leaves everything as it was.
        """
        absent = list(map(operator.is_, grads, itertools.repeat(None)))
        missing = any(absent)
        if missing and all(absent):
            return None
        if isinstance(verdict, Verdict) and verdict.skip:
            rows = verdict.sums.new_zeros(len(grads), self.spec.columns)
            return PlanStats(self.layout, with_gradients(rows, verdict))
        if not aside:
            self._counts.add(absent if missing else None)
        self._copy_in()
        if isinstance(verdict, Deferred):
            prepare = functools.partial(self._inputs.make, groups, options, aside)
            rows = self._run_decided(prepare, grads, full, verdict, not aside)
        else:
            try:
                scalars, numbers = self._inputs.make(groups, options, aside)
            except ValueError:
                if not aside:
                    self._counts.take_back(np.logical_not(absent))
                raise
            if verdict is not None:
                scalars[:, 0] *= verdict.factor
            rows = self._plan.run(grads, scalars, numbers, full, verdict is not None and verdict.zero)
        self._copy_out()
        return PlanStats(self.layout, rows if verdict is None else with_gradients(rows, verdict))

    def _copy_in(self) -> None:
        """Take parameters with gaps into their copies."""
        for i, copy in self._copies.items():
            copy.view(self.params[i].shape).copy_(self.params[i])

    def _copy_out(self) -> None:
        """And back again."""
        for i, copy in self._copies.items():
            self.params[i].copy_(copy.view(self.params[i].shape))

    def _run_decided(
        self, prepare: Callable[[int], tuple[Scalars, Keys]], grads: Sequence[Tensor | None], full: bool,
        verdict: Deferred, counts: bool,
    ) -> Tensor:  # fmt: skip
        """The step as the device decides it: with what it needs whichever of the steps under way were skipped."""
        plan = self._plan
        assert isinstance(plan, DeferringPlan)
        scalars, numbers = zip(*map(prepare, range(verdict.under_way + 1)), strict=True)
        decision = verdict.decision.to(self.params[0].device, non_blocking=True)
        return plan.run_decided(
            grads, np.stack(scalars), np.stack(numbers), full, verdict.zero, decision, counts
        )

    @property
    def defers(self) -> bool:
        """Whether the plan can be left alone with a decision that the host does not know."""
        return isinstance(self._plan, DeferringPlan)

    def uncount(self, stepped: NDArray[np.bool_]) -> None:
        """Take back the count of a step, of the tensors that had a gradient: the device has skipped it."""
        assert isinstance(self._plan, DeferringPlan)
        self._counts.take_back(stepped)
        self._plan.uncount(stepped)

    def sum_gradients(self, grads: Sequence[Tensor | None]) -> Tensor:
        """``GRADIENT_SUMS`` of each parameter, of what :meth:`gradients` gave."""
        return self._plan.sum_gradients(grads)

    def gradients(self) -> list[Tensor | None]:
        """The gradients as the plan wants them; raises :class:`Stale` if it was bound for others."""
        grads: list[Tensor | None] = list(map(_GRAD, self._given))
        if self._sharded:
            grads = [
                grad if grad is None else local_gradient(grad, param)
                for grad, param in zip(grads, self._given, strict=True)
            ]
        try:  # all of them, which is the rule
            contiguous = all(map(_CONTIGUOUS, grads))  # type: ignore[arg-type] # None is what the exception is for
            given: Sequence[Tensor] = grads  # type: ignore[assignment] # none is None
        except TypeError:
            given = [grad for grad in grads if grad is not None]
            contiguous = all(map(_CONTIGUOUS, given))
        if not {self.spec.grad_dtype}.issuperset(map(_DTYPE, given)):
            raise Stale
        if not (self._plain and contiguous):
            grads = [
                grad if grad is None else flat_copy(grad, order).contiguous()
                for grad, order in zip(grads, self._orders, strict=True)
            ]
        return grads


def with_gradients(rows: Tensor, verdict: Verdict | Deferred) -> Tensor:
    """``rows`` with the statistics of the gradients as they were before anything was done to them, but unscaled."""
    unscale = verdict.unscale
    if isinstance(unscale, Tensor):
        unscale = unscale.to(rows.device, non_blocking=True)
    rows[:, _GRAD_SQ] = verdict.sums[:, 0] * unscale**2
    rows[:, _NONFINITE] = verdict.sums[:, 1]
    rows[:, _MOMENT_GRAD] *= unscale
    return rows
