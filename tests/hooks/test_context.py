"""What the training loop tells, and what is noticed without being told."""

from __future__ import annotations

import gc
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import optwatch
from hooks.boards import published
from optwatch.hooks.context import MAXIMUM_OWN_EVENTS, MAXIMUM_SCALARS
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.optim import AdamW


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(80, 80)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, bad: float = 0.0) -> None:
    model(torch.ones(2, 80) * (1.0 + bad)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def events(directory: Path) -> dict[str, float]:
    """Those that have happened."""
    return {key[1]: n for key, n in published(directory).counters.items() if key[0] == "events" and n}


def test_scalars_and_progress(directory: Path) -> None:
    """The newest value of each scalar; tokens and samples add up; all are the catalogue's."""
    model = layer()
    optimizer = AdamW(model.parameters())
    with optwatch.watch(optimizer, model, directory=directory, agent=False) as watch:
        for i in range(3):
            watch.log(loss=torch.tensor(2.0 - i), accuracy=i / 4)
            watch.count(tokens=torch.tensor(100), samples=8)
            step(model, optimizer)
        found = published(directory)
        assert found.gauges["loss",] == 0.0
        assert found.gauges["scalar", "accuracy"] == 0.5
        assert found.counters["training.tokens",] == 300
        assert found.counters["training.samples",] == 24
        assert found.gauges["host_memory.peak",] > 1e7
        for series in (*found.reader.schema.gauges, *found.reader.schema.counters):
            CATALOGUE[series.name].check_labels({"run_id": "", "rank": "", **series.labels})


def test_events_are_published_at_once(directory: Path) -> None:
    """Also before the first step and after the last, without making the newest step look newer."""
    model = layer()
    optimizer = AdamW(model.parameters())
    with optwatch.watch(optimizer, model, directory=directory, agent=False) as watch:
        begun = time.time()
        watch.event("evaluation")
        assert events(directory) == {"evaluation": 1}
        assert published(directory).reader.live().step == -1
        step(model, optimizer)
        stepped = published(directory).reader.live().time
        watch.event("evaluation")
        found = published(directory)
        assert found.reader.live().time == stepped
        assert found.reader.live().step == 1
        assert begun <= stepped <= found.gauges["last_event_timestamp", "evaluation"] <= time.time()
        assert math.isnan(found.gauges["last_event_timestamp", "checkpoint"])
        assert events(directory) == {"evaluation": 2}


def test_checkpoint_and_resume(directory: Path) -> None:
    """Seen by themselves; a resume that keeps every dtype is no conversion."""
    model = layer()
    optimizer = AdamW(model.parameters(), state="int8")
    with optwatch.watch(optimizer, model, directory=directory, agent=False):
        step(model, optimizer)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        assert events(directory) == {"checkpoint": 1, "resume": 1}


@pytest.mark.parametrize("asked", [True, False], ids=["convert=True", "silent"])
def test_a_conversion_is_an_event(directory: Path, asked: bool) -> None:
    """One that was asked for, and the one that torch.optim does to bf16 state without being asked."""
    model = layer()
    before = torch.optim.AdamW(model.parameters())
    step(model, before)
    saved = before.state_dict()
    if asked:
        after: torch.optim.Optimizer = AdamW(model.parameters(), state="int8")
    else:
        after = torch.optim.AdamW(model.parameters())
        for state in saved["state"].values():
            state["exp_avg"] = state["exp_avg"].bfloat16()
    with optwatch.watch(after, model, directory=directory, agent=False):
        after.load_state_dict(saved, **({"convert": True} if asked else {}))
        assert events(directory) == {"resume": 1, "format_conversion": 1}


def test_a_foreign_checkpoint_is_a_conversion(directory: Path) -> None:
    """Whatever its keys are, and also where its values are taken as they are."""
    model = layer()
    tensors = {
        number: {
            "step": 3,
            "state1": torch.zeros(tuple(param.shape)),
            "state2": torch.zeros(tuple(param.shape)),
        }
        for number, param in enumerate(model.parameters())
    }
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": list(tensors)}
    optimizer = AdamW(model.parameters())
    with optwatch.watch(optimizer, model, directory=directory, agent=False):
        optimizer.load_state_dict({"state": tensors, "param_groups": [group]}, convert=True)
        assert events(directory) == {"resume": 1, "format_conversion": 1}


RATES = {
    "constant": ([1.0] * 30, 0),
    "every step": ([1.0 / (1 + i / 50) for i in range(30)], 0),
    "linear warm-up from nothing": ([i / 10 for i in range(11)] + [1.0] * 5, 0),
    "steps": ([1.0] * 12 + [0.5] * 12 + [0.25] * 6, 2),
    "a restart": ([1.0 * 0.8**i for i in range(15)] + [1.0 * 0.8**i for i in range(15)], 1),
    "the end of a plateau": ([1.0] * 20 + [1.0 - i / 20 for i in range(1, 10)], 1),
}


@pytest.mark.parametrize("name", RATES)
def test_jumps_of_the_learning_rate(directory: Path, name: str) -> None:
    """A jump is an event, a step of a schedule is none."""
    rates, expected = RATES[name]
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param])
    with optwatch.watch(optimizer, directory=directory, agent=False):
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            param.grad = torch.ones(3)
            optimizer.step()
        assert events(directory).get("learning_rate_change", 0) == expected


@pytest.mark.parametrize(
    ("kind", "options"), [(AdamW, {}), (torch.optim.AdamW, {}), (torch.optim.AdamW, {"fused": True})]
)
def test_steps_that_a_scaler_skips(directory: Path, kind: type, options: dict) -> None:
    """Counted, whether the scaler does not call step() or leaves the decision to the kernel."""
    model = layer()
    optimizer = kind(model.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with optwatch.watch(optimizer, model, directory=directory, agent=False):
        for bad in (0.0, math.inf, 0.0, math.inf, 0.0):
            scaler.scale(model(torch.ones(2, 80) * (1.0 + bad)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        name = type(optimizer).__name__
        assert published(directory).counters["steps_skipped", name] == 2
        assert all(p.isfinite().all() for p in model.parameters())
        assert events(directory)["skipped_step"] == 2


def test_out_of_memory(directory: Path) -> None:
    """An exception that ends the run is told apart from others."""
    watch = optwatch.watch(AdamW([nn.Parameter(torch.ones(3))]), directory=directory, agent=False)
    with pytest.raises(torch.OutOfMemoryError), watch:
        raise torch.OutOfMemoryError("as the allocator would")
    assert events(directory) == {"oom": 1}
    assert published(directory).reader.live().state.name == "FAILED"


def test_labels_are_bounded(directory: Path) -> None:
    """A name too many is refused once, and what was there before goes on."""
    watch = optwatch.watch(AdamW([nn.Parameter(torch.ones(3))]), directory=directory, agent=False)
    for i in range(MAXIMUM_SCALARS):
        watch.log(**{f"s{i}": i})
    for i in range(MAXIMUM_OWN_EVENTS):
        watch.event(f"e{i}")
    with pytest.warns(RuntimeWarning, match=r"watch.log\('more'\) was ignored: there are 32 scalars already"):
        watch.log(more=1)
    with pytest.warns(RuntimeWarning, match=r"watch.event\('more'\) was ignored: there are 16 names"):
        watch.event("more")
    watch.event("e3")
    assert events(directory)["e3"] == 2
    watch.close()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (
            "log",
            {"loss": torch.ones(3)},
            r"watch.log\('loss'\) was ignored: expected one number, got a tensor",
        ),
        ("log", {"loss": "low"}, r"watch.log\('loss'\) was ignored: could not convert"),
        ("log", {"a" * 65: 1.0}, "a name has 1 to 64 characters"),
        ("count", {"words": 3}, "known are tokens and samples"),
        ("count", {"tokens": -1}, "expected a number of at least 0, got -1"),
        ("count", {"tokens": math.nan}, "expected a number of at least 0, got nan"),
        ("event", {"name": "a b"}, "expected up to 40 of a-z, 0-9 and _"),
    ],
)
def test_bad_values(directory: Path, method: str, arguments: dict, message: str) -> None:
    """Named once, and ignored."""
    watch = optwatch.watch(AdamW([nn.Parameter(torch.ones(3))]), directory=directory, agent=False)
    with pytest.warns(RuntimeWarning, match=message):
        getattr(watch, method)(**arguments)
    getattr(watch, method)(**arguments)  # without a second warning, which would be an error here
    watch.close()
    watch.log(loss=1.0)  # of a closed watch: nothing


def test_optimizers_made_and_dropped(directory: Path) -> None:
    """One that is gone takes its series along and leaves its name to the next."""
    models = [layer(), layer(), layer()]
    first, second = AdamW(models[0].parameters()), AdamW(models[1].parameters())
    with optwatch.watch(first, directory=directory, agent=False) as watch:
        step(models[0], first)
        watch.add(second)
        step(models[1], second)
        step(models[0], first)
        assert published(directory).counters["steps", "AdamW"] == 2
        assert published(directory).counters["steps", "AdamW 2"] == 1
        del second
        gc.collect()
        step(models[0], first)
        assert ("steps", "AdamW 2") not in published(directory).counters
        third = AdamW(models[2].parameters())
        watch.add(third)
        step(models[2], third)
        assert published(directory).counters["steps", "AdamW 2"] == 1
        with pytest.raises(TypeError, match=r"takes a torch.optim.Optimizer or several, got Linear"):
            watch.add(models[0])


def test_threads(directory: Path) -> None:
    """Events and scalars from several threads, while the loop steps: none is lost, nothing breaks."""
    model = layer()
    optimizer = AdamW(model.parameters())
    with optwatch.watch(optimizer, model, directory=directory, agent=False) as watch:

        def report() -> None:
            for i in range(50):
                watch.event("report")
                watch.log(value=i)

        threads = [threading.Thread(target=report) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            step(model, optimizer)
        for thread in threads:
            thread.join()
        step(model, optimizer)
        assert events(directory) == {"report": 150}
        assert published(directory).counters["steps", "AdamW"] == 21


def test_hooks_of_others_survive_the_end_of_watching(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watching that fails inside a step leaves the other hooks of the step in peace."""
    model = layer()
    optimizer = torch.optim.AdamW(model.parameters())
    heard = []
    watch = optwatch.watch(optimizer, model, directory=directory, agent=False)
    optimizer.register_step_post_hook(lambda *_: heard.append(1))
    monkeypatch.setattr("optwatch.hooks.publisher.apply_folds", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning, match="watching ended"):
        step(model, optimizer)
    step(model, optimizer)
    assert heard == [1, 1]
    watch.close()
