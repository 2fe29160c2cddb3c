"""Drawing a snapshot: as a live terminal view with rich, or as one plain line for logs."""

from __future__ import annotations

import math
import time

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from optwatch.cli.snapshot import DeviceView, EventView, GroupView, RunView, SlotView, Snapshot

ABSENT = "–"  # not measured, or not measured yet: never shown as zero
_BLOCKS = "▁▂▃▄▅▆▇█"
_RULED = box.Box("    \n    \n ── \n    \n ── \n ── \n    \n    \n")  # a rule below the head, no frame
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_STALE_SECONDS = 30.0
_EVENTS = 3  # kinds of them that are shown
_STYLE_OF_STATE = {"running": "green", "finished": "cyan", "failed": "bold red", "lost": "bold red"}


def draw(snapshot: Snapshot, url: str, note: str = "") -> RenderableType:
    """The whole view. ``note`` is a line of the caller's, shown in yellow below the title."""
    if not snapshot.runs:
        return _panel(Text("no run yet: start one that calls optwatch.watch()", "dim"), url, note)
    run = snapshot.runs[0]
    parts: list[RenderableType] = [_facts(run, snapshot.devices), Text(), _state_table(run)]
    if not run.as_expected:
        parts.append(_mismatch(run))
    if run.groups:
        parts += [Text(), _group_table(run)]
    if run.events:
        parts.append(Text("; ".join(map(_event, run.events[:_EVENTS])), "dim"))
    if others := snapshot.runs[1:]:
        parts.append(Text(f"also on this agent: {', '.join(other.run_id for other in others)}", "dim"))
    return _panel(Group(*parts), url, note)


def line(snapshot: Snapshot) -> str:
    """One plain line on the newest run, for logs and pipes."""
    if not snapshot.runs:
        return "no run yet"
    run = snapshot.runs[0]
    norms = {slot: _norm_over(run.groups, slot) for slot in _slot_names(run.groups)}
    parts = [
        f"step {count(run.step)}",
        f"loss {number(run.loss)}",
        f"{number(run.steps_per_second)} steps/s",
        f"state {size(run.actual_bytes)} (asked for {size(run.expected_bytes)}, fp32 {size(run.fp32_bytes)})",
        f"update error {percent(run.update_error)}",
        *(f"|{slot}| {number(norm)}" for slot, norm in norms.items()),
        *(f"device {size(device.used_bytes)} of {size(device.total_bytes)}" for device in snapshot.devices),
        f"host {size(run.host_bytes)}",
        f"watching {percent(run.overhead_ratio)}",
    ]
    if not run.as_expected:
        parts.append("STATE IS NOT STORED AS ASKED FOR")
    if run.state not in ("running", ""):
        parts.append(run.state)
    return "  ".join(parts)


# ---- numbers -----------------------------------------------------------------------------------------------------


def count(value: float | None) -> str:
    """A whole number: ``12,345``."""
    return ABSENT if value is None else f"{value:,.0f}"


def number(value: float | None) -> str:
    """Three significant digits; NaN and Inf are shown."""
    if value is None:
        return ABSENT
    if value == 0 or (math.isfinite(value) and 1e-3 <= abs(value) < 1e5):
        return f"{value:#.3g}".rstrip(".")
    return f"{value:.2e}"


def percent(ratio: float | None) -> str:
    """A ratio as a percentage of two or three digits."""
    if ratio is None:
        return ABSENT
    return "0 %" if ratio == 0 else f"{number(100 * ratio)} %"


def size(value: float | None) -> str:
    """Bytes in decimal units: ``9.84 MB``."""
    if value is None:
        return ABSENT
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * factor:  # what would be written as 1000 is 1.00 of the next unit
            return f"{value / factor:#.3g} {unit}".replace(". ", " ")
    return f"{value:.0f} B"


def curve(values: tuple[float, ...], width: int = 22) -> str:
    """The values as a small curve of block characters, the newest at the right."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    if len(finite) > width:
        finite = [finite[i * len(finite) // width] for i in range(width - 1)] + [finite[-1]]
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in finite)


# ---- parts of the view -------------------------------------------------------------------------------------------


def _panel(content: RenderableType, url: str, note: str) -> RenderableType:
    body = Group(Text(note, "yellow"), content) if note else content
    return Panel(
        body, title="[bold]optwatch[/bold]", subtitle=f"[dim]{url}[/dim]", box=box.ROUNDED, padding=(0, 1)
    )


def _facts(run: RunView, devices: tuple[DeviceView, ...]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for style in ("dim", "", "dim", ""):
        table.add_column(style=style, no_wrap=True)
    ranks = f", {run.ranks_up} of {run.ranks} ranks" if run.ranks != 1 else ""
    state = Text.assemble((run.state or ABSENT, _STYLE_OF_STATE.get(run.state, "")), ranks, _age(run))
    loss = Text.assemble(number(run.loss), " ", (curve(run.losses), "cyan"))
    memory = [f"host {size(run.host_bytes)}", *(_device(device) for device in devices)]
    table.add_row("run", run.run_id, "state", state)
    table.add_row("step", count(run.step), "loss", loss)
    speed = f"{number(run.steps_per_second)} steps/s"
    if run.tokens_per_second is not None:
        speed += f", {count(run.tokens_per_second)} tokens/s"
    table.add_row("speed", speed, "memory", ", ".join(memory))
    table.add_row(
        "parameters", count(run.parameters), "watching", f"{percent(run.overhead_ratio)} of the time"
    )
    return table


def _age(run: RunView) -> str:
    """Stale values are told to be old; a finished run needs no telling."""
    if run.last_step_time is None or run.state == "finished":
        return ""
    age = time.time() - run.last_step_time
    return f", newest step {age:.0f} s ago" if age > _STALE_SECONDS else ""


def _event(event: EventView) -> str:
    """What has happened, how often, and how long ago."""
    times = f" {event.times} times" if event.times > 1 else ""
    ago = f", {max(time.time() - event.newest, 0):.0f} s ago" if event.newest is not None else ""
    return f"{event.name.replace('_', ' ')}{times}{ago}"


def _device(device: DeviceView) -> str:
    return f"GPU {size(device.used_bytes)} of {size(device.total_bytes)}"


def _state_table(run: RunView) -> RenderableType:
    table = _table("state", "stored as", "bytes", "asked for", "in fp32", "saved", "error")
    for slot in run.slots:
        table.add_row(*_state_row(_name(run, slot.optimizer, slot.slot), slot))
    if len(run.slots) > 1:
        table.add_row(
            "together",
            "",
            Text(size(run.actual_bytes), "bold" if run.as_expected else "bold red"),
            size(run.expected_bytes),
            size(run.fp32_bytes),
            _saved(run.actual_bytes, run.fp32_bytes),
            "",
        )
    return table


def _state_row(name: str, slot: SlotView) -> tuple[str | Text, ...]:
    style = "" if slot.as_expected else "bold red"
    return (
        name,
        Text(_stored_as(slot), style),
        Text(size(slot.actual_bytes), style),
        size(slot.expected_bytes),
        size(slot.fp32_bytes),
        _saved(slot.actual_bytes, slot.fp32_bytes),
        percent(slot.error_ratio),
    )


def _stored_as(slot: SlotView) -> str:
    return " + ".join(_SHORT.get(dtype, dtype) for dtype in slot.dtypes) or "nothing"


def _saved(actual: float | None, fp32: float | None) -> str:
    return f"{100 * (1 - actual / fp32):.0f} %" if fp32 and actual is not None else ABSENT


def _mismatch(run: RunView) -> RenderableType:
    """What is wrong where bytes found and bytes asked for differ."""
    wrong = ", ".join(
        f"{slot.slot} takes {size(slot.actual_bytes)} as {_stored_as(slot)}, "
        f"{size(slot.expected_bytes)} were asked for"
        for slot in run.slots
        if not slot.as_expected
    )
    return Text(f"The state is not stored as asked for: {wrong}.", "bold red")


def _group_table(run: RunView) -> RenderableType:
    slots = _slot_names(run.groups)
    table = _table(
        "group", "gradient", *slots, "update/weight", "update error", title="norms, by group of tensors"
    )
    for group in run.groups:
        table.add_row(
            _name(run, group.optimizer, group.group),
            number(group.gradient_norm),
            *(number(group.moment_norms.get(slot)) for slot in slots),
            number(group.update_to_parameter),
            percent(group.update_error),
        )
    return table


def _table(first: str, *others: str, title: str | None = None) -> Table:
    # One column of rule and one of padding between columns: the widest table has to fit into 80 columns.
    table = Table(
        box=_RULED, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
        title=title, title_justify="left", title_style="dim",
    )  # fmt: skip
    table.add_column(first, style="bold", no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="left" if heading == "stored as" else "right", no_wrap=True)
    return table


def _name(run: RunView, optimizer: str, name: str) -> str:
    """The optimizer is named only where there are several."""
    several = len({slot.optimizer for slot in run.slots}) > 1
    return f"{optimizer} {name}" if several else name


def _slot_names(groups: tuple[GroupView, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(slot for group in groups for slot in group.moment_norms))


def _norm_over(groups: tuple[GroupView, ...], slot: str) -> float:
    return math.hypot(*(group.moment_norms.get(slot, 0.0) for group in groups))
