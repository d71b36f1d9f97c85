"""The report of a comparison: one page that needs no network, its Markdown twin, its plots as PNGs, and a short table.

What is said is put together once, as sections of paragraphs, tables, pictures and examples; page and twin are two ways
to write them down.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from tasks.metrics import calibration_error
from tlm.compare import PRETRAINED, Study
from tlm.curves import DARK, LIGHT, Ink, Picture, cost_picture, dress, render, styles
from tlm.page import Html, element, grid, section, write_page
from tlm.report import clip, origin
from tlm.run import write_bytes, write_json, write_text
from tlm.statistics import (
    LEVEL,
    SMALLEST_SEEDS,
    Answers,
    Difference,
    differences,
    interval,
    mean_score,
    mean_sd,
    reliability,
)
from tlm.tables import arm_title, percent, scientific, short, whole
from tlm.versus import Decision, Point, Result, collect, decide, flops_to, mean_cost, mean_curve, read_answers

SHOWN = 2  # examples an arm and task
AT_MOST_LABELS = 20  # in the table of scores by label
NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Table:
    label: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Example:
    head: str
    text: str


@dataclass(frozen=True)
class Section:
    title: str
    note: str | None
    parts: Sequence["str | Table | Picture | Example"]


@dataclass(frozen=True)
class Findings:
    """All that the report tells. `answers`: task -> arm -> what it answered on test, with its probabilities."""

    study: Study
    results: Sequence[Result]
    answers: Mapping[str, Mapping[str, tuple[Answers, np.ndarray]]]
    differences: Sequence[Difference]
    intervals: Mapping[str, tuple[float, float]]
    decisions: Sequence[Decision]

    @property
    def complete(self) -> list[str]:
        """The arms that have finished at least one run on every task: those that are compared over all of them."""
        return list(self.intervals)

    def of(self, arm: str) -> list[Result]:
        return [r for r in self.results if r.arm.name == arm and r.summaries]

    def pair(self, first: str, second: str) -> Difference | None:
        """The first less the second, whichever way round they stand."""
        for d in self.differences:
            if (d.first, d.second) == (first, second):
                return d
            if (d.second, d.first) == (first, second):
                return Difference(first, second, -d.difference, -d.high, -d.low, d.p, d.corrected)
        return None


def report(study: Study) -> Path:
    """Writes report.html, report.md, summary.json and the plots into OUT; prints a table and the page's path."""
    from rich.console import Console

    found = findings(study)
    sections = [part for part in sections_of(found) if part.parts or part.note]
    out = study.folder / "report.html"
    for picture in (p for s in sections for p in s.parts if isinstance(p, Picture)):
        write_bytes(study.folder / "plots" / f"{picture.slug}.png", picture.light)
    title = f"Arms compared on {', '.join(study.tasks)}"
    write_page(out, title, *map(as_html, sections))
    write_text(out.with_suffix(".md"), "\n\n".join([f"# {title}", *map(as_markdown, sections)]) + "\n")
    write_json(study.folder / "summary.json", as_json(found))
    console = Console()
    console.print(terminal_table(found))
    for part in sections[0].parts:
        console.print(part, highlight=False)
    console.print(f"Report: {out}", soft_wrap=True)
    return out


def findings(study: Study) -> Findings:
    results = collect(study)
    answers: dict[str, dict[str, tuple[Answers, np.ndarray]]] = {task: {} for task in study.tasks}
    for r in results:
        if r.summaries:
            answers[r.task][r.arm.name] = read_answers(r, study.open(r.task).labels)
    complete = [arm.name for arm in study.arms if all(arm.name in of_task for of_task in answers.values())]
    judged = {task: {arm: of_task[arm][0] for arm in complete} for task, of_task in answers.items()}
    rivals = {r.task: r for kind in reversed(PRETRAINED) for r in results if r.arm.kind == kind and r.curve}
    methods = [r for r in results if r.arm.kind in ("tlm", "scratch") and r.curve and r.task in rivals]
    return Findings(
        study,
        results,
        answers,
        differences(judged) if complete else [],
        interval(judged) if complete else {},
        [decide(r, rivals[r.task]) for r in methods],
    )


# --- what is told ---------------------------------------------------------------------------------------------------


def sections_of(found: Findings) -> list[Section]:
    return [
        Section("Verdict", None, verdict(found)),
        Section("What failed", None, failures(found)),
        curves_section(found),
        scores_section(found),
        decisions_section(found),
        cost_section(found),
        pairs_section(found),
        ablations_section(found),
        tuning_section(found),
        labels_section(found),
        calibration_section(found),
        sources_section(found),
        examples_section(found),
        commands_section(found),
    ]


def name(arm: str) -> str:
    """As the report calls an arm."""
    return {"pt-ft": "pretrain-then-finetune"}.get(arm, arm_title(arm))


def points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def verdict(found: Findings) -> list[str]:
    arms = found.complete
    if not arms:
        return ["No arm has finished a run on every task yet."]
    method = next(a for a in ("tlm", *arms) if a in arms)
    rivals = sorted((a for a in arms if a != method), key=lambda a: a != "pt-ft")
    told = [sentence(found.pair(method, rival), found) for rival in rivals]
    if not told:
        low, high = found.intervals[method]
        told.append(
            f"{name(method)} is alone, so there is nothing to compare: {percent(low)} to {percent(high)} is the 95% "
            f"interval of its test score{over_tasks(found)}."
        )
    ratios = [d for d in found.decisions if d.arm == method]
    if ratios:
        told.insert(min(1, len(told)), ratio_sentence(ratios))
    seeds = [len(r.summaries) for r in found.results if r.arm.name in arms and r.arm.kind != "tfidf"]
    fewest = min(seeds, default=SMALLEST_SEEDS)
    if fewest < SMALLEST_SEEDS:
        told.append(
            f"With {fewest} seed{'s' * (fewest > 1)} an arm all this is a first look: it takes {SMALLEST_SEEDS}."
        )
    return told


def sentence(d: Difference, found: Findings) -> str:
    gap = (
        f"{points(d.difference)} points of test score{over_tasks(found)}, 95% interval {points(d.low)} to "
        f"{points(d.high)}, "
        f"{p_value(d.corrected)} corrected for {len(found.differences)} comparison{'s' * (len(found.differences) > 1)}"
    )
    if d.verdict == "not told apart":
        return f"{name(d.first)} and {name(d.second)} are not told apart ({gap})."
    return f"{name(d.first)} is {d.verdict} than {name(d.second)} ({gap})."


def over_tasks(found: Findings) -> str:
    return f" on average over {len(found.study.tasks)} tasks" if len(found.study.tasks) > 1 else ""


def ratio_sentence(decisions: Sequence[Decision]) -> str:
    """FLOPs until the rival's dev score, over the tasks; and how much of the rival's own that score had needed."""
    reached = [d for d in decisions if d.ratio]
    rival, of = name(decisions[0].rival), f" on {len(reached)} of {len(decisions)} tasks" if len(decisions) > 1 else ""
    if not reached:
        return f"{name(decisions[0].arm)} never reached the dev score of {rival}."
    many = " (geometric mean)" if len(reached) > 1 else ""
    told = (
        f"{name(decisions[0].arm)} reached the last dev score of {rival}{of} with "
        f"{share([d.ratio for d in reached])} the FLOPs{many}."
    )
    if all(d.rival_flat == d.rival_flops for d in reached):
        return told
    return (
        f"{told} Of its own checkpoints {rival} had that score, within a standard deviation over seeds, from "
        f"{share([d.rival_flops / d.rival_flat for d in reached])} its FLOPs on, or from fewer, if the first was that "
        f"good; {name(decisions[0].arm)} took {share([d.rival_flat / d.to_rival for d in reached])} these."
    )


def share(times: Sequence[float]) -> str:
    mean = geometric(times)
    return f"1/{mean:,.3g} of" if mean >= 1 else f"{1 / mean:,.3g} times"


def geometric(numbers: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, numbers)))


def failures(found: Findings) -> list[str]:
    study = found.study
    told = [f"{why}" for why in study.failed.values()]
    for r in found.results:
        seeds = 1 if r.arm.kind == "tfidf" else study.config.seeds
        if len(r.summaries) < seeds:
            told.append(
                f"{r.arm.name} on {r.task}: {len(r.summaries)} of {seeds} runs have finished; the others are kept."
            )
    return told


def curves_section(found: Findings) -> Section:
    by_task = {task: [r for r in found.results if r.task == task and r.summaries] for task in found.study.tasks}
    pictures = []
    if len(by_task) > 1 and found.complete:
        curves = {a: mean_curve([r.curve for r in found.of(a)]) for a in found.complete if found.of(a)[0].curve}
        flat = {a: fmean(fmean(r.scores("dev")) for r in found.of(a)) for a in found.complete if a not in curves}
        pictures.append(curve_picture("Dev score against FLOPs, mean over the tasks", curves, flat, "dev score (%)"))
    for task, of_task in by_task.items():
        curves = {r.arm.name: r.curve for r in of_task if r.curve}
        flat = {r.arm.name: fmean(r.scores("dev")) for r in of_task if not r.curve}
        if curves:
            label = f"dev {of_task[0].metric.replace('_', '-')} (%)"
            pictures.append(curve_picture(f"Dev score against FLOPs, {task}", curves, flat, label))
    note = (
        "FLOPs of a run and of the pretraining that it stands on, tuning left out. TLM and the task alone: the best "
        "dev score so far along the run. Pretrain-then-finetune: a point for each checkpoint of the pretraining. "
        "Bands: one standard deviation over seeds. The arrow: from TLM's last point to where pretrain-then-finetune "
        "has its score. Test is read by the last runs alone, hence dev scores here."
    )
    return Section("Score against FLOPs", note, pictures)


def curve_picture(title: str, curves: Mapping[str, Sequence[Point]], flat: Mapping[str, float], label: str) -> Picture:
    drawing = partial(draw_curves, title=title, curves=curves, flat=flat, label=label)
    told = [
        f"{name(arm)} from {percent(curve[0].score)} at {scientific(curve[0].flops)} to {percent(curve[-1].score)} at "
        f"{scientific(curve[-1].flops)} FLOPs"
        for arm, curve in curves.items()
    ]
    told += [f"{name(arm)} {percent(score)}, not counted in FLOPs" for arm, score in flat.items()]
    light, dark = (render([drawing], ink, width=7.2, height=4.4) for ink in (LIGHT, DARK))
    return Picture(title, light, dark, f"{title}: {'; '.join(told)}.")


def draw_curves(axes, ink: Ink, title: str, curves: Mapping, flat: Mapping, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    names = [*curves, *flat]
    looks = dict(zip(names, styles(names, ink), strict=True))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(lambda value, _: scientific(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for arm, curve in curves.items():
        (dash, colour), curve = looks[arm], [p for p in curve if p.flops > 0]
        x, y, s = (np.array([getattr(p, n) for p in curve]) for n in ("flops", "score", "spread"))
        axes.plot(x, 100 * y, dash, color=colour, linewidth=1.8, marker="o", markersize=3, label=name(arm))
        axes.fill_between(x, 100 * (y - s), 100 * (y + s), color=colour, alpha=0.15, linewidth=0)
    for arm, score in flat.items():
        axes.axhline(100 * score, linestyle=looks[arm][0], color=looks[arm][1], linewidth=1.4, label=name(arm))
    if curves.get("tlm") and curves.get("pt-ft"):
        arrow(axes, ink, curves["tlm"][-1], curves["pt-ft"])
    axes.set_xlabel("FLOPs, pretraining included", color=ink.text)
    axes.set_ylabel(label, color=ink.text)
    axes.grid(axis="y", color=ink.line, linewidth=0.6)
    dress(axes, ink, title, legend_size=8)


def arrow(axes, ink: Ink, end: Point, rival: Sequence[Point]) -> None:
    """From an arm's last point to where the rival has its score, or to the rival's end if it never has."""
    there = flops_to(rival, end.score)
    to, words = (there or rival[-1].flops), "x the FLOPs" if there else "x the FLOPs and not there"
    y = 100 * end.score
    axes.annotate("", (to, y), (end.flops, y), arrowprops={"arrowstyle": "->", "color": ink.text, "linewidth": 1.2})
    middle = math.sqrt(to * end.flops)
    axes.annotate(f"{to / end.flops:.3g}{words}", (middle, y), (0, 4), textcoords="offset points", ha="center",
                  fontsize=8, color=ink.text)  # fmt: skip


def scores_section(found: Findings) -> Section:
    tasks, rows = list(found.study.tasks), []
    by = {(r.arm.name, r.task): r for r in found.results if r.summaries}
    judged = {task: {a: x[0] for a, x in of_task.items()} for task, of_task in found.answers.items()}
    for arm in (arm.name for arm in found.study.arms):
        cells = [spread(by[arm, task].scores()) if (arm, task) in by else "-" for task in tasks]
        if arm in found.complete:
            low, high = found.intervals[arm]
            errors = [calibration_error(a.gold, p) for t in tasks for a, x in [found.answers[t][arm]] for p in x]
            cells += [percent(mean_score(judged, arm)), f"{percent(low)} to {percent(high)}", percent(fmean(errors))]
        else:
            cells += ["-"] * 3
        rows.append([name(arm), *cells])
    metrics = ", ".join(dict.fromkeys(found.study.open(task).metric.replace("_", "-") for task in tasks))
    note = (
        f"Test, in percent ({metrics}): mean and standard deviation over seeds; the mean over tasks with its 95% "
        "interval by bootstrap over examples and seeds; calibration error over 10 bins of equal count."
    )
    heads = ["arm", *tasks, "mean", "95% interval", "calibration error"]
    return Section("Scores", note, [Table("Scores on test", heads, rows)])


def spread(values: Sequence[float]) -> str:
    mean, sd = mean_sd(values)
    return percent(mean) + (f" ±{percent(sd)}" if sd is not None else "")


def decisions_section(found: Findings) -> Section:
    rows = [
        [
            f"{name(d.arm)}, {d.task}",
            scientific(d.flops),
            scientific(d.to_rival) if d.to_rival else NOT_REACHED,
            f"{d.ratio:,.3g}" if d.ratio else "-",
            percent(d.score),
            percent(d.rival_at_equal) if d.rival_at_equal is not None else "-",
            percent(d.rival_score),
            scientific(d.rival_to_arm) if d.rival_to_arm else NOT_REACHED,
            tasks_number(d.break_even),
            tasks_number(d.break_even_tuned),
        ]
        for d in found.decisions
    ]
    heads = [
        "arm and task", "FLOPs of a run", "FLOPs to the rival's score", "ratio", "dev score",
        "the rival's at equal FLOPs", "the rival's at its end", "its FLOPs to the arm's score", "break-even, tasks",
        "with tuning",
    ]  # fmt: skip
    rival = name(found.decisions[0].rival) if found.decisions else ""
    note = (
        f"The rival is {rival}. The ratio is its FLOPs over those of the arm until the rival's last dev score. Equal "
        "FLOPs: read off its curve, - where that does not reach so far. Break-even: the number of tasks from which on "
        "pretraining once for all of them takes fewer FLOPs than the arm for each; never, where finetuning alone "
        "takes more than the arm."
    )
    return Section("What to decide by", note, [Table("Figures to decide by", heads, rows)]) if rows else NOTHING


NOTHING = Section("", None, [])


def tasks_number(tasks: float) -> str:
    return "never" if math.isinf(tasks) else f"{tasks:,.3g}"


def cost_section(found: Findings) -> Section:
    rows, phases = [], {}
    for arm in (arm.name for arm in found.study.arms):
        results = found.of(arm)
        if not results:
            continue
        own = mean_cost([r.own for r in results])
        shared = mean_cost([r.shared for r in results])
        phases[name(arm)] = own["seconds"]
        rows.append([
            name(arm), scientific(own["flops"]), scientific(shared["flops"]),
            scientific(own["flops"] + shared["flops"]), scientific(own["flops_paper"] + shared["flops_paper"]),
            scientific(fmean(r.tuning["flops"] for r in results)),
            short(own["tokens"]), whole(sum(own["seconds"].values())), whole(sum(shared["seconds"].values())),
            f"{max(cost['peak_rss_bytes'] for cost in (own, shared)) / 2**30:.1f}",
            short(own["energy_joules"] + shared["energy_joules"]), f"{own['money'] + shared['money']:.2f}",
        ])  # fmt: skip
    estimated = any(r.own["energy_is_estimated"] for r in found.results if r.summaries)
    heads = [
        "arm", "FLOPs", "shared FLOPs", "FLOPs with shared", "these by 6ND", "tuning, FLOPs a task", "tokens",
        "seconds", "shared seconds", "GiB", f"joules{', estimated' if estimated else ''}", "money",
    ]  # fmt: skip
    note = (
        "A run, mean over tasks and seeds; shared is what the pretraining took up to the last checkpoint, once for "
        "all tasks and seeds. FLOPs are exact counts of matrix products; 6ND is the paper's rule, of the joint stage "
        f"alone. Joules and money hold the shared part; energy is {'estimated' if estimated else 'read'}."
    )
    pictures = [cost_picture("Seconds of a run by phase", phases)] if phases else []
    return Section("Cost", note, [Table("Cost", heads, rows), *pictures])


def pairs_section(found: Findings) -> Section:
    rows = [
        [f"{name(d.first)} and {name(d.second)}", points(d.difference), f"{points(d.low)} to {points(d.high)}",
         f"{d.p:.4f}", f"{d.corrected:.4f}", d.verdict]
        for d in found.differences
    ]  # fmt: skip
    note = (
        "The first arm less the second, in points of test score: paired bootstrap over test examples and seeds, "
        f"two-sided; corrected by Holm for {len(rows)} comparisons. Better or worse: the corrected p is below {LEVEL}."
    )
    heads = ["pair", "difference", "95% interval", "p", "corrected p", "verdict"]
    return Section("Every pair", note, [Table("Every pair of arms", heads, rows)]) if rows else NOTHING


def ablations_section(found: Findings) -> Section:
    changed = [arm for arm in found.complete if arm.startswith("tlm:")]
    pairs = [found.pair(arm, "tlm") for arm in changed] if "tlm" in found.complete else []
    rows = [
        [d.first.removeprefix("tlm:"), points(d.difference), f"{points(d.low)} to {points(d.high)}", d.verdict]
        for d in pairs
    ]
    note = "TLM with one thing changed, less TLM, in points of test score."
    heads = ["changed", "difference", "95% interval", "verdict"]
    return Section("Ablations", note, [Table("Ablations", heads, rows)]) if rows else NOTHING


def tuning_section(found: Findings) -> Section:
    rows = [
        [f"{name(r.arm.name)}, {r.task}", " ".join(r.chosen) or "the recipe's own", scientific(r.tuning["flops"])]
        for r in found.results
        if r.chosen is not None and r.arm.kind != "tfidf"
    ]
    tries = found.study.config.tries
    note = f"By successive halving on dev over at most {tries} settings of each arm; TF-IDF searches its own 12."
    return (
        Section("Tuning", note, [Table("Settings chosen", ["arm and task", "chosen", "FLOPs"], rows)])
        if rows
        else NOTHING
    )


def labels_section(found: Findings) -> Section:
    """F1 of each label, the mean over seeds."""
    tables = []
    for task, of_task in found.answers.items():
        labels = found.study.open(task).labels
        if not of_task or len(labels) > AT_MOST_LABELS:
            continue
        gold = next(iter(of_task.values()))[0].gold
        rows = [
            [label, whole((gold == i).sum()), *(percent(label_f1(answers, i)) for answers, _ in of_task.values())]
            for i, label in enumerate(labels)
        ]
        tables.append(Table(f"F1 by label, {task}", [f"{task}: label", "texts", *map(name, of_task)], rows))
    return Section("Scores by label", "F1 on test in percent, mean over seeds.", tables) if tables else NOTHING


def label_f1(answers: Answers, label: int) -> float:
    """0 where the label is neither stated nor said."""
    is_gold, said = answers.gold == label, answers.predicted == label
    stated = is_gold.sum() + said.sum(1)
    return float(np.mean(2 * (said & is_gold).sum(1) / np.maximum(stated, 1)))


def calibration_section(found: Findings) -> Section:
    """A reliability plot an arm: bins of all its seeds and tasks together."""
    pictures = []
    for arm in found.complete:
        gold = np.concatenate([np.tile(a.gold, len(x)) for t in found.answers.values() for a, x in [t[arm]]])
        top = [(x.max(2).ravel(), x.argmax(2).ravel()) for t in found.answers.values() for _, x in [t[arm]]]
        sure, said = (np.concatenate(parts) for parts in zip(*top, strict=True))
        bins = reliability_of(sure, said == gold)
        title = f"Reliability of {name(arm)}"
        drawing = partial(draw_reliability, title=title, bins=bins)
        words = "; ".join(f"{percent(c)} sure, {percent(a)} right" for c, a, _ in bins)
        light, dark = (render([drawing], ink, width=3.6, height=3.4) for ink in (LIGHT, DARK))
        pictures.append(Picture(title, light, dark, f"{title}, by tenths of the texts from the least sure: {words}."))
    note = "How often an arm is right where it is as sure as this; ten bins of equal count, all seeds and tasks."
    return Section("Calibration", note, pictures) if pictures else NOTHING


def reliability_of(sure: np.ndarray, right: np.ndarray) -> list[tuple[float, float, int]]:
    """`reliability` where label numbers of several tasks would mean different things."""
    return reliability(np.where(right, 0, 1), np.stack([sure, np.full_like(sure, -1.0)], 1))


def draw_reliability(axes, ink: Ink, title: str, bins: Sequence) -> None:
    x, y = ([100 * b[i] for b in bins] for i in (0, 1))
    axes.plot([0, 100], [0, 100], color=ink.line, linewidth=1)
    axes.plot(x, y, "-o", color=ink.others[0], linewidth=1.6, markersize=4)
    axes.set(xlim=(0, 101), ylim=(0, 101))
    axes.set_xlabel("sure (%)", color=ink.text)
    axes.set_ylabel("right (%)", color=ink.text)
    dress(axes, ink, title, legend_size=8)


def sources_section(found: Findings) -> Section:
    rows = []
    for r in found.results:
        selection = (r.summaries[0].get("selection") if r.summaries else None) or {}
        if not selection.get("by_source"):
            continue
        total, kl = selection["documents"], selection.get("kl")
        largest = list(selection["by_source"].items())[:5]
        shares = ", ".join(f"{source} {percent(n['documents'] / total)}" for source, n in largest)
        nearer = f"{kl['reduction']:.3f}" if kl else "-"
        rows.append([f"{name(r.arm.name)}, {r.task}", whole(total), whole(selection["words"]), nearer, shares])
    note = (
        "Documents that were selected; by how many nats they are nearer to the task's texts than as many random words "
        "are (KL divergence of hashed n-grams, Xie et al. 2023); and the share of the largest sources among them, in "
        "percent (seed 0)."
    )
    heads = ["arm and task", "documents", "words", "KL reduction", "sources"]
    return Section("Where the selected text came from", note, [Table("Sources", heads, rows)]) if rows else NOTHING


def examples_section(found: Findings) -> Section:
    """Test texts that most seeds of one arm get right, and of no other arm."""
    parts, counted = [], []
    for task, of_task in found.answers.items():
        if len(of_task) < 2:
            continue
        texts = found.study.open(task).splits["test"]
        right = {arm: (a.predicted == a.gold).mean(0) > 0.5 for arm, (a, _) in of_task.items()}
        for arm in right:
            others = np.any([r for other, r in right.items() if other != arm], axis=0)
            alone = np.flatnonzero(right[arm] & ~others)
            counted.append(f"{name(arm)} {len(alone)} of {len(texts)} on {task}")
            for i in alone[:SHOWN]:
                head = f"{task}, {texts[i].id}, labelled {texts[i].label}: only {name(arm)}"
                parts.append(Example(head, clip(texts[i].text)))
    note = f"Right in most seeds of one arm, and of no other: {'; '.join(counted)}. The first {SHOWN} of each."
    return Section("What only one arm gets right", note, parts) if counted else NOTHING


def commands_section(found: Findings) -> Section:
    """The command of the comparison, and that of each run that read test."""
    config, study = found.study.config, found.study
    rows = [["all of it", as_command(config)]]
    rows += [[folder.name, origin(folder)] for r in found.results for folder in r.folders]
    note = f"Runs lie in {study.folder}; each folder holds its configuration, inputs with sha256, and predictions."
    return Section("Commands", note, [Table("Commands", ["run", "command"], rows)])


def as_command(config) -> str:
    """`tlm compare` with all that differs from the defaults."""
    default, said = type(config)(), []
    for key, value in asdict(config).items():
        if value != getattr(default, key):
            said.append(f"{key}={'[' + ','.join(map(str, value)) + ']' if isinstance(value, list) else value}")
    return shlex.join(["tlm", "compare", *said])


# --- written down ---------------------------------------------------------------------------------------------------


def as_html(part: Section) -> Html:
    lead = part.title == "Verdict"
    shown, pictures = [], []
    for item in part.parts:
        if isinstance(item, Picture):
            pictures.append(item.element())
        elif isinstance(item, Table):
            words = [all(cell[:1].isalpha() for cell in column) for column in zip(*item.rows, strict=True)]
            cells = [[as_cell(*pair) for pair in zip(row[1:], words[1:], strict=True)] for row in item.rows]
            rows = [[row[0], *rest] for row, rest in zip(item.rows, cells, strict=True)]
            shown.append(grid(item.label, item.heads, rows))
        elif isinstance(item, Example):
            card = element("div", element("h3", item.head), element("p", item.text, class_="text"))
            shown.append(element("div", card, class_="prediction"))
        else:
            shown.append(element("p", item, class_="lead" if lead else None))
            lead = False
    if pictures:
        shown.insert(0, element("div", *pictures, class_="figures" if len(pictures) > 2 else "figures large"))
    return section(part.title, part.note, *shown)


def as_cell(cell: str, words: bool) -> Html:
    """Columns of words begin at the left and may be broken; figures do neither."""
    return element("td", cell, class_="words" if words else None)


def as_markdown(part: Section) -> str:
    lines = [f"## {part.title}", *([part.note] if part.note else [])]
    for item in part.parts:
        if isinstance(item, Picture):
            lines.append(f"![{item.words}](plots/{item.slug}.png)")
        elif isinstance(item, Table):
            rows = [item.heads, ["---"] * len(item.heads), *item.rows]
            lines.append(
                "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
            )
        elif isinstance(item, Example):
            lines.append(f"- **{item.head}**: {' '.join(item.text.split())}")
        else:
            lines.append(item)
    return "\n\n".join(lines)


def as_json(found: Findings) -> dict:
    """summary.json: per task the arms' summaries, and every figure of the report."""
    return {
        "command": as_command(found.study.config),
        "tasks": {
            task: {
                r.arm.name: {
                    "runs": [str(folder) for folder in r.folders],
                    "test": [s["test"] for s in r.summaries],
                    "dev": [s["dev"] for s in r.summaries],
                    "chosen": r.chosen,
                    "cost": {"own": r.own, "shared": r.shared, "tuning": r.tuning},
                    "curve": [p._asdict() for p in r.curve],
                }
                for r in found.results
                if r.task == task
            }
            for task in found.study.tasks
        },
        "differences": [asdict(d) | {"verdict": d.verdict} for d in found.differences],
        "decisions": [
            {key: None if isinstance(v, float) and math.isinf(v) else v for key, v in asdict(d).items()}
            for d in found.decisions
        ],
        "failed": {str(folder): why for folder, why in found.study.failed.items()},
    }


def terminal_table(found: Findings):
    """Arms by test score on each task and by FLOPs."""
    from rich.table import Table as Rich

    tasks = list(found.study.tasks)
    table = Rich(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for title in (*tasks, *(["mean"] if len(tasks) > 1 else [])):
        table.add_column(title, justify="right", vertical="bottom")
    for title in ("FLOPs", "shared", "tuning", "seconds"):
        table.add_column(title, justify="right", vertical="bottom", no_wrap=True)  # a narrow terminal cuts no figure
    by = {(r.arm.name, r.task): r for r in found.results if r.summaries}
    for arm in (arm.name for arm in found.study.arms):
        results = found.of(arm)
        cells = [spread(by[arm, task].scores()) if (arm, task) in by else "-" for task in tasks]
        if len(tasks) > 1:
            cells.append(percent(fmean(fmean(r.scores()) for r in results)) if len(results) == len(tasks) else "-")
        if results:
            cells += [scientific(fmean(r.own["flops"] for r in results)), scientific(results[0].shared["flops"])]
            cells += [scientific(fmean(r.tuning["flops"] for r in results))]
            cells += [whole(fmean(sum(r.own["seconds"].values()) for r in results))]
        table.add_row(arm, *cells, *["-"] * (len(table.columns) - 1 - len(cells)))
    return table
