"""Pictures of runs: what metrics.jsonl says over the steps, loss spikes marked, and seconds by phase.

Each picture is drawn for a light and for a dark page, and is told in words for those who do not see it.
"""

import io
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.errors import InputError
from tlm.page import Html, by_day_and_night
from tlm.run import write_bytes
from tlm.tables import arm_title

Records = Mapping[str, Sequence[list[dict]]]  # name -> the records of its runs, one list a seed
Costs = Mapping[str, Mapping[str, float]]  # name -> seconds by phase
LARGEST = 5  # phases with a colour of their own


class Curve(NamedTuple):
    steps: list[int]  # of both stages, one after the other
    values: list[float]


class Panel(NamedTuple):
    title: str
    kind: str  # of metrics.jsonl's records
    field: str
    scale: float = 1.0
    best: Callable | None = min  # of its values; None where neither less nor more is better
    digits: str = ".2f"


class Ink(NamedTuple):
    """Colours of a picture: told apart by those who see colours otherwise, and on a light or a dark page."""

    page: str
    text: str
    line: str
    spike: str
    arms: dict[str, str]
    others: tuple[str, ...]


LIGHT = Ink(
    "#fdfdfc", "#1c1f23", "#dfe2e6", "#b3261e",
    {"tfidf": "#7a7a7a", "scratch": "#d55e00", "random": "#b3589a", "tlm": "#0b63a5", "pt-ft": "#1d7a43"},
    ("#0b63a5", "#d55e00", "#b3589a", "#1d7a43", "#7a7a7a"),
)  # fmt: skip
DARK = Ink(
    "#15181c", "#e4e7ea", "#30363d", "#ff8a80",
    {"tfidf": "#9a9a9a", "scratch": "#f08a4b", "random": "#dd8fc5", "tlm": "#6db3ee", "pt-ft": "#5fc98a"},
    ("#6db3ee", "#f08a4b", "#dd8fc5", "#5fc98a", "#9a9a9a"),
)  # fmt: skip
DASHES = {"tfidf": ":", "scratch": "--", "random": "-.", "tlm": "-", "pt-ft": "-"}
OTHER_DASHES = ("-", "--", "-.", ":")  # the next kind once all colours are taken


def panels(metric: str) -> tuple[Panel, ...]:
    """What a run learns."""
    return (
        Panel("Masked-LM loss, joint stage", "train", "mlm_loss"),
        Panel("Task loss", "train", "task_loss"),
        Panel(f"Dev {metric.replace('_', '-')} (%)", "dev", metric, 100.0, max),
    )


TOTAL = Panel("Total loss", "train", "loss")
STEPS = (
    Panel("Learning rate", "train", "lr", best=None, digits=".2g"),
    Panel("Gradient norm before clipping", "train", "grad_norm", best=None),
)
SPEED = (
    Panel("Throughput (tokens/s)", "train", "tokens_per_second", best=max, digits=",.0f"),
    Panel("MFU (%)", "train", "mfu", 100.0, max, ".1f"),
)


def read_metrics(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; none where it has no such file (TF-IDF takes no steps)."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"stage", "step", "kind"} <= record.keys():
            raise InputError(f"{path}, line {number}: not a record of a step; remove the line, or run again")
        records.append(record)
    return records


def joint_steps(records: Sequence[dict]) -> int:
    return max((r["step"] for r in records if r["stage"] == "joint" and r["kind"] != "spike"), default=0)


def position(record: dict, first: int) -> int:
    """The step of a record where the second stage's follow on the `first` ones."""
    return record["step"] + (first if record["stage"] == "finetune" else 0)


def curve(records: Sequence[dict], panel: Panel) -> Curve:
    """A field over the steps of both stages. Of a step that was done again, after a rewind, the last counts."""
    first = joint_steps(records)
    points = {
        position(r, first): panel.scale * r[panel.field]
        for r in records
        if r["kind"] == panel.kind and r.get(panel.field) is not None
    }
    steps = sorted(points)
    return Curve(steps, [points[step] for step in steps])


def spikes(records: Sequence[dict]) -> list[dict]:
    return [record for record in records if record["kind"] == "spike"]


# --- drawing --------------------------------------------------------------------------------------------------------


def styles(names: Iterable[str], ink: Ink) -> list[tuple[str, str]]:
    """(dash, colour) of each line: the arms have their own, the others those that are left, from the first again."""
    own = {name: (DASHES[name], ink.arms[name]) for name in names if name in DASHES}
    left = cycle([pair for pair in product(OTHER_DASHES, ink.others) if pair not in own.values()])
    return [own.get(name) or next(left) for name in names]


def draw(axes, ink: Ink, panel: Panel, records: Records) -> None:
    """One panel: a line for each arm, thin ones where it has several seeds; triangles where loss spikes were."""
    marked = []
    for (arm, of_arm), (dash, colour) in zip(records.items(), styles(records, ink), strict=True):
        label = arm_title(arm)
        for run in of_arm:
            found = curve(run, panel)
            if not found.steps:
                continue
            marker = "o" if len(found.steps) == 1 else None
            width = 1.8 if len(of_arm) == 1 else 1.0
            axes.plot(*found, dash, color=colour, linewidth=width, marker=marker, label=label)
            label = None
            at = [position(spike, joint_steps(run)) for spike in spikes(run)]
            marked += [(x, np.interp(x, *found)) for x in at if found.steps[0] <= x <= found.steps[-1]]
    if marked:
        axes.scatter(*zip(*marked, strict=True), marker="v", color=ink.spike, s=36, zorder=3, label="spike")
    ends = {joint_steps(run) for of_arm in records.values() for run in of_arm
            if {"joint", "finetune"} <= {r["stage"] for r in run}}  # fmt: skip
    if len(ends) == 1 and panel.field != "mlm_loss":
        axes.axvline(ends.pop(), color=ink.line, linewidth=1, zorder=0)
    axes.set_xlabel("optimizer steps", color=ink.text)
    axes.grid(axis="y", color=ink.line, linewidth=0.6)
    dress(axes, ink, panel.title, legend_size=9 if len(records) < 6 else 7)


def draw_costs(axes, ink: Ink, title: str, costs: Costs) -> None:
    """A bar for each name, cut by phase; all but the largest phases together as `other`."""
    totals = {phase: sum(of.get(phase, 0) for of in costs.values()) for of in costs.values() for phase in of}
    largest = sorted(totals, key=lambda phase: -totals[phase])[:LARGEST]
    named = [arm_title(name) for name in costs]
    left = np.zeros(len(costs))
    for phase, colour in zip([*largest, "other"], [*ink.others, ink.line], strict=False):
        kept = {phase} if phase in largest else totals.keys() - set(largest)
        width = np.array([sum(seconds for p, seconds in of.items() if p in kept) for of in costs.values()])
        if width.any():
            axes.barh(named, width, left=left, height=0.6, color=colour, edgecolor=ink.page, label=phase_title(phase))
        left += width
    axes.invert_yaxis()
    axes.set_xlabel("seconds", color=ink.text)
    axes.grid(axis="x", color=ink.line, linewidth=0.6)
    axes.set_axisbelow(True)
    dress(axes, ink, title, legend_size=9, of=axes.figure, ncols=3, loc="outside lower center")


def dress(axes, ink: Ink, title: str, legend_size: int, of=None, **legend) -> None:
    """What all pictures have in common. `of`: what the legend belongs to, if not the axes; `legend`: where it is."""
    axes.set_title(title, loc="left", fontsize=11, color=ink.text)
    axes.set_facecolor(ink.page)
    axes.tick_params(colors=ink.text, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink.line)
    if axes.get_legend_handles_labels()[0]:
        (of or axes).legend(frameon=False, fontsize=legend_size, labelcolor=ink.text, **legend)


def render(drawings: Sequence[Callable], ink: Ink, width: float = 4.4, height: float = 3.3) -> bytes:
    """A PNG with the drawings in a row. `drawings`: functions of (axes, ink); sizes in inches, of one of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(drawings), height), facecolor=ink.page, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, drawing in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
        drawing(axes, ink)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, metadata={"Software": None})
    return out.getvalue()


class Picture(NamedTuple):
    title: str
    light: bytes  # a PNG, as the other
    dark: bytes
    words: str

    @property
    def slug(self) -> str:
        """A file's name: lower case, one hyphen between words."""
        return "-".join(re.findall(r"\w+", self.title.lower()))

    def element(self) -> Html:
        return by_day_and_night(self.light, self.dark, self.words)


def panel_picture(panel: Panel, records: Records) -> Picture:
    drawing = partial(draw, panel=panel, records=records)
    return Picture(panel.title, render([drawing], LIGHT), render([drawing], DARK), in_words(panel, records))


def plot_curves(records: Records, out: Path, metric: str = "accuracy") -> None:
    """What all arms learnt, as one PNG."""
    write_bytes(out, render([partial(draw, panel=panel, records=records) for panel in panels(metric)], LIGHT))


def cost_picture(title: str, costs: Costs) -> Picture:
    drawing, height = partial(draw_costs, title=title, costs=costs), 1.7 + 0.35 * len(costs)
    words = "; ".join(f"{arm_title(name)} {sum(of.values()):,.0f}{largest_two(of)}" for name, of in costs.items())
    light, dark = (render([drawing], ink, height=height) for ink in (LIGHT, DARK))
    return Picture(title, light, dark, f"{title}: {words}.")


def largest_two(seconds: Mapping[str, float]) -> str:
    largest = sorted(seconds, key=lambda phase: -seconds[phase])[:2]
    return ", most of it " + " and ".join(f"{phase_title(phase)} {seconds[phase]:,.0f}" for phase in largest)


def phase_title(phase: str) -> str:
    return phase.replace("_", " ")


def in_words(panel: Panel, records: Records) -> str:
    """What a panel shows."""
    parts = []
    for arm, of_arm in records.items():
        curves = [found for found in (curve(run, panel) for run in of_arm) if found.steps]
        if curves:
            picks = [lambda v: v[0], lambda v: v[-1], *([panel.best] if panel.best else [])]
            first, last, *best = (
                format(statistics.fmean(pick(c.values) for c in curves), panel.digits) for pick in picks
            )
            parts.append(f"{arm_title(arm)} from {first} to {last}" + "".join(f", best {b}" for b in best))
    marked = sum(len(spikes(run)) for of_arm in records.values() for run in of_arm)
    ending = f" Loss spikes: {marked}." if marked else ""
    return f"{panel.title} over the optimizer steps: {'; '.join(parts) or 'no values'}.{ending}"
