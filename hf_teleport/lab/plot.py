"""Draw an experiment's training losses, and write them as numbers and a table."""

from pathlib import Path
from typing import Any

from hf_teleport.lab.results import choices, curves, evaluations, final, paper_rate
from hf_teleport.reporting.extras import require_extra
from hf_teleport.reporting.plots import scale_of

FIGURE, NUMBERS = "training_loss.png", "training_loss.csv"

Choices = dict[str, dict[str, float]]

# The horizontal axes: columns of `results.curves`, and their labels.
ALONG = {"step": "step", "seconds": "seconds, teleports included"}


def plot(output: str | Path) -> Any:
    """Write the training losses of an experiment's finished runs into its folder, as a figure and a CSV file.

    Returns:
        A rich table of the final values.

    Raises:
        FileNotFoundError: there is no finished run.
        ModuleNotFoundError: matplotlib or pandas is not installed.
    """
    folder = Path(output)
    frame = evaluations(folder)
    lines, chosen = curves(frame), choices(frame, paper_rate(folder))
    lines.to_csv(folder / NUMBERS, index=False)
    figure(lines, chosen).savefig(folder / FIGURE, dpi=110)
    return table(frame, chosen, folder.name)


def figure(lines: Any, chosen: Choices, along: dict[str, str] | None = None) -> Any:
    """Draw training loss against steps, time and others. There is a row for each way to choose the learning rate.

    Args:
        lines: the result of `results.curves`. A band shows one standard deviation to either side.
        chosen: the result of `results.choices`.
        along: columns for the horizontal axes, and their labels. Default: `ALONG`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figures = require_extra("matplotlib.figure")
    along = along or ALONG
    # Not by pyplot, which keeps figures in memory and may need a display.
    drawing = figures.Figure(figsize=(5 * len(along), 3.6 * len(chosen)), layout="constrained")
    panels = drawing.subplots(len(chosen), len(along), squeeze=False, sharey="row")
    for (title, rates), row in zip(chosen.items(), panels, strict=True):
        for axes, (column, name) in zip(row, along.items(), strict=True):
            for arm, rate in rates.items():
                line = lines[(lines["arm"] == arm) & (lines["learning_rate"] == rate)]
                mean, deviation = line["train_loss"], line["train_loss_sd"].fillna(0)
                axes.plot(line[column], mean, marker=".", label=f"{arm}, {rate:g}")
                axes.fill_between(line[column], mean - deviation, mean + deviation, alpha=0.2)
            axes.set(xlabel=name, title=title)
            axes.grid(alpha=0.25)
        shown = [lines[(lines["arm"] == arm) & (lines["learning_rate"] == rate)]["train_loss"] for arm, rate in rates.items()]
        row[0].set(ylabel="training loss", yscale=scale_of(loss for losses in shown for loss in losses))
        row[0].legend(fontsize="small")
    return drawing


def table(frame: Any, chosen: Choices, name: str) -> Any:
    """Final values of each arm at its learning rates: mean ± standard deviation over the seeds.

    Args:
        frame: the result of `results.evaluations`.
        chosen: the result of `results.choices`.
        name: the experiment's name.
    """
    from rich import box
    from rich.table import Table

    ends = final(frame)
    measure = ends["measure"].dropna().unique()
    shown = Table(title=f"{name}: final values, mean ± standard deviation over the seeds", box=box.SIMPLE)
    columns = {
        "train_loss": "training loss",
        "test_loss": "test loss",
        "metric": f"test {' or '.join(measure)}",
        "seconds": "seconds",
    }
    for column in ("arm", "learning rate", *columns.values(), "seeds"):
        shown.add_column(column)
    for title, rates in chosen.items():
        for arm, rate in rates.items():
            runs = ends[(ends["arm"] == arm) & (ends["learning_rate"] == rate)]
            shown.add_row(arm, f"{rate:g} ({title.split()[0]})", *(_spread(runs[column]) for column in columns), str(len(runs)))
        shown.add_section()
    return shown


def _spread(values: Any) -> str:
    mean, deviation = values.mean(), values.std()
    return f"{mean:.4g}" if deviation != deviation else f"{mean:.4g} ± {deviation:.2g}"
