"""The tensors with the largest values, as JSON."""

from __future__ import annotations

import json
import math
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from agent_process import agent, get
from optwatch.board import BoardWriter, Schema, Table, TensorInfo
from optwatch.metrics.fields import row_fields

SLOTS = ("exp_avg", "exp_avg_sq")
ERRORS = [0.5, math.nan, 0.1, 0.9, math.inf, 0.0]  # of the update; the last tensor was not stepped: 0/0


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """The page of an agent over one rank whose tensors' errors are known, and a rank without statistics."""
    directory: Path = tmp_path_factory.mktemp("boards")
    tensors = tuple(TensorInfo(f"h.{i}.weight", "all", 10) for i in range(len(ERRORS)))
    table = Table("AdamW", SLOTS, (False, True), tensors)
    rows = np.ones((len(ERRORS), table.width))
    columns = row_fields(SLOTS)
    rows[:, columns.index("update_error_sq")] = np.square(ERRORS)
    rows[-1, columns.index("update_sq")] = 0.0
    rows[2, columns.index("exp_avg_sq.error_sq")] = 16.0
    writer = BoardWriter.create(directory, Schema(run={"run_id": "r", "rank": 0}, tables=(table,)))
    writer.publish(1, 1.0, np.zeros(0), [rows], np.zeros(0))
    BoardWriter.create(directory, Schema(run={"run_id": "r", "rank": 1}, tables=(table,)))
    with agent(directory) as (url, _):
        yield url.replace("/metrics", "/tensors")


def found(page: str, query: str, metric: str) -> list[dict]:
    """The tensors of rank 0 by a metric."""
    kind, body = get(page + query)
    assert kind == "application/json"
    (entry,) = [e for e in json.loads(body) if (e["rank"], e["metric"]) == ("0", metric)]
    assert (entry["run_id"], entry["optimizer"]) == ("r", "AdamW")
    return entry["tensors"]


def test_the_worst_come_first(page: str) -> None:
    """Not finite before all others, then by value; 0/0 is no value."""
    tensors = found(page, "", "optwatch_update_quantization_error_ratio")
    assert [(t["tensor"], t["value"]) for t in tensors] == [
        ("h.1.weight", "NaN"),
        ("h.4.weight", "+Inf"),
        ("h.3.weight", 0.9),
        ("h.0.weight", 0.5),
        ("h.2.weight", pytest.approx(0.1)),
    ]
    assert all("slot" not in tensor for tensor in tensors)


def test_slots_are_told_apart(page: str) -> None:
    """The largest of all slots, with the slot's name."""
    (tensor,) = found(page, "?k=1", "optwatch_quantization_error_ratio")
    assert tensor == {"tensor": "h.2.weight", "group": "all", "slot": "exp_avg_sq", "value": 4.0}


def test_ranks_can_be_chosen(page: str) -> None:
    """By run and rank; one without statistics has no tensors."""
    chosen = json.loads(get(page + "?rank=1&run_id=r")[1])
    assert [(e["rank"], e["tensors"]) for e in chosen] == [("1", [])] * 3
    assert json.loads(get(page + "?run_id=another")[1]) == []


@pytest.mark.parametrize("query", ["k=0", "k=101", "k=-1", "k=ten", "k=", "k=%F0%9F%99%82", "k=1e9", "top=3"])
def test_senseless_questions(page: str, query: str) -> None:
    """400 and one line that says what was expected."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        get(f"{page}?{query}")
    with raised.value as answer:
        body = answer.read().decode()
        assert answer.code == 400
    assert body.count("\n") == 1
    assert "expected a number of 1 to 100" in body or "is no parameter; known: k, rank, run_id" in body
