"""The optimizer that all of optwatch's optimizers are: a torch.optim.Optimizer whose step runs bound plans."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from optwatch.codecs import Codec, codec_for, weight_codec
from optwatch.kernels import PlanSpec, capture, check_backend
from optwatch.optim.binding import Binding, Stale
from optwatch.optim.capturable import NOT_BOUND, CapturableBinding, binding_class, check_capture
from optwatch.optim.checkpoint import load
from optwatch.optim.count import StateKind, count_bytes, state_leaves
from optwatch.optim.decisions import Decisions
from optwatch.optim.formats import by_parameter, check_formats, expected_bytes, format_at
from optwatch.optim.gate import Gate, check_gate, check_release
from optwatch.optim.interchange import export
from optwatch.optim.options import Ranges, check
from optwatch.optim.release import Release
from optwatch.optim.sharded import Shards, is_partial, local, local_state, placed_like
from optwatch.optim.slots import begin, decode, identify
from optwatch.optim.stats import PlanStats, StepStats, Subscriber
from optwatch.optim.weights import begin as begin_weight
from optwatch.optim.weights import exact_weight, format_of
from optwatch.rules import Rule

DTYPES = (torch.float32, torch.bfloat16)
SCHEMA = 1  # of the state dict; a checkpoint with another one is refused


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers: binds plans, counts bytes, delivers statistics.

    A subclass names its ``rule`` (or chooses one for each group in :meth:`rule_for`), the hyperparameters (``options``)
    that rules read, their ``ranges``, and has a constructor with torch.optim's signature that passes on what it
    does not know. State is created at the first step that a parameter has a gradient in.

    ``max_grad_norm`` and ``nonfinite`` may be changed between steps; see :mod:`optwatch.optim.gate`.
    """

    rule: ClassVar[Rule]
    options: ClassVar[tuple[str, ...]]
    #: What some of the options may be.
    ranges: ClassVar[Ranges] = ()

    #: torch.amp.GradScaler then leaves scale and ``found_inf`` to the step, which does without waiting for them.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, arguments: Mapping[str, Any]) -> None:
        """``arguments`` are all of a subclass's constructor by name: ``locals()`` as they are when it begins."""
        given = {
            name: value for name, value in arguments.items() if name not in {"self", "__class__", "params"}
        }
        self.max_grad_norm, self.nonfinite = given.pop("max_grad_norm"), given.pop("nonfinite")
        check_gate(self.max_grad_norm, self.nonfinite)
        self._backend = given.pop("backend")
        if self._backend is not None:
            check_backend(self._backend)
        self._decisions = Decisions()
        self._subscribers: dict[int, tuple[Subscriber, int]] = {}
        self._bindings: list[Binding] | None = None
        self._capturable: set[torch.device] = set()  # where steps can be captured
        self._captured: list[object] = []
        self._had_full = False  # whether a step has summed full statistics since plans were bound
        self._steps = 0
        self._release: Release | None = None
        #: Slots of parameters whose format was converted by loading a checkpoint, since construction.
        self.state_conversions = 0
        super().__init__(params, {**given, "schema": SCHEMA})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does; ``state=``, ``weights=`` and every option may differ between groups."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["state"] = by_parameter(group["state"], group.get("param_names"))
            check_formats(group, self.rule_for(group))
            weight_codec(group["weights"], torch.bfloat16)
            self.check_options(group)
            for position, param in enumerate(group["params"]):
                if param.dtype not in DTYPES:
                    raise ValueError(
                        f"{self.parameter_name(group, position)} has dtype {param.dtype}; supported are "
                        + ", ".join(map(str, DTYPES))
                    )
                if is_partial(param):
                    raise ValueError(
                        f"{self.parameter_name(group, position)} is a sum whose terms are on several ranks "
                        f"({', '.join(map(str, param.placements))}): redistribute it before"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        self._bindings = None

    def rule_for(self, group: Mapping[str, Any]) -> Rule:
        """The rule that the options of ``group`` ask for; one of ``RULES``, where slots depend on options."""
        return self.rule

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raise a ``ValueError`` for an option of ``group`` that is out of range or not supported."""
        check(type(self).__name__, group, self.ranges, self.defaults)

    def parameter_name(self, group: Mapping[str, Any], position: int) -> str:
        """How messages name a parameter."""
        if names := group.get("param_names"):
            return f"parameter {names[position]!r}"
        number = next(
            (i for i, known in enumerate(self.param_groups) if known is group), len(self.param_groups)
        )
        shape = tuple(group["params"][position].shape)
        return f"parameter {position} of group {number} (shape {shape})"

    # --- stepping -------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    @_disable_dynamo  # as torch.optim's own methods: a compiled training step calls it as it is
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` recomputes the loss, which is then returned.

        With ``nonfinite="raise"`` a ``RuntimeError`` names the parameters whose gradients were not finite at the
        step before, which was skipped.
        """
        captured = self.capturing
        if captured:
            check_capture(self.nonfinite, self._bindings)
        else:
            self._decisions.check(self._name_of)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # One kernel for all replays: with statistics for whoever asks, if it has been loaded by a step before.
        full = self._had_full and bool(self._subscribers) if captured else self._is_full()
        self._steps += not captured
        released = self._release
        if released is not None:
            check_release(self.max_grad_norm, self.nonfinite, self._scaler()[1])
        stats = self._run(full) if released is None else StepStats(self._steps, full, *released.take())
        for subscriber, _ in list(self._subscribers.values()):
            subscriber(stats)
        return loss

    def _is_full(self) -> bool:
        """Whether the next step sums the full statistics."""
        return any((self._steps + 1) % every == 1 % every for _, every in self._subscribers.values())

    @property
    def capturing(self) -> bool:
        """Whether a step would go into a CUDA graph now, and happen only when that is replayed."""
        return bool(self._capturable) and any(map(capture.capturing, self._capturable))

    def _run(self, full: bool, **aside: float) -> StepStats:
        """Run every plan; ``aside`` adds options and makes it no step, see :meth:`Binding.run`."""
        try:
            return self._run_bound(full, aside)
        except Stale:
            self._bindings = None
            return self._run_bound(full, aside)

    def _run_bound(self, full: bool, aside: Mapping[str, float]) -> StepStats:
        """Run every plan, after binding anew whatever changed."""
        if self._bindings is None or self._has_new_gradient() or not self._is_current(self._bindings):
            self._bind()
        assert self._bindings is not None
        # All gradients before the first plan runs: one that turns out stale must not let the others step twice.
        grads = [binding.gradients() for binding in self._bindings]
        gate = Gate(None if aside else self.max_grad_norm, self.nonfinite, *self._scaler())
        decision, verdicts = self._decisions.decide(
            gate, self._bindings, self._shards, grads, counts=not aside
        )
        ran = [
            binding.run(self.param_groups, self.options, given, full, aside, verdict)
            for binding, given, verdict in zip(self._bindings, grads, verdicts, strict=True)
        ]
        self._had_full = self._had_full or full
        layouts = tuple(binding.layout for binding in self._bindings)
        plans = tuple(plan for plan in ran if plan is not None)
        captured = None
        if self.capturing:
            captured = self._captured
            captured.append(self._bindings)  # with the tables that the graph reads
        return StepStats(self._steps, full, layouts, plans, decision, captured)

    def _scaler(self) -> tuple[Any, Any]:
        """What a torch.amp.GradScaler left for this step: the scale, and whether it found an infinity."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _name_of(self, index: int) -> str:
        """How messages name the parameter at ``index``, counted through all groups."""
        for group in self.param_groups:
            if index < len(group["params"]):
                return self.parameter_name(group, index)
            index -= len(group["params"])
        raise IndexError(index)

    def _is_current(self, bindings: list[Binding]) -> bool:
        """Whether the plans are bound to what ``self.state`` holds: the same dicts, and in them the same tensors.

        And whether the groups still ask for the rules and weight formats that the plans run: an option may have changed
        them.
        """
        if self._asked != self._asks():
            return False
        same = len(self.state) == len(self._bound) and all(
            map(operator.is_, self.state.values(), self._bound)
        )
        return same and all(binding.is_current() for binding in bindings)

    def _asks(self) -> list[tuple[Rule, str, object]]:
        """What the options of each group ask for."""
        return [(self.rule_for(g), g["weights"], g.get("capturable")) for g in self.param_groups]

    def release_gradients(self) -> Callable[[], None]:
        """Step each parameter in the backward pass, as its gradient arrives, and free the gradient at once.

        Bit by bit the steps are those of ``step()``, which then only counts and tells subscribers; call it once after
        each backward pass, as before. Not for gradient accumulation, clipping by norm or a loss scaler: they need
        all gradients together, see :mod:`optwatch.optim.release`. Returns a function that ends it.
        """
        if self._release is not None:
            raise RuntimeError(
                "release_gradients() is in force already; end it with the function that it returned"
            )
        check_release(self.max_grad_norm, self.nonfinite, self._scaler()[1])
        if any(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                "release_gradients() and capturable=True exclude each other: capture the backward pass and step() "
                "together, or set capturable=False"
            )
        self._release = Release(
            [param for group in self.param_groups for param in group["params"]],
            self._bind_alone,
            self._run_alone,
        )
        return self._end_release

    def _end_release(self) -> None:
        if self._release is not None:
            self._release.remove()
        self._release = self._bindings = None

    def _bind_alone(self, param: Tensor) -> Binding:
        """A plan for one parameter."""
        index = 0
        for number, group in enumerate(self.param_groups):
            for position, known in enumerate(group["params"]):
                if known is param:
                    spec = self._spec(group, position)
                    state = local_state(param, self.state[param])
                    return Binding(spec, [param], [state], [index], [number], self._backend)
                index += 1
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} has left the optimizer; end release_gradients()"
        )

    def _run_alone(self, binding: Binding) -> PlanStats | None:
        return binding.run(self.param_groups, self.options, binding.gradients(), self._is_full(), {})

    def _has_new_gradient(self) -> bool:
        return any(param.grad is not None for param in self._waiting)

    def _bind(self) -> None:
        """Create missing state and bind one plan for each combination of device, element types and codecs."""
        if any(map(capture.capturing, {p.device for group in self.param_groups for p in group["params"]})):
            raise RuntimeError(NOT_BOUND)
        self._decisions.settle(0)
        plans: dict[tuple[torch.device, PlanSpec, bool], list[tuple[Tensor, int, int]]] = defaultdict(list)
        self._waiting: list[Tensor] = []
        self._asked = self._asks()
        index = 0
        for number, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is None and not self.state.get(param):
                    self._waiting.append(param)
                else:
                    name = self.parameter_name(group, position)
                    if param.grad is not None and param.grad.layout != torch.strided:
                        raise RuntimeError(
                            f"{name} has a {param.grad.layout} gradient; only dense ones are supported"
                        )
                    spec = self._spec(group, position)
                    capturable = bool(group.get("capturable"))
                    plans[param.device, spec, capturable].append((param, index, number))
                index += 1
        self._bindings = [
            binding_class(capturable, spec, device, self._backend)(
                spec,
                [param for param, _, _ in members],
                [local_state(param, self.state[param]) for param, _, _ in members],
                [i for _, i, _ in members],
                [number for _, _, number in members],
                self._backend,
            )
            for (device, spec, capturable), members in plans.items()
        ]
        self._had_full = False
        self._capturable = {b.device for b in self._bindings if isinstance(b, CapturableBinding)}
        self._bound = list(self.state.values())
        self._shards = Shards(
            [param for group in self.param_groups for param in group["params"]],
            [binding.layout.indices for binding in self._bindings],
        )

    def _spec(self, group: Mapping[str, Any], position: int) -> PlanSpec:
        """The plan that a parameter needs; creates its state if it has none, else goes by the tensors it finds."""
        param, name = group["params"][position], self.parameter_name(group, position)
        state = local_state(param, self.state[param])
        if not state:
            state["step"] = torch.tensor(0.0)
            for slot in self.rule_for(group).slots:
                codec = codec_for(format_at(group, position), slot.name, slot.kind, param.numel())
                initial = float(group[slot.initial]) if slot.initial else 0.0
                state.update(begin(codec, slot.name, local(param), initial))
            state.update(begin_weight(weight_codec(group["weights"], param.dtype), local(param)))
        rule = self.rule_for(group)
        codecs = self._codecs(rule, param, name)
        try:
            weights = format_of(group["weights"], state, local(param))
        except ValueError as error:
            raise ValueError(f"the state of {name} does not fit: {error}") from None
        grad_dtype = param.dtype if param.grad is None else param.grad.dtype
        return PlanSpec(rule, codecs, param.dtype, grad_dtype, weights)

    def _codecs(self, rule: Rule, param: Tensor, name: str) -> tuple[Codec, ...]:
        """The codecs of the state that ``param`` has."""
        state = local_state(param, self.state[param])
        try:
            if "step" not in state:
                raise ValueError("'step' is missing")
            return tuple(identify(rule, slot, state, local(param)) for slot in rule.slots)
        except ValueError as error:
            raise ValueError(f"the state of {name} does not fit: {error}") from None

    # --- watching -------------------------------------------------------------------------------------------------

    def subscribe(self, callback: Subscriber, every: int = 1) -> Callable[[], None]:
        """Call ``callback`` with the :class:`StepStats` of each step; returns a function that ends it.

        Full statistics are summed in the first step and then in one of ``every`` steps; all others sum the cheap
        fields. The callback runs inside ``step()`` and must not raise.
        """
        if every < 1:
            raise ValueError(f"every={every!r}: expected a number of steps, at least 1")
        entry, subscribers = (callback, every), self._subscribers
        subscribers[id(entry)] = entry

        def unsubscribe() -> None:  # holds no reference to the optimizer
            subscribers.pop(id(entry), None)

        return unsubscribe

    def dequantized_state(self, param: Tensor) -> dict[str, Tensor]:
        """The slots of ``param`` as new fp32 tensors of its shape, by name; empty before its first step."""
        if param not in self.state or not self.state[param]:
            return {}
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        rule = self.rule_for(group)
        codecs = self._codecs(rule, param, f"a parameter of shape {tuple(param.shape)}")
        state = local_state(param, self.state[param])
        return {
            slot.name: placed_like(param, decode(codec, slot.name, local(param), state))
            for slot, codec in zip(rule.slots, codecs, strict=True)
        }

    def master_state_dict(self) -> dict[str, Tensor]:
        """The weights as new fp32 tensors, with what a split format keeps beside bf16 parameters.

        By the names of ``model.named_parameters()``, if those were given to the constructor, and else by the number of
        the parameter, counted through all groups.
        """
        found: dict[str, Tensor] = {}
        for group in self.param_groups:
            names = group.get("param_names") or map(str, range(len(found), len(found) + len(group["params"])))
            for name, param in zip(names, group["params"], strict=True):
                state = local_state(param, self.state.get(param, {}))
                found[name] = placed_like(param, exact_weight(group["weights"], state, local(param)))
        return found

    def slot_names(self) -> tuple[str, ...]:
        """The slots of all groups' rules, each once, in the rules' order."""
        slots = (slot.name for group in self.param_groups for slot in self.rule_for(group).slots)
        return tuple(dict.fromkeys(slots))

    def state_bytes(self) -> dict[StateKind, int]:
        """The bytes of all state tensors as they are, each storage counted once, by slot, dtype and device."""
        return count_bytes(state_leaves(self.state), self.slot_names())

    def expected_state_bytes(self) -> dict[StateKind, int]:
        """The bytes that ``state=`` and ``weights=`` ask for, of the parameters stepped so far, by the same keys."""
        return expected_bytes(self.param_groups, self.state, self.rule_for)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; waits until it is known which steps were taken, where a device decides that."""
        self._decisions.settle(0)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], *, convert: bool = False) -> None:
        """Load what :meth:`state_dict` gave; low-bit state stays as it is and training continues bit by bit.

        State in another format than ``state=`` or ``weights=`` asks for (also that of the torch.optim class) is refused
        with a ``ValueError`` that names both, or converted with ``convert=True``. So is a checkpoint of bitsandbytes,
        torchao or FlashOptim. :attr:`state_conversions` counts. An error leaves the optimizer as it was.
        """
        load(self, state_dict, convert)

    def export_state_dict(self, to: str = "torch") -> dict[str, Any]:
        """The state as another library keeps it: a checkpoint for its optimizer of the same kind.

        ``"torch"``: fp32 tensors under torch.optim's names. ``"bitsandbytes"``: the layout of its 8-bit optimizers.
        Raises a ``ValueError`` for a rule or an option that the other library does not have.
        """
        return export(self, to)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: not the subscribers, and no pointers."""
        self._decisions.settle(0)
        return {
            **super().__getstate__(),
            "_backend": self._backend,
            "_steps": self._steps,
            "max_grad_norm": self.max_grad_norm,
            "nonfinite": self.nonfinite,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over ``state`` and bind at the next step."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("weights", "native")  # an option that came later than some pickles
        self._bindings = None
        self.__dict__.setdefault("_subscribers", {})
        self.__dict__.setdefault("_decisions", Decisions())
        self.__dict__.setdefault("_captured", [])
        self.__dict__.setdefault("_capturable", set())
        for name in ("_release", "max_grad_norm", "nonfinite"):
            self.__dict__.setdefault(name, None)
        self.__dict__.setdefault("state_conversions", 0)
