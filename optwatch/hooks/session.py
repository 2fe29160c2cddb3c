"""A watched training loop, from its first step to its last."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from optwatch.board import BoardError, board_directory
from optwatch.board.writer import Values
from optwatch.hooks.allocator import Allocator
from optwatch.hooks.context import Context
from optwatch.hooks.distributed import model_replicas, tensor_replicas
from optwatch.hooks.groups import Grouping, by_depth, parameter_names
from optwatch.hooks.launch import ensure_agent, find_agent
from optwatch.hooks.occurrences import Occurrences
from optwatch.hooks.parts import NO_SAMPLING, Sampling
from optwatch.hooks.probe import Probe
from optwatch.hooks.publisher import Publisher

#: Seconds between two looks whether the agent still runs.
AGENT_CHECK = 5.0
#: At most, where starts fail: each takes a core for a while.
AGENT_CHECK_MOST = 300.0


class Watch:
    """A watched training loop; a context manager. Made by :func:`watch`."""

    def __init__(
        self, model: torch.nn.Module | None, facts: Mapping[str, object], every: int, replicas: int | None,
        directory: str | os.PathLike[str] | None, say: Callable[[str], None], groups: Grouping,
        sampling: Sampling = NO_SAMPLING,
    ) -> None:  # fmt: skip
        self.run_id, self.rank = str(facts["run_id"]), int(str(facts["rank"]))
        self.pid, self._every, self._replicas = os.getpid(), every, replicas
        self.automatic = False
        self._groups, self._sampling = groups, sampling
        self._model = weakref.ref(model) if model is not None else lambda: None
        self._closed = threading.Event()
        self._say, self._said = say, set[str]()
        self._publisher: Publisher | None = None
        self._directory: Path | None = None
        self._spent = 0.0  # seconds that went into log() and into probes that are gone
        self._context = Context(self._changed)
        self._allocator = Allocator(())
        self._probes: list[Probe] = []
        self._occurrences: dict[str, Occurrences] = {}  # by name of the probe
        try:
            self._directory = board_directory() if directory is None else Path(directory)
            self._publisher = Publisher(str(self._directory), facts)
            for source in (self._context, self._allocator):
                self._publisher.add(source)
        except (BoardError, OSError) as error:
            self._give_up(f"this run is not watched: {error}")
        atexit.register(self._at_exit)

    def start(self, agent: bool) -> None:
        """Make the board, and with ``agent`` keep an agent running."""
        if self._publisher is None:
            return
        try:
            self._publisher.open()
        except (BoardError, OSError) as error:
            self._give_up(f"this run is not watched: {error}")
        if agent and self._publisher is not None:
            threading.Thread(target=self._keep_agent, name="optwatch-agent", daemon=True).start()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed.is_set()

    def watches(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer is watched."""
        return any(probe.optimizer is optimizer for probe in self._probes)

    @property
    def active(self) -> bool:
        """Whether this process publishes: not closed, not given up, no forked child."""
        return self._publisher is not None and not self._closed.is_set() and self.pid == os.getpid()

    def add(self, *optimizers: torch.optim.Optimizer) -> None:
        """Watch more optimizers, from their next step on. One that is gone makes room for its name.

        Raises TypeError for anything but a torch.optim.Optimizer.
        """
        found = [unwrapped(optimizer) for optimizer in optimizers]
        if not self.active:
            return
        with self._alone():
            self._add(found)

    def _add(self, found: Sequence[torch.optim.Optimizer]) -> None:
        self._forget_the_dead()
        try:
            self._allocator.add(p for o in found for group in o.param_groups for p in group["params"])
        except Exception as error:  # without its figures the rest can still be watched
            self._warn(f"the allocator of the GPU is not watched: {error}")
        try:
            for optimizer, name in zip(found, self._names(found), strict=True):
                self._attach(optimizer, name)
        except Exception as error:  # watching must not keep a run from starting
            self._give_up(f"this run is not watched: {type(error).__name__}: {error}")

    def _names(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
        """A name for each optimizer: its class, numbered where one comes again."""
        names = [type(optimizer).__name__ for optimizer in optimizers]
        taken = {probe.name for probe in self._probes}
        given = []
        for name in names:
            alone = names.count(name) == 1
            numbered = (f"{name} {i}" for i in itertools.count(2 if alone else 1))
            given.append(
                next(n for n in itertools.chain([name] if alone else [], numbered) if n not in taken)
            )
            taken.add(given[-1])
        return given

    def _attach(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        assert self._publisher is not None
        probe = Probe(
            optimizer, name, self._naming, self._every, self._replicas_of, self._publish, self._changed, self._guarded,
            self._sampling, self._warn,
        )  # fmt: skip
        self._probes.append(probe)
        for source in probe.sources:
            self._publisher.add(source)
        self._occurrences[name] = Occurrences(optimizer, probe, self._happened, self._guarded)

    def _naming(self, optimizer: torch.optim.Optimizer) -> tuple[Sequence[str], Sequence[str]]:
        model = self._model()
        named = model.named_parameters() if model is not None else ()
        names = parameter_names(optimizer.param_groups, named)
        try:
            return names, self._groups(names)
        except Exception as error:  # the user's function: its groups are lost, the run is watched
            self._warn(f"groups of tensors are by depth, since the function for them failed: {error!r}")
            return names, by_depth(names)

    def _replicas_of(self, tensor: torch.Tensor) -> int:
        if self._replicas is not None:
            return self._replicas
        return tensor_replicas(tensor, model_replicas(self._model()))

    @property
    def metrics_url(self) -> str | None:
        """The address that Prometheus can scrape; waits at most 2 s for the agent, then None."""
        deadline = time.monotonic() + 2
        while self._directory is not None and self._publisher is not None:
            try:
                url = find_agent(self._directory)
            except OSError:
                url = None
            if url is not None:
                return url
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return None

    def log(self, **scalars: float | torch.Tensor) -> None:
        """Publish scalars of the training loop with the next step: ``loss``, or any other name, up to 32 of them.

        A tensor on a GPU is copied asynchronously and published when it has arrived: nothing ever waits.
        """
        for name, value in scalars.items():
            self._take("log", name, self._context.log, name, value)

    def count(self, **amounts: float | torch.Tensor) -> None:
        """Add to what was trained on: ``tokens``, ``samples``; their rates are what is shown.

        Each rank counts its own; the sum over ranks is the run's.
        """
        for name, value in amounts.items():
            self._take("count", name, self._context.count, name, value)

    def event(self, name: str) -> None:
        """Publish that something happened, now: ``evaluation``, or any other word, up to 16 of them.

        Noticed without being told: ``checkpoint``, ``resume``, ``format_conversion``, ``learning_rate_change``,
        ``skipped_step`` and ``oom``, see :mod:`optwatch.hooks.occurrences`.
        """
        self._take("event", name, self._happened, name)

    def _take(self, method: str, name: str, function: Callable[..., None], *arguments: object) -> None:
        if not self.active:
            return
        begun = time.perf_counter()
        with self._alone():
            try:
                function(*arguments)
            except Exception as error:  # whatever it is, it is not the training loop's concern
                self._warn(f"watch.{method}({name!r}) was ignored: {error}")
            self._spent += time.perf_counter() - begun

    def close(self, state: str = "finished") -> None:
        """End watching; the last values stay visible for the agent's grace period. Safe to call twice."""
        if self._closed.is_set() or self.pid != os.getpid():
            return
        self._closed.set()
        atexit.unregister(self._at_exit)
        self._let_go()
        if self._publisher is None:
            return
        try:
            self._context.drain()
            for probe in self._probes:
                probe.drain()
            self._read_memory()
            self._publisher.refresh()
            self._publisher.close(state)
        except Exception as error:  # closing must not turn a finished run into a failed one
            self._warn(f"closing the board failed: {error}")

    def __enter__(self) -> Watch:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, as failed if an exception passes through."""
        self._end(error)

    # --- inside the training loop ----------------------------------------------------------------------------------

    def _guarded(self, function: Callable[..., None]) -> Callable[..., None]:
        """``function``, with whatever it raises turned into one warning and the end of watching."""
        quiet = uncompiled(function)

        def call(*args: object) -> None:
            if self._publisher is None or self.pid != os.getpid():
                return
            try:
                quiet(*args)
            except Exception as error:  # law: watching never raises into step()
                self._give_up(f"watching ended: {type(error).__name__}: {error}")

        call._torchdynamo_disable = True  # type: ignore[attr-defined]  # noqa: SLF001 - a compiled step just calls it
        return call

    def _alone(self) -> contextlib.AbstractContextManager[object]:
        """While what all threads publish is changed: a moment at most."""
        return contextlib.nullcontext() if self._publisher is None else self._publisher.guard

    def _publish(self, probe: Probe, rows: Mapping[int, Values], step: int) -> None:
        with self._alone():
            if self._publisher is None:
                return
            self._forget_the_dead()
            self._context.overhead = self._spent
            for one in self._probes:
                self._context.overhead += one.overhead
            if probe is self._probes[0]:
                self._context.stepped()
                if step % self._every == 1 % self._every:
                    self._read_memory()
            self._publisher.publish(step, rows)

    def _happened(self, event: str) -> None:
        """Note an event, and publish it at once: there may be no further step."""
        with self._alone():
            self._context.event(event)
            if self._publisher is not None:
                self._publisher.refresh()

    def _read_memory(self) -> None:
        self._context.read_peak()
        for _ in range(self._allocator.read()):
            self._context.event("oom")

    def _changed(self) -> None:
        if self._publisher is not None:
            self._publisher.changed()

    def _forget_the_dead(self) -> None:
        dead = [one for one in self._probes if not one.alive]
        if self._publisher is None or not dead:
            return
        for probe in dead:
            self._spent += probe.overhead
            self._probes.remove(probe)
            for source in probe.sources:
                self._publisher.remove(source)
            self._occurrences.pop(probe.name).close()

    def _let_go(self) -> None:
        for probe in self._probes:
            probe.close()
        for occurrences in self._occurrences.values():
            occurrences.close()

    def _give_up(self, message: str) -> None:
        # Hooks stay until close(), and do nothing: torch is going through them, and would raise for a missing one.
        for probe in self._probes:
            probe.unsubscribe()
        self._publisher = None
        self._warn(message)

    def _warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._say(message)

    # --- beside the training loop ----------------------------------------------------------------------------------

    def _keep_agent(self) -> None:
        """Start the agent if none runs, now and whenever it has gone; ever less often where none comes up."""
        pause = AGENT_CHECK
        while self._publisher is not None and self._directory is not None:
            found = None
            try:
                found = ensure_agent(self._directory)
            except Exception as error:  # a run without an agent is still a run
                self._warn(f"no agent could be started: {error}")
            pause = AGENT_CHECK if found else min(2 * pause, AGENT_CHECK_MOST)
            if self._closed.wait(pause):
                return

    def _at_exit(self) -> None:
        self._end(getattr(sys, "last_exc", None) or getattr(sys, "last_value", None))

    def _end(self, raised: BaseException | None) -> None:
        """Close, as failed if an exception ends the run."""
        if isinstance(raised, (torch.OutOfMemoryError, MemoryError)):
            self.event("oom")
        self.close("finished" if raised is None or isinstance(raised, SystemExit) else "failed")


def uncompiled(function: Callable[..., None]) -> Callable[..., None]:
    """``function`` and what it calls, not compiled where a compiled step calls it; no compiler is imported for it."""
    disabled: Callable[..., None] | None = None

    def call(*args: object) -> None:
        nonlocal disabled
        if disabled is None and "torch._dynamo" in sys.modules:
            disabled = torch.compiler.disable(function)
        (disabled or function)(*args)

    return call


def unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer itself, out of a framework's wrapper (Accelerate's, Lightning's). Raises TypeError."""
    found = optimizer
    while isinstance(inner := getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = inner
    if not isinstance(found, torch.optim.Optimizer):
        raise TypeError(f"watch() takes a torch.optim.Optimizer or several, got {type(optimizer).__name__}")
    return found
