"""What came of the arms: a table for the terminal, curves as PNG, and one HTML page that needs nothing beside it.

The page holds its own style and pictures, so that it can be mailed and still be read in years; the price is pictures in
base64, a third larger. Texts in it come from users' data: `element` escapes every string that it was not given as Html.
An arm is one run, or several that differ in their seed alone: scores are then their mean and standard deviation.
"""

import base64
import html
import io
import json
import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from retrieval.analyze import ANALYZERS
from retrieval.select import Selection
from tasks.errors import InputError
from tasks.types import Task
from tlm.run import read_json, write_bytes, write_text

Arms = Mapping[str, dict | Sequence[dict]]  # name -> a run's summary, or those of several seeds
Runs = Mapping[str, Sequence[Path]]  # name -> run folders, one a seed

TITLES = {
    "tfidf": "TF-IDF + logistic regression",
    "scratch": "task only",
    "random": "random documents",
    "tlm": "TLM",
}
SHOWN = 10  # retrieved documents, predictions
SHOWN_WORDS = 70  # of each text
COMPARED_DOCUMENTS = 1_000  # a shared word is marked if few of these hold it


def arm_title(arm: str) -> str:
    return TITLES.get(arm, arm)


# --- the table ------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    title: str
    value: Callable[[dict], float | None]  # of a summary
    show: Callable[[float], str]
    is_score: bool = False


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def whole(number: float) -> str:
    return f"{number:,.0f}"


def short(number: float) -> str:
    """1234567 -> 1.2M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}" if number < 100 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def scientific(number: float) -> str:
    return "0" if not number else f"{number:.1e}".replace("e+", "e").replace("e0", "e")


COLUMNS = (
    Column("test accuracy", lambda s: s["test"].get("accuracy"), percent, True),
    Column("test macro-F1", lambda s: s["test"].get("macro_f1"), percent, True),
    Column("dev accuracy", lambda s: s["dev"].get("accuracy"), percent, True),
    Column("dev macro-F1", lambda s: s["dev"].get("macro_f1"), percent, True),
    Column("external documents", lambda s: s["data"].get("external_documents"), whole),
    Column("tokens", lambda s: s["cost"].get("tokens"), short),
    Column("FLOPs", lambda s: s["cost"].get("flops"), scientific),
    Column("seconds", lambda s: sum(s["cost"]["seconds"].values()), whole),
)
# With one label a text, micro-F1 is accuracy.
TEST_COLUMN = {"accuracy": "test accuracy", "micro_f1": "test accuracy", "macro_f1": "test macro-F1"}


def seeds_of(summaries: dict | Sequence[dict]) -> Sequence[dict]:
    return [summaries] if isinstance(summaries, dict) else summaries


def values(column: Column, summaries: Sequence[dict]) -> list[float]:
    return [value for value in map(column.value, summaries) if value is not None]


def cell(column: Column, summaries: Sequence[dict]) -> str:
    found = values(column, summaries)
    if not found:
        return "-"
    margin = f" ±{column.show(statistics.stdev(found))}" if column.is_score and len(found) > 1 else ""
    return column.show(statistics.fmean(found)) + margin


def table(arms: Arms):
    """The arms as a rich table that fits 80 columns; scores in percent."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    result.add_column("", no_wrap=True)
    for column in COLUMNS:
        result.add_column(column.title.replace(" ", "\n"), justify="right", vertical="bottom")
    for arm, summaries in arms.items():
        result.add_row(arm, *(cell(column, seeds_of(summaries)) for column in COLUMNS))
    return result


# --- the curves -----------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    steps: list[int]  # of both stages, one after the other
    values: list[float]


class Panel(NamedTuple):
    title: str
    kind: str  # of metrics.jsonl's records
    field: str
    scale: float = 1.0


class Ink(NamedTuple):
    """Colours of a picture: told apart by those who see colours otherwise, and on a light or a dark page."""

    page: str
    text: str
    line: str
    arms: dict[str, str]
    others: tuple[str, ...]


LIGHT = Ink(
    "#fdfdfc", "#1c1f23", "#dfe2e6",
    {"tfidf": "#7a7a7a", "scratch": "#d55e00", "random": "#b3589a", "tlm": "#0b63a5"},
    ("#0b63a5", "#d55e00", "#b3589a", "#1d7a43", "#7a7a7a"),
)  # fmt: skip
DARK = Ink(
    "#15181c", "#e4e7ea", "#30363d",
    {"tfidf": "#9a9a9a", "scratch": "#f08a4b", "random": "#dd8fc5", "tlm": "#6db3ee"},
    ("#6db3ee", "#f08a4b", "#dd8fc5", "#5fc98a", "#9a9a9a"),
)  # fmt: skip
DASHES = {"tfidf": ":", "scratch": "--", "random": "-.", "tlm": "-"}


def panels(metric: str) -> tuple[Panel, ...]:
    return (
        Panel("Masked-LM loss, joint stage", "train", "mlm_loss"),
        Panel("Task loss", "train", "task_loss"),
        Panel(f"Dev {metric.replace('_', '-')} (%)", "dev", metric, 100.0),
    )


def read_metrics(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; none where it has no such file (TF-IDF takes no steps)."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise InputError(f"{path}, line {number}: not JSON; remove the line, or run again") from None
    return records


def curve(records: Sequence[dict], panel: Panel) -> Curve:
    """A field over the steps; those of the second stage follow on the first's last."""
    joint_steps = max((r["step"] for r in records if r["stage"] == "joint"), default=0)
    points = [
        (r["step"] + (joint_steps if r["stage"] == "finetune" else 0), panel.scale * r[panel.field])
        for r in records
        if r["kind"] == panel.kind and r.get(panel.field) is not None
    ]
    return Curve([step for step, _ in points], [value for _, value in points])


def draw(axes, panel: Panel, records: Mapping[str, Sequence[list[dict]]], ink: Ink) -> None:
    """One panel: a line for each arm, thin ones where it has several seeds."""
    other = iter(ink.others * len(records))
    for arm, of_arm in records.items():
        colour = ink.arms.get(arm) or next(other)
        label = arm_title(arm)
        for run in of_arm:
            found = curve(run, panel)
            if not found.steps:
                continue
            marker = "o" if len(found.steps) == 1 else None
            width = 1.8 if len(of_arm) == 1 else 1.0
            axes.plot(*found, DASHES.get(arm, "-"), color=colour, linewidth=width, marker=marker, label=label)
            label = None
    ends = {max(r["step"] for r in run if r["stage"] == "joint") for of_arm in records.values() for run in of_arm
            if {"joint", "finetune"} <= {r["stage"] for r in run}}  # fmt: skip
    if len(ends) == 1 and panel.field != "mlm_loss":
        axes.axvline(ends.pop(), color=ink.line, linewidth=1, zorder=0)
    axes.set_title(panel.title, loc="left", fontsize=11, color=ink.text)
    axes.set_xlabel("optimizer steps", color=ink.text)
    axes.grid(axis="y", color=ink.line, linewidth=0.6)
    axes.set_facecolor(ink.page)
    axes.tick_params(colors=ink.text, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink.line)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=ink.text)


def picture(chosen: Sequence[Panel], records: Mapping[str, Sequence[list[dict]]], ink: Ink) -> bytes:
    """A PNG with the panels in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(chosen), 3.3), facecolor=ink.page, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        draw(axes, panel, records, ink)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, metadata={"Software": None})
    return out.getvalue()


def in_words(panel: Panel, records: Mapping[str, Sequence[list[dict]]]) -> str:
    """What a panel shows, for those who do not see it."""
    parts = []
    for arm, of_arm in records.items():
        curves = [found for found in (curve(run, panel) for run in of_arm) if found.steps]
        if curves:
            first, last, best = (
                statistics.fmean(pick(c.values) for c in curves)
                for pick in (lambda v: v[0], lambda v: v[-1], max if panel.kind == "dev" else min)
            )
            parts.append(f"{arm_title(arm)} from {first:.2f} to {last:.2f}, best {best:.2f}")
    return f"{panel.title} over the optimizer steps: {'; '.join(parts) or 'no values'}."


def plot_curves(runs: Runs, out: Path, metric: str = "accuracy") -> Path:
    """The curves of all arms as one PNG."""
    records = {arm: [read_metrics(run) for run in folders] for arm, folders in runs.items()}
    write_bytes(out, picture(panels(metric), records, LIGHT))
    return out


# --- the page -------------------------------------------------------------------------------------------------------


class Html(str):
    """Markup: goes into a page as it is."""


def element(tag: str, *children: str | None, **attributes: str | None) -> Html:
    """An element. Strings among the children, and all attributes, are escaped; `class_` is the attribute class."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = join(*children)
    return Html(f"<{tag}{named}>" if tag in ("img", "source") else f"<{tag}{named}>{inner}</{tag}>")


def join(*children: str | None) -> Html:
    return Html("".join(c if isinstance(c, Html) else html.escape(c, quote=False) for c in children if c is not None))


def write_report(
    folder: Path, runs: Runs, task: Task, *, title: str | None = None, facts: Mapping[str, str] | None = None
) -> Path:
    """Writes curves.png and report.html into `folder`; returns the page's path.

    `runs`: finished run folders by arm. `task`: what they were trained on, for the texts. `facts`: lines on the data
    and the machine for the foot of the page, by their name.
    """
    arms = {arm: [read_json(run / "summary.json") for run in of_arm] for arm, of_arm in runs.items()}
    metric = next(iter(arms.values()))[0]["metric"]
    plot_curves(runs, folder / "curves.png", metric)
    path = folder / "report.html"
    write_html(path, title or f"{task.name}: what each arm learnt", arms, runs, task, facts or {})
    return path


def write_html(
    path: Path, title: str, arms: Mapping[str, Sequence[dict]], runs: Runs, task: Task, facts: Mapping[str, str]
) -> None:
    metric = next(iter(arms.values()))[0]["metric"]
    body = join(
        element("h1", title),
        element("p", verdict(arms, metric, len(task.splits["test"])), class_="lead"),
        results_section(arms, metric),
        curves_section(runs, metric),
        retrieved_section(arms, task),
        predictions_section(runs, task),
        facts_section(facts),
    )
    template = string.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    write_text(path, template.substitute(title=html.escape(title), body=body))


def mean_score(summaries: Sequence[dict], metric: str) -> float:
    return statistics.fmean(summary["test"][metric] for summary in summaries)


def verdict(arms: Mapping[str, Sequence[dict]], metric: str, num_texts: int) -> str:
    """The result in a sentence or two, whoever wins."""
    scores = {arm: 100 * mean_score(summaries, metric) for arm, summaries in arms.items()}
    ranking = sorted(scores, key=lambda arm: -scores[arm])
    listed = ", ".join(f"{arm_title(arm)} {scores[arm]:.1f}" for arm in ranking)
    sentence = f"On {num_texts} test texts, {metric.replace('_', '-')} in percent: {listed}."
    if "tlm" not in scores or len(scores) < 2:
        return sentence
    gaps = [
        f"{abs(gap):.1f} points {'ahead of' if gap > 0 else 'behind'} {arm_title(arm)}" if abs(gap) >= 0.05
        else f"level with {arm_title(arm)}"
        for arm in scores
        if arm != "tlm" and math.isfinite(gap := scores["tlm"] - scores[arm])
    ]  # fmt: skip
    return f"{sentence} TLM is {', '.join(gaps[:-1])}{' and ' if gaps[:-1] else ''}{gaps[-1]}."


def section(title: str, note: str | None, *content: Html) -> Html:
    return element("section", element("h2", title), element("p", note, class_="soft") if note else None, *content)


def results_section(arms: Mapping[str, Sequence[dict]], metric: str) -> Html:
    shown = [[cell(column, summaries) for column in COLUMNS] for summaries in arms.values()]
    top = {
        column: max((statistics.fmean(found) for s in arms.values() if (found := values(column, s))), default=None)
        for column in COLUMNS
        if column.is_score
    }
    rows = []
    for (arm, summaries), texts in zip(arms.items(), shown, strict=True):
        cells = []
        for column, text in zip(COLUMNS, texts, strict=True):
            found = values(column, summaries)
            wins = found and column in top and statistics.fmean(found) == top[column]
            interval = summaries[0]["test"].get(f"{metric}_interval") if column.title == TEST_COLUMN[metric] else None
            low_high = f"{percent(interval[0])} to {percent(interval[1])}" if interval and len(summaries) == 1 else None
            cells.append(
                element("td", text, element("small", low_high) if low_high else None, class_="best" if wins else None)
            )
        rows.append(element("tr", element("th", arm_title(arm), scope="row"), *cells))
    heads = element("tr", element("th", "arm", scope="col"), *(element("th", c.title, scope="col") for c in COLUMNS))
    num_seeds = max(map(len, arms.values()))
    margins = f"mean and standard deviation of {num_seeds} seeds" if num_seeds > 1 else "with a 95% bootstrap interval"
    note = f"Scores in percent, {margins}. Tokens, FLOPs and seconds are all that an arm took, a run."
    whole_table = element("table", element("thead", heads), element("tbody", *rows))
    return section(
        "Results",
        note,
        element("div", whole_table, class_="scroll", tabindex="0", role="region", aria_label="Results of the arms"),
    )


def curves_section(runs: Runs, metric: str) -> Html:
    records = {arm: [read_metrics(run) for run in of_arm] for arm, of_arm in runs.items()}
    records = {arm: of_arm for arm, of_arm in records.items() if any(of_arm)}
    if not records:
        return Html("")
    figures = []
    for panel in panels(metric):
        light, dark = (data_url(picture([panel], records, ink)) for ink in (LIGHT, DARK))
        by_night = element("source", srcset=dark, media="(prefers-color-scheme: dark)")
        figures.append(element("picture", by_night, element("img", src=light, alt=in_words(panel, records))))
    note = "Steps of the joint stage, then those of finetuning, which begins at the upright line with a fresh head."
    return section("Learning", note, element("div", *figures, class_="figures"))


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def retrieved_section(arms: Mapping[str, Sequence[dict]], task: Task) -> Html:
    """Ten selected documents, each the best of its training text, beside that text."""
    selection = chosen_selection(arms)
    if selection is None:
        return Html("")
    analyzer = ANALYZERS[selection.manifest["options"]["analyzer"]]
    best: dict[str, dict] = {}
    held_by: Counter[str] = Counter()
    for number, record in enumerate(selection.records()):
        best.setdefault(record["query"], record)
        if number < COMPARED_DOCUMENTS:
            held_by.update(set(analyzer.terms(record["text"])))
    common = {term for term, count in held_by.items() if count > 0.05 * min(len(selection), COMPARED_DOCUMENTS)}

    items = []
    for example in spread([e for e in task.splits["train"] if e.id in best], SHOWN):
        record = best[example.id]
        shared = set(analyzer.terms(example.text)) & set(analyzer.terms(record["text"])) - common
        sides = (
            (f"training text {example.id}, labelled {example.label}", example.text),
            (f"{record['id']}, rank {record['rank']}, score {record['score']:.1f}", record["text"]),
        )
        cards = (card(head, marked(clip(text), shared, analyzer)) for head, text in sides)
        items.append(element("li", *cards, class_="pair"))
    terms = selection.manifest.get("terms", {})
    strongest = f" The words that add most to all scores: {', '.join(terms)}." if terms else ""
    note = (
        f"{len(items)} of the {len(selection):,} documents that the training texts fetched, each beside the text whose "
        f"best hit it is. Marked: words of both that are rare among the selected.{strongest}"
    )
    return section("Retrieved text", note, element("ol", *items, class_="cards"))


def card(head: str, text: str) -> Html:
    return element("div", element("h3", head), element("p", text, class_="text"))


def chosen_selection(arms: Mapping[str, Sequence[dict]]) -> Selection | None:
    """The selection of the last arm that searched for its documents and whose folder is still there."""
    for summaries in reversed(list(arms.values())):
        folder = Path((summaries[0].get("selection") or {}).get("folder") or "-")
        if (folder / "manifest.json").exists():
            selection = Selection(folder)
            if selection.manifest["options"]["selector"] != "random":
                return selection
    return None


def spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly over them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def clip(text: str, words: int = SHOWN_WORDS) -> str:
    """The first words of a text; line ends are kept."""
    pieces = text.split(" ")
    return text if len(pieces) <= words else " ".join(pieces[:words]) + " ..."


def marked(text: str, terms: set[str], analyzer) -> Html:
    """The text with the words among `terms` marked."""
    words = re.split(r"(\w+)", text)
    return join(*(w if terms.isdisjoint(analyzer.terms(w)) else element("mark", w) for w in words))


def predictions_section(runs: Runs, task: Task) -> Html:
    """Ten test predictions of the last arm, wrong ones and right ones, evenly over the test set."""
    arm, of_arm = list(runs.items())[-1]
    path = of_arm[0] / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    predictions = [json.loads(line) for line in lines]
    if not predictions:
        return Html("")
    texts = {example.id: example.text for example in task.splits["test"]}
    right = [p for p in predictions if p["label"] == p["prediction"]]
    wrong = [p for p in predictions if p["label"] != p["prediction"]]
    num_wrong = min(len(wrong), max(SHOWN // 2, SHOWN - len(right)))
    chosen = spread(wrong, num_wrong) + spread(right, SHOWN - num_wrong)
    items = []
    for p in chosen:
        is_right = p["label"] == p["prediction"]
        outcome = "right" if is_right else f"wrong: labelled {p['label']}"
        shares = sorted(p["probabilities"].items(), key=lambda item: -item[1])[:5]
        bars = [
            join(element("dt", label), element("dd", f"{100 * share:.0f}%", style=f"--share:{100 * share:.1f}%"))
            for label, share in shares
        ]
        said = element("p", f"{p['prediction']} ", element("span", outcome, class_="right" if is_right else "wrong"))
        text = card(p["id"], clip(p.get("text") or texts.get(p["id"], "")))
        items.append(
            element("li", text, element("div", said, element("dl", *bars, class_="shares")), class_="prediction")
        )
    note = (
        f"By {arm_title(arm)}: {num_wrong} of its {len(wrong)} wrong and {len(chosen) - num_wrong} of its {len(right)} "
        "right predictions, evenly over the test set. Bars: the model's probabilities."
    )
    return section("Test predictions", note, element("ol", *items, class_="cards"))


def facts_section(facts: Mapping[str, str]) -> Html:
    if not facts:
        return Html("")
    entries = [join(element("dt", name), element("dd", value)) for name, value in facts.items()]
    return section("How it was made", None, element("dl", *entries, class_="facts"))
