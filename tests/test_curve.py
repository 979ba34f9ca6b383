"""The loss curve: letters everywhere, a picture where matplotlib is installed."""

import pytest

from steerling_min.training.curve import COLUMNS, ROWS, save_png, text_curve

HISTORY = [{"step": 100 * i, "token": 5.0 / i, "held out": 4.0 / i} for i in range(1, 31)]


def test_the_curve_falls_from_the_first_loss_to_the_last():
    *rows, axis, legend = text_curve(HISTORY).splitlines()
    assert len(rows) == ROWS and rows[0].startswith("  4.000 |o"), "the largest loss is on top"
    assert rows[-1].startswith("  0.133 |") and rows[-1].endswith("o")
    columns = [row[9:].ljust(COLUMNS) for row in rows]
    assert all(sum(row[i] == "o" for row in columns) == 1 for i in range(COLUMNS))
    assert "3,000" in legend and max(map(len, rows)) <= len(axis) <= 80


def test_a_curve_of_one_point_is_drawn():
    assert "o" in text_curve(HISTORY[:1])


def test_every_loss_is_in_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -e '.[notebook]'")
    save_png(HISTORY, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
