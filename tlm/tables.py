"""Scores and costs side by side: a table for the terminal, the same on a page, the result in a sentence.

An arm is one run, or several that differ in their seed alone: scores are then their mean and standard deviation.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tlm.page import Html, element, grid, section

Arms = Mapping[str, dict | Sequence[dict]]  # name -> a run's summary, or those of several seeds

TITLES = {
    "tfidf": "TF-IDF + logistic regression",
    "scratch": "task only",
    "random": "random documents",
    "tlm": "TLM",
    "tlm-dsir": "TLM by DSIR",
    "tlm-tfidf": "TLM by TF-IDF",
    "tlm-embedding": "TLM by embeddings",
}


def arm_title(arm: str) -> str:
    return TITLES.get(arm, arm)


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
    Column("test accuracy", lambda s: (s["test"] or {}).get("accuracy"), percent, True),
    Column("test macro-F1", lambda s: (s["test"] or {}).get("macro_f1"), percent, True),
    Column("dev accuracy", lambda s: (s["dev"] or {}).get("accuracy"), percent, True),
    Column("dev macro-F1", lambda s: (s["dev"] or {}).get("macro_f1"), percent, True),
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


def results_section(arms: Mapping[str, Sequence[dict]], metric: str, title: str = "Results", kind: str = "arm") -> Html:
    """The table on a page, the best mean of each score marked. `kind`: what a row is."""
    top = {
        column: max((statistics.fmean(found) for s in arms.values() if (found := values(column, s))), default=None)
        for column in COLUMNS
        if column.is_score
    }
    rows = []
    for arm, summaries in arms.items():
        cells = []
        for column in COLUMNS:
            found = values(column, summaries)
            wins = len(arms) > 1 and found and column in top and statistics.fmean(found) == top[column]
            tested = summaries[0]["test"] if column.title == TEST_COLUMN.get(metric) else None
            interval = (tested or {}).get(f"{metric}_interval")
            low_high = f"{percent(interval[0])} to {percent(interval[1])}" if interval and len(summaries) == 1 else None
            small = element("small", low_high) if low_high else None
            cells.append(element("td", cell(column, summaries), small, class_="best" if wins else None))
        rows.append([arm_title(arm), *cells])
    margins = " or ".join(
        f"mean and standard deviation of {num_seeds} seeds" if num_seeds > 1 else "with a 95% bootstrap interval"
        for num_seeds in sorted(set(map(len, arms.values())))
    )
    note = f"Scores in percent, {margins}. Tokens, FLOPs and seconds are all that a run took."
    return section(title, note, grid(f"{title} of each {kind}", [kind, *(c.title for c in COLUMNS)], rows))


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
