"""From rows to points: what a rule does not sum is absent."""

from __future__ import annotations

import numpy as np
import pytest

from optwatch.agent.rows import TableView
from optwatch.board import Table, TensorInfo
from optwatch.metrics.fields import row_length


@pytest.mark.parametrize(
    ("slots", "second_moments", "shown"),
    [
        (("exp_avg", "exp_avg_sq"), (False, True), True),
        (("sum",), (True,), False),
        ((), (), False),
    ],
    ids=str,
)
def test_the_angle_of_a_first_moment(
    slots: tuple[str, ...], second_moments: tuple[bool, ...], shown: bool
) -> None:
    """Only rules whose first slot is one have it; the others show none, not a zero."""
    table = Table("opt", slots, second_moments, (TensorInfo("w", "all", 10),), 1)
    view = TableView(table, {})
    view.take(np.ones((1, row_length(len(slots)))))
    names = {name for name, _ in view.points()}
    assert ("optwatch.moment_gradient_cosine" in names) is shown
    assert "optwatch.update.norm" in names
