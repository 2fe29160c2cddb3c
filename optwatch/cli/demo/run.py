"""The demo's training loop: an ordinary one, watched with one line."""

from __future__ import annotations

import time
from dataclasses import dataclass

import click
import torch

import optwatch
from optwatch.cli.demo.incidents import INCIDENTS
from optwatch.cli.demo.model import CONTEXT, corpus, make_model, next_byte_loss, random_batch
from optwatch.cli.demo.screen import Screen
from optwatch.optim import AdamW

EVERY = 10  # a short run shows more when it samples more often than a long one needs
PEAK_RATE = 1e-3
WARMUP = 50  # steps


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asks for; training ends with the first of ``steps`` and ``seconds`` that is reached."""

    steps: int | None = None
    seconds: float | None = None
    inject: str | None = None
    device: str | None = None
    batch: int = 8


class _Progress:
    """How far the run is, by steps or by time, whichever is further."""

    def __init__(self, options: DemoOptions) -> None:
        self._options = options
        self._start = time.monotonic()
        self.step = 0

    def done(self) -> float:
        """The part of the run that is over; 1 or more when it should end."""
        parts = [0.0]
        if self._options.steps is not None:
            parts.append(self.step / self._options.steps)
        if self._options.seconds is not None:
            parts.append((time.monotonic() - self._start) / self._options.seconds)
        return max(parts)


def run_demo(options: DemoOptions) -> None:
    """Train, show, and end with a summary.

    Raises:
        click.ClickException: the device does not exist, or the extra ``demo`` is not installed.
    """
    device = _device(options.device)
    torch.manual_seed(0)
    try:
        model = make_model(device)
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"the demo needs {error.name}: install it with pip install 'optwatch[demo]'"
        ) from error
    optimizer = AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.1, state="int8")
    with optwatch.watch(optimizer, model=model, every=EVERY) as watch:
        screen = Screen(watch.metrics_url, watch.run_id)
        try:
            with screen:
                screen.say(
                    f"Training a GPT-2 of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters on "
                    f"{device}, {options.batch} x {CONTEXT} bytes of Python's help texts a step, AdamW with int8 state."
                )
                _train(options, device, model, optimizer, watch, screen)
        finally:
            screen.summarise()


def _train(
    options: DemoOptions,
    device: torch.device,
    model: torch.nn.Module,
    optimizer: AdamW,
    watch: optwatch.Watch,
    screen: Screen,
) -> None:
    """Train until the run is done; half-way, break it if that was asked for."""
    data = corpus()
    generator = torch.Generator().manual_seed(0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    progress = _Progress(options)
    incident = INCIDENTS[options.inject] if options.inject else None
    struck = False
    while progress.done() < 1:
        tokens = random_batch(data, options.batch, generator, device)
        loss = next_byte_loss(model, tokens)
        watch.log(loss=loss.detach())  # published with the step
        loss.backward()
        if incident and progress.step > 0 and progress.done() >= 0.5 and (incident.again or not struck):
            incident.strike(model, optimizer)
            if not struck:
                screen.say(f"step {progress.step}: {incident.story}")
            struck = True
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.step += 1
        screen.step = progress.step


def _device(name: str | None) -> torch.device:
    """The device asked for, checked; by default the GPU when there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta devices hold no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        reason = str(error).splitlines()[0].rstrip(".")
        raise click.ClickException(f"--device {name!r} cannot be used: {reason}") from error
    return device
