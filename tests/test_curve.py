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


@pytest.mark.parametrize("n", [2, 64, 1000])
def test_the_first_loss_and_the_last_are_drawn_however_many_there_are(n):
    losses = [1.0] + [0.5] * (n - 2) + [0.0]
    *rows, axis, legend = text_curve([{"step": i, "token": x} for i, x in enumerate(losses)],
                                     "token").splitlines()
    assert rows[0].startswith("  1.000 |o"), "the first, at the top left"
    assert rows[-1].startswith("  0.000 |") and rows[-1].index("o") == 9 + (
        COLUMNS // 2 if n == 2 else COLUMNS - 1), "the last, at the bottom right"
    assert legend.strip().endswith("token loss, nats per masked token"), "the loss asked for"


def test_a_loss_half_way_down_is_in_the_middle():
    for fall in (1.0, 0.01):  # however small the fall
        *rows, axis, legend = text_curve([{"step": i, "held out": 5.0 - fall * i}
                                          for i in range(3)]).splitlines()
        column = [row[9:].ljust(COLUMNS)[COLUMNS // 2] for row in rows]
        assert column.index("o") in (4, 5), "between the largest, on top, and the smallest"


def test_a_curve_of_one_point_is_drawn():
    assert "o" in text_curve(HISTORY[:1])


def test_every_loss_is_in_the_picture(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="pip install -e '.[notebook]'").Figure
    whole, saved = figure.savefig, []
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **options: (
        saved.append(self), whole(self, *args, **options))[1])
    save_png([*HISTORY, {"step": 3100, "respond": 1.0, "token": 2.0}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
             for line in saved[0].axes[0].lines}
    assert lines["respond"] == ([3100], [1.0]), "a loss that begins later is drawn from there"
    assert lines["token"][0] == [*range(100, 3200, 100)] and lines["token"][1][-1] == 2.0
    assert lines.keys() == {"token", "held out", "respond"}
    assert len(saved[0].axes[0].get_legend().get_texts()) == 3, "and it says which is which"
