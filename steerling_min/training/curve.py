"""The loss curve of a run, as text and, where matplotlib is installed, as a PNG."""

from pathlib import Path

ROWS, COLUMNS = 10, 64


def text_curve(history: list[dict], name: str = "held out") -> str:
    """A run's loss over its steps, as lines of text; history has {"step": n, name: loss, ...}."""
    losses = [row[name] for row in history]
    low, high = min(losses), max(losses)
    columns = [losses[round(i * (len(losses) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
    heights = [round((loss - low) / max(high - low, 1e-9) * (ROWS - 1)) for loss in columns]
    lines = []
    for row in reversed(range(ROWS)):
        level = low + (high - low) * row / (ROWS - 1)
        dots = "".join("o" if height == row else " " for height in heights)
        lines.append(f"{level:7.3f} |{dots}".rstrip())
    steps = f"steps 1 to {history[-1]['step']:,}; {name} loss, nats per masked token"
    return "\n".join([*lines, " " * 8 + "+" + "-" * COLUMNS, " " * 9 + steps])


def save_png(history: list[dict], file: Path) -> None:
    """Draw every loss of a run into a PNG. Raises ImportError where there is no matplotlib."""
    from matplotlib.figure import Figure  # the notebook extra

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for name in {name: None for row in history for name in row if name != "step"}:
        rows = [row for row in history if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log", ylim=(1e-3, None), title="training")
    axes.legend()
    figure.savefig(file, dpi=120, format="png")
