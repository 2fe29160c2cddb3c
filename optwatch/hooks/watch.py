"""``watch()``: put the monitor around a training loop."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from optwatch.board import BoardError, Histogram, Series, Table, board_directory
from optwatch.board.writer import Values
from optwatch.hooks.allocator import Allocator
from optwatch.hooks.groups import by_depth, parameter_names
from optwatch.hooks.launch import ensure_agent, find_agent
from optwatch.hooks.probe import Probe
from optwatch.hooks.publisher import Publisher, histogram
from optwatch.hooks.run import run_facts

#: One of so many steps sums the full statistics. Such a step takes about half as long again on a CPU, so one in
#: fifty costs about one per cent on average.
DEFAULT_EVERY = 50

#: Seconds between two looks whether the agent still runs.
AGENT_CHECK = 5.0


def watch(
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    model: torch.nn.Module | None = None,
    *,
    run_id: str | None = None,
    every: int = DEFAULT_EVERY,
    replicas: int = 1,
    directory: str | os.PathLike[str] | None = None,
    agent: bool = True,
) -> Watch:
    """Publish what the optimizer does, step by step, until :meth:`Watch.close` or the end of the process.

    Args:
        optimizer: one or several; of optwatch's own the statistics, of any other its bytes and durations.
        model: gives the tensors their names, and through them their groups (by depth).
        run_id: names the run on every series; the same on all ranks. By default the launcher's, else made up.
        every: one of so many steps sums the full statistics; all sum norms of gradient and update.
        replicas: the number of ranks that hold the same tensors, by which sums over ranks are to be divided.
        directory: where the board lies; by default in shared memory, private to the user.
        agent: whether to start the node's agent if none runs.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``run_id``, ``every`` or ``replicas`` is not valid.

    Nothing raises after this has returned: what goes wrong in watching ends in one warning, and training goes on.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"watch() takes a torch.optim.Optimizer or several, got {type(one).__name__}")
    for name, value in (("every", every), ("replicas", replicas)):
        if value < 1 or value != int(value):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    facts = {**run_facts(run_id), "replicas": replicas}
    return Watch(optimizers, model, facts, every, replicas, directory, agent)


class Watch:
    """A watched training loop; a context manager. Made by :func:`watch`."""

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], model: torch.nn.Module | None, facts: Mapping[str, object],
        every: int, replicas: int, directory: str | os.PathLike[str] | None, agent: bool,
    ) -> None:  # fmt: skip
        self.run_id, self.rank = str(facts["run_id"]), int(str(facts["rank"]))
        self._pid, self._every = os.getpid(), every
        self._closed = threading.Event()
        self._warned: set[str] = set()
        self._publisher: Publisher | None = None
        self._directory: Path | None = None
        self._loop = _Loop()
        self._probes: list[Probe] = []
        try:
            self._directory = board_directory() if directory is None else Path(directory)
            self._publisher = Publisher(str(self._directory), facts)
            self._publisher.add(self._loop)
            self._watch_allocator(optimizers)
            self._attach(optimizers, model, every, replicas)
            self._publisher.open()
        except (BoardError, OSError) as error:
            self._give_up(f"this run is not watched: {error}")
        if agent and self._publisher is not None:
            threading.Thread(target=self._keep_agent, name="optwatch-agent", daemon=True).start()
        atexit.register(self._at_exit)

    def _watch_allocator(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        assert self._publisher is not None
        try:
            self._allocator = Allocator(
                p for o in optimizers for group in o.param_groups for p in group["params"]
            )
        except Exception as error:  # without its figures the rest can still be watched
            self._allocator = Allocator(())
            self._warn(f"the allocator of the GPU is not watched: {error}")
        self._publisher.add(self._allocator)

    def _attach(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        model: torch.nn.Module | None,
        every: int,
        replicas: int,
    ) -> None:
        assert self._publisher is not None
        known = weakref.ref(model) if model is not None else lambda: None

        def naming(optimizer: torch.optim.Optimizer) -> tuple[Sequence[str], Sequence[str]]:
            model = known()
            named = model.named_parameters() if model is not None else ()
            names = parameter_names(optimizer.param_groups, named)
            return names, by_depth(names)

        labels = _unique([type(optimizer).__name__ for optimizer in optimizers])
        for optimizer, label in zip(optimizers, labels, strict=True):
            probe = Probe(
                optimizer,
                label,
                naming,
                every,
                replicas,
                self._publish,
                self._publisher.changed,
                self._guarded,
            )
            self._probes.append(probe)
            self._publisher.add(probe)

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
        """Publish scalars of the training loop with the next step: ``loss``. Reading them never waits for a device."""
        for name, value in scalars.items():
            if name != "loss":
                self._warn(f"watch.log() knows 'loss', not {name!r}: ignored")
                continue
            try:
                self._loop.log(value)
            except Exception as error:  # whatever it is, it is not the training loop's concern
                self._warn(f"watch.log({name}=...) was ignored: {error}")

    def close(self, state: str = "finished") -> None:
        """End watching; the last values stay visible for the agent's grace period. Safe to call twice."""
        if self._closed.is_set() or self._pid != os.getpid():
            return
        self._closed.set()
        atexit.unregister(self._at_exit)
        for probe in self._probes:
            probe.close()
        if self._publisher is None:
            return
        try:
            for probe in self._probes:
                probe.drain()
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
        self.close("finished" if kind is None or issubclass(kind, SystemExit) else "failed")

    # --- inside the training loop ----------------------------------------------------------------------------------

    def _guarded(self, function: Callable[..., None]) -> Callable[..., None]:
        """``function``, with whatever it raises turned into one warning and the end of watching."""

        def call(*args: object) -> None:
            if self._publisher is None or self._pid != os.getpid():
                return
            try:
                function(*args)
            except Exception as error:  # law: watching never raises into step()
                self._give_up(f"watching ended: {type(error).__name__}: {error}")

        return call

    def _publish(self, probe: Probe, rows: Values | None, step: int) -> None:
        assert self._publisher is not None
        self._loop.overhead = sum(one.overhead for one in self._probes)
        if probe is self._probes[0]:
            self._loop.stepped()
            if step % self._every == 1 % self._every:
                self._allocator.read()
        self._publisher.publish(step, {id(probe): rows} if rows is not None else {})

    def _give_up(self, message: str) -> None:
        for probe in self._probes:
            probe.close()
        self._publisher = None
        self._warn(message)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            # A filter may turn warnings into errors: then this one goes to stderr.
            try:
                warnings.warn(f"optwatch: {message}", RuntimeWarning, stacklevel=3)
            except RuntimeWarning:
                sys.stderr.write(f"optwatch: {message}\n")

    # --- beside the training loop ----------------------------------------------------------------------------------

    def _keep_agent(self) -> None:
        """Start the agent if none runs, now and whenever it has gone."""
        while self._publisher is not None and self._directory is not None:
            try:
                ensure_agent(self._directory)
            except Exception as error:  # a run without an agent is still a run
                self._warn(f"no agent could be started: {error}")
            if self._closed.wait(AGENT_CHECK):
                return

    def _at_exit(self) -> None:
        raised = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        self.close("finished" if raised is None else "failed")


class _Loop:
    """The source of what belongs to the training loop and to no optimizer."""

    table: Table | None = None

    def __init__(self) -> None:
        self.overhead = 0.0
        self._loss = float("nan")
        self._on_its_way: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._duration = histogram("optwatch.step_duration")
        self._last: float | None = None

    def log(self, loss: float | torch.Tensor) -> None:
        """Take a loss; one on a device is copied, and read when it has arrived."""
        if isinstance(loss, torch.Tensor) and loss.device.type == "cuda":
            host = torch.empty((), dtype=torch.float32, pin_memory=True)
            host.copy_(loss.detach(), non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(loss.device))
            self._on_its_way = host, event
        else:
            self._loss = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    def stepped(self) -> None:
        """A step of the loop has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._duration.observe(now - self._last)
        self._last = now

    def gauges(self) -> Sequence[tuple[Series, float]]:
        """The newest loss."""
        if self._on_its_way is not None and self._on_its_way[1].query():
            self._loss = float(self._on_its_way[0])
            self._on_its_way = None
        return [(Series("optwatch.loss"), self._loss)]

    def counters(self) -> Sequence[tuple[Series, float]]:
        """What watching has cost so far."""
        return [(Series("optwatch.overhead"), self.overhead)]

    def histograms(self) -> Sequence[tuple[Series, Histogram]]:
        """The time of a whole step."""
        return [(Series("optwatch.step_duration"), self._duration)]

    def infos(self) -> Sequence[Series]:
        """Nothing."""
        return []


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again."""
    return [
        name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]
