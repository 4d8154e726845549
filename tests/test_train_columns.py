"""What a terminal shows of a step."""

import pytest

from r1kernels.train.columns import ALL_COLUMNS, COLUMNS, cell, columns_of, duration, sparkline


def test_cells_are_empty_where_nothing_was_measured():
    line = {"step": 4, "pass_at_1": 0.125, "kl": None, "entropy": float("nan"), "clip_low_fraction": 0.1}
    assert {name: cell(line, column) for name, column in COLUMNS.items() if cell(line, column)} == {
        "step": "4", "pass@1": "12.5%"
    }
    assert list(columns_of([line, {"step": 5, "loss": 1.0}])) == ["step", "loss", "pass@1"]
    assert set(COLUMNS) < set(ALL_COLUMNS)


def test_sparklines_and_durations():
    assert sparkline([]) == "" and sparkline([2.0]) == sparkline([5.0])
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
    assert len(sparkline(range(1000), 24)) == 24
    assert [duration(seconds) for seconds in (0, 7.4, 754, 3723)] == ["0:00", "0:07", "12:34", "1:02:03"]
    with pytest.raises(TypeError):
        duration(None)
