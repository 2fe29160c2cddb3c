"""watch() around a real training loop: what is published is true, and training does not notice."""

from __future__ import annotations

import gc
import math
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optwatch
from optwatch.board import BoardReader, Record
from optwatch.metrics.catalogue import CATALOGUE
from optwatch.optim import AdamW


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, watch: optwatch.Watch | None = None
) -> None:
    gen = torch.Generator().manual_seed(3)
    for _ in range(steps):
        loss = model(torch.randn(8, 64, generator=gen)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch.log(loss=loss)


def read(directory: Path) -> tuple[BoardReader, list[Record]]:
    (path,) = directory.glob("*.board")
    reader = BoardReader(path)
    return reader, list(reader.poll().records)


def gauges(reader: BoardReader, record: Record) -> dict[str, float]:
    """Gauges by name, and by slot and dtype where they have them."""
    return {
        " ".join(
            [series.name.removeprefix("optwatch."), *(series.labels.get(k, "") for k in ("slot", "dtype"))]
        ).strip(): value
        for series, value in zip(reader.schema.gauges, record.gauges.tolist(), strict=True)
    }


def counters(reader: BoardReader) -> dict[str, float]:
    live = reader.live()
    return {
        s.name.removeprefix("optwatch."): v
        for s, v in zip(reader.schema.counters, live.counters, strict=True)
    }


@pytest.mark.parametrize(
    "kind", [AdamW, torch.optim.AdamW, torch.optim.SGD], ids=lambda k: f"{k.__module__}.{k.__name__}"
)
@pytest.mark.parametrize("every", [1, 7])
def test_watching_changes_no_bit(directory: Path, kind: type[torch.optim.Optimizer], every: int) -> None:
    """200 steps, watched and not: equal weights and equal state."""
    models = network(), network()
    options = {"state": "int8"} if kind is AdamW else {}
    optimizers = [kind(model.parameters(), lr=1e-2, **options) for model in models]
    with optwatch.watch(
        optimizers[0], model=models[0], every=every, directory=directory, agent=False
    ) as watch:
        train(models[0], optimizers[0], 200, watch)
    train(models[1], optimizers[1], 200)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizers[0].state[a].items():
            assert torch.equal(value, optimizers[1].state[b][key]) if torch.is_tensor(value) else True


def test_published_series_are_the_catalogues(directory: Path) -> None:
    """Every name and label set exists there."""
    model = network()
    optimizer = AdamW(model.parameters(), state="int8")
    with optwatch.watch(optimizer, model=model, directory=directory, agent=False):
        train(model, optimizer, 3)
        reader, _ = read(directory)
        schema = reader.schema
        for series in (*schema.gauges, *schema.counters, *schema.infos, *schema.histograms):
            CATALOGUE[series.name].check_labels({"run_id": "", "rank": "", **series.labels})


def test_bytes_rates_and_durations(directory: Path) -> None:
    """State bytes to the byte, the loss, the rate, and a histogram that counts every step."""
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.25, state="int8")
    with optwatch.watch(optimizer, model=model, directory=directory, agent=False) as watch:
        train(model, optimizer, 5, watch)
        reader, records = read(directory)
        found = gauges(reader, records[-1])
        state = [t for s in optimizer.state.values() for t in s.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
        actual = sum(v for k, v in found.items() if k.startswith("optimizer.state "))
        assert actual == sum(storages.values())
        assert actual == sum(v for k, v in found.items() if k.startswith("optimizer.state_expected "))
        assert (
            found["parameter  float32"]
            == found["gradient  float32"]
            == sum(p.nbytes for p in model.parameters())
        )
        assert found["learning_rate"] == 0.25
        assert math.isfinite(found["loss"])
        assert counters(reader)["steps"] == 5
        assert 0 < counters(reader)["overhead"] < 5
        durations = {
            h.name: v for h, v in zip(reader.schema.histograms, reader.live().histograms, strict=True)
        }
        assert durations["optwatch.optimizer_step_duration"][0].sum() == 5
        assert durations["optwatch.step_duration"][0].sum() == 4


def test_rows_are_those_of_the_step(directory: Path) -> None:
    """The board's rows are the sums that the kernel delivered, tensor by tensor."""
    model = network()
    optimizer = AdamW(model.parameters(), state="int8")
    delivered: list[np.ndarray] = []
    optimizer.subscribe(
        lambda stats: delivered.append(np.concatenate([p.rows.numpy().copy() for p in stats.plans]))
    )
    with optwatch.watch(optimizer, model=model, every=1, directory=directory, agent=False):
        train(model, optimizer, 4)
        reader, records = read(directory)
        (table,) = reader.schema.tables
        assert {t.name for t in table.tensors} == {name for name, _ in model.named_parameters()}
        assert sum(t.numel for t in table.tensors) == sum(p.numel() for p in model.parameters())
        for record, rows in zip(records[-4:], delivered, strict=True):
            np.testing.assert_array_equal(record.tables[0], rows)


def test_promoted_state_shows_at_the_first_step(directory: Path) -> None:
    """A resume that places fp32 tensors in optimizer.state: actual bytes leave the expected ones."""
    model = network()
    optimizer = AdamW(model.parameters(), state="int8")
    with optwatch.watch(optimizer, model=model, directory=directory, agent=False):
        train(model, optimizer, 3)
        before = counters(read(directory)[0])["steps"]
        for param in model.parameters():
            exact = optimizer.dequantized_state(param)
            step = optimizer.state[param]["step"]
            optimizer.state[param].clear()
            optimizer.state[param].update(step=step, **exact)
        train(model, optimizer, 1)
        reader, records = read(directory)
        found = gauges(reader, records[-1])
        big = sum(p.numel() for p in model.parameters() if p.numel() >= 4096)
        small = sum(p.numel() for p in model.parameters()) - big
        assert found["optimizer.state exp_avg float32"] == 4 * (big + small)
        assert found["optimizer.state_expected exp_avg int8"] == big
        assert counters(reader)["steps"] == before + 1  # counters carry on through generations


def test_nonfinite_gradients_are_counted(directory: Path) -> None:
    """Each step's, also those without full statistics."""
    param = nn.Parameter(torch.ones(100))
    optimizer = AdamW([param])
    with optwatch.watch(optimizer, directory=directory, agent=False):
        for bad in (0, 3, 0, 2):
            param.grad = torch.ones(100)
            param.grad[:bad] = math.nan
            optimizer.step()
        assert counters(read(directory)[0])["nonfinite_elements"] == 5


def test_two_optimizers_and_a_step_without_gradients(directory: Path) -> None:
    """Each has its own series; a step that updates nothing is counted as skipped."""
    models = network(0), network(1)
    optimizers = [AdamW(models[0].parameters()), AdamW(models[1].parameters(), state="bf16")]
    with optwatch.watch(optimizers, directory=directory, agent=False):
        train(models[0], optimizers[0], 2)
        train(models[1], optimizers[1], 3)
        optimizers[1].zero_grad()
        optimizers[1].step()
        reader, _ = read(directory)
        live = reader.live()
        values = {
            (s.name.removeprefix("optwatch."), s.labels.get("optimizer")): v
            for s, v in zip(reader.schema.counters, live.counters, strict=True)
        }
        assert values["steps", "AdamW 1"] == 2
        assert values["steps", "AdamW 2"] == 4
        assert values["steps_skipped", "AdamW 2"] == 1


def test_parameters_added_late_open_a_new_generation(directory: Path) -> None:
    """The table then has their rows."""
    model, late = network(), nn.Parameter(torch.ones(10))
    optimizer = AdamW(model.parameters())
    with optwatch.watch(optimizer, model=model, directory=directory, agent=False):
        train(model, optimizer, 2)
        optimizer.add_param_group({"params": [late], "lr": 0.5})
        late.grad = torch.ones(10)
        optimizer.step()
        reader, records = read(directory)
        assert len(reader.schema.tables[0].tensors) == 5
        assert "learning_rate" in gauges(reader, records[-1])


def test_nothing_is_kept_alive(directory: Path) -> None:
    """Model and optimizer can be dropped while the watch goes on."""
    model = network()
    optimizer = AdamW(model.parameters(), state="int8")
    watch = optwatch.watch(optimizer, model=model, directory=directory, agent=False)
    train(model, optimizer, 3)
    gone = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    watch.close()


class TestTrouble:
    """Whatever goes wrong in watching, training goes on; one warning says what it was."""

    def test_a_directory_that_cannot_be_used(self, tmp_path: Path) -> None:
        """A file where the directory should be."""
        (tmp_path / "file").write_text("")
        model = network()
        optimizer = AdamW(model.parameters())
        with pytest.warns(RuntimeWarning, match="this run is not watched") as caught:
            watch = optwatch.watch(optimizer, directory=tmp_path / "file" / "boards")
        assert len(caught) == 1
        train(model, optimizer, 2, watch)
        assert watch.metrics_url is None
        watch.close()

    def test_an_error_inside_the_probe(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It ends watching, not training."""
        model = network()
        optimizer = AdamW(model.parameters())
        watch = optwatch.watch(optimizer, directory=directory, agent=False)
        train(model, optimizer, 1)
        monkeypatch.setattr("optwatch.hooks.publisher.apply_folds", lambda *_: 1 / 0)
        with pytest.warns(RuntimeWarning, match="watching ended: ZeroDivisionError") as caught:
            train(model, optimizer, 3, watch)
        assert len(caught) == 1
        watch.close()

    def test_warnings_as_errors_do_not_reach_the_loop(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Then the warning goes to stderr."""
        model = network()
        optimizer = AdamW(model.parameters())
        watch = optwatch.watch(optimizer, directory=directory, agent=False)
        monkeypatch.setattr("optwatch.hooks.publisher.apply_folds", lambda *_: 1 / 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, 2)
        assert "watching ended" in capsys.readouterr().err
        watch.close()

    def test_a_full_disk(self, directory: Path) -> None:
        """Writes that fail are counted, and nothing is raised."""
        model = network()
        optimizer = AdamW(model.parameters())
        watch = optwatch.watch(optimizer, directory=directory, agent=False)
        train(model, optimizer, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            train(model, optimizer, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        train(model, optimizer, 1)
        reader, _ = read(directory)
        assert reader.live().write_failures > 0
        assert counters(reader)["steps"] == 4
        watch.close()

    def test_a_forked_child_writes_nothing(self, directory: Path) -> None:
        """It inherits the optimizer, but the board is its parent's."""
        model = network()
        optimizer = AdamW(model.parameters(), backend="reference")
        watch = optwatch.watch(optimizer, directory=directory, agent=False)
        torch.set_num_threads(1)
        train(model, optimizer, 2)
        child = os.fork()
        if child == 0:
            train(model, optimizer, 5)
            watch.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        reader, _ = read(directory)
        assert counters(reader)["steps"] == 2
        assert reader.alive()
        watch.close()

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            (
                {"optimizer": "adamw"},
                TypeError,
                "watch\\(\\) takes a torch.optim.Optimizer or several, got str",
            ),
            ({"every": 0}, ValueError, "every=0: expected a whole number of at least 1"),
            ({"replicas": 1.5}, ValueError, "replicas=1.5"),
            ({"run_id": "a b"}, ValueError, "run_id='a b'"),
        ],
    )
    def test_arguments(self, arguments: dict[str, object], kind: type[Exception], message: str) -> None:
        """Wrong ones are refused at once, by name."""
        given = {"optimizer": AdamW([nn.Parameter(torch.ones(3))]), **arguments}
        with pytest.raises(kind, match=message):
            optwatch.watch(**given)


SCRIPT = """
import sys, torch, optwatch
from optwatch.optim import AdamW
param = torch.nn.Parameter(torch.ones(10))
optimizer = AdamW([param])
optwatch.watch(optimizer, directory=sys.argv[1], agent=False)
param.grad = torch.ones(10)
optimizer.step()
{}
"""


@pytest.mark.parametrize(
    ("end", "code", "state"),
    [
        ("", 0, "finished"),
        ("1 / 0", 1, "failed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, "running"),
    ],
    ids=["finished", "failed", "killed"],
)
def test_the_end_of_the_process_closes_the_board(directory: Path, end: str, code: int, state: str) -> None:
    """Without close(): finished, failed with an exception, or simply gone."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end), directory], capture_output=True, check=False
    )
    assert done.returncode == code
    reader, records = read(directory)
    assert reader.live().state.name.lower() == state
    assert {record.step for record in records} == {1}
    assert not reader.alive()


@pytest.mark.slow
def test_a_killed_agent_is_replaced_and_training_goes_on(directory: Path) -> None:
    """A new one takes over within seconds; the metrics are those of the living run."""
    import json
    import urllib.request

    model = network()
    optimizer = AdamW(model.parameters())
    with optwatch.watch(optimizer, model=model, directory=directory) as watch:
        train(model, optimizer, 3)
        assert watch.metrics_url is not None
        first = json.loads((directory / "agent.json").read_text())["pid"]
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 25
        while time.monotonic() < deadline:
            train(model, optimizer, 1)
            time.sleep(0.1)
            try:
                info = json.loads((directory / "agent.json").read_text())
            except (OSError, ValueError):
                continue
            if info["pid"] != first and watch.metrics_url is not None:
                break
        assert info["pid"] != first
        time.sleep(1.5)
        text = urllib.request.urlopen(watch.metrics_url, timeout=5).read().decode()
        assert 'optwatch_rank_up{rank="0"' in text
    os.kill(info["pid"], signal.SIGTERM)
