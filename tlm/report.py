"""Pages: `tlm report` on any runs, finished or not; and the demo's on its arms, with texts and predictions."""

import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from retrieval.analyze import ANALYZERS
from retrieval.folders import holds
from retrieval.select import Selection
from tasks.errors import InputError
from tasks.types import Task
from tlm.config import NOT_THE_RESULT, ReportConfig, read_yaml
from tlm.curves import (
    SPEED,
    STEPS,
    TOTAL,
    Picture,
    cost_picture,
    panel_picture,
    panels,
    phase_title,
    plot_curves,
    read_metrics,
    spikes,
)
from tlm.page import Html, element, grid, join, section, write_page
from tlm.run import read_json, write_bytes
from tlm.selections import selection_section
from tlm.tables import arm_title, results_section, scientific, short, verdict, whole

Runs = Mapping[str, Sequence[Path]]  # name -> run folders, one a seed

SHOWN = 10  # retrieved documents, predictions
SHOWN_WORDS = 70  # of each text
SHOWN_SPIKES = 100
COMPARED_DOCUMENTS = 1_000  # a shared word is marked if few of these hold it
LEARNING_NOTE = "Steps of the joint stage, then those of finetuning, which begins at the upright line."


# --- any runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFiles:
    """What a run folder tells, whether the run has finished or not."""

    folder: Path
    config: dict
    summary: dict | None  # of a finished run
    records: list[dict]

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @property
    def metric(self) -> str:
        """Of an unfinished run the one that was asked for; where its task's card names one, macro-F1 stands in."""
        return self.summary["metric"] if self.summary else (self.config.get("data") or {}).get("metric") or "macro_f1"

    def last(self, field: str) -> float:
        """The field's last value in metrics.jsonl; 0 without one."""
        return next((r[field] for r in reversed(self.records) if r.get(field) is not None), 0)


def report(folders: Sequence[str], config: ReportConfig) -> int:
    """`tlm report`: writes the page, and its pictures as PNGs into a folder of the page's name; prints the path."""
    out = Path(config.out)
    if out.suffix != ".html":
        raise InputError(f"out={out}: must be the name of a page, such as report.html")
    chosen = [Path(folder) for folder in folders if holds(Path(folder), "selection")]
    others = [Path(folder) for folder in folders if Path(folder) not in chosen]
    found = dict.fromkeys(run.resolve() for folder in others for run in find_runs(folder))
    selections = {folder.name: Selection(folder).manifest for folder in chosen}
    print(write_runs_report(out, by_name([read_run(folder) for folder in found]), selections))
    return 0


def find_runs(folder: Path) -> list[Path]:
    """The run folders that `folder` is or holds. Raises InputError if there are none."""
    if (folder / "config.yaml").exists():
        return [folder]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run; name the folder of a run, such as runs/NAME")
    inside = [path.parent for path in folder.glob("*/config.yaml")]
    if not inside:
        raise InputError(
            f"{folder}: holds no run (no config.yaml) and is no selection; name the folder of a run, or of several"
        )
    return sorted(inside, key=lambda run: [p.zfill(9) if p.isdigit() else p for p in re.split(r"(\d+)", run.name)])


def read_run(folder: Path) -> RunFiles:
    """Raises InputError if a file is damaged."""
    path, config = folder / "summary.json", read_yaml(folder / "config.yaml")
    return RunFiles(folder, config, read_json(path) if path.exists() else None, read_metrics(folder))


def by_name(runs: Sequence[RunFiles]) -> dict[str, list[RunFiles]]:
    """Runs NAME-SEED whose configurations differ in the seed alone become one NAME; the others keep their own."""
    alike: dict[tuple[str, str], list[RunFiles]] = {}
    for run in runs:
        rest = {key: value for key, value in run.config.items() if key not in (*NOT_THE_RESULT, "seed")}
        stem = run.folder.name.removesuffix(f"-{run.seed}")
        alike.setdefault((stem, json.dumps(rest, sort_keys=True, default=str)), []).append(run)
    named: dict[str, list[RunFiles]] = {}
    for (stem, _), group in alike.items():
        is_one = len({run.seed for run in group}) == len(group) > 1
        for name, members in [(stem, group)] if is_one else [(run.folder.name, [run]) for run in group]:
            folder = members[0].folder
            names = (name, f"{folder.parent.name}/{name}", str(folder))
            named[next(n for n in names if n not in named)] = members
    return named


def write_runs_report(
    out: Path, runs: Mapping[str, Sequence[RunFiles]], selections: Mapping[str, dict] | None = None
) -> Path:
    """Writes the page `out`, and its pictures beside it; returns the page's path. `selections`: manifests by name."""
    everyone = [run for group in runs.values() for run in group]
    records = {name: [run.records for run in group] for name, group in runs.items()}
    finished = {name: done for name, group in runs.items() if (done := [r.summary for r in group if r.summary])}
    mlm, task, dev = panels(next((run.metric for run in sorted(everyone, key=lambda run: run.summary is None)), ""))
    learning, steps, speed = (
        [panel_picture(panel, records) for panel in chosen if any(map(any, records.values()))]
        for chosen in ((mlm, task, TOTAL, dev), STEPS, SPEED)
    )
    cost = [cost_picture("Seconds by phase", mean_seconds(finished))] if finished else []
    for picture in (*learning, *steps, *speed, *cost):
        write_bytes(out.with_suffix("") / f"{picture.slug}.png", picture.light)
    note = "AdamW's learning rate; Muon's has the same course. The gradient's norm is the one before clipping."
    chosen = list(selections or ())
    names = [run.folder.name for run in everyone] + chosen
    write_page(
        out,
        names[0] if len(names) == 1 else f"{len(everyone)} runs" if not chosen else ", ".join(names),
        runs_section(everyone),
        *scores_sections(finished),
        figures_section("Learning", LEARNING_NOTE, learning),
        spikes_section(everyone),
        *selection_sections(everyone, selections or {}),
        figures_section("Optimization", note, steps),
        figures_section("Speed", "Of the steps alone, without evaluation and checkpoints.", speed),
        cost_section(finished, cost),
        facts_section({run.folder.name: origin(run.folder) for run in everyone}),
    )
    return out


def selection_sections(runs: Sequence[RunFiles], selections: Mapping[str, dict]) -> list[Html]:
    """One for each selection, named by the runs that trained on it and the folders that hold it."""
    named: dict[str, tuple[dict, list[str]]] = {}
    for run in runs:
        if manifest := run.summary and run.summary.get("selection"):
            named.setdefault(manifest["sha256"], (manifest, []))[1].append(run.folder.name)
    for name, manifest in selections.items():
        named.setdefault(manifest["sha256"], (manifest, []))[1].append(name)
    return [selection_section(f"Selection of {', '.join(names)}", manifest) for manifest, names in named.values()]


def runs_section(runs: Sequence[RunFiles]) -> Html:
    if not runs:
        return Html("")
    rows = [
        [
            run.folder.name,
            state(run),
            Path(str(run.config.get("task") or (run.config.get("pool") or {}).get("path", ""))).name,
            str(run.seed),
            short(run.summary["cost"]["tokens"] if run.summary else run.last("tokens")),
            scientific(run.summary["cost"]["flops"] if run.summary else run.last("flops")),
            whole(sum(run.summary["cost"]["seconds"].values()) if run.summary else run.last("seconds")),
        ]
        for run in runs
    ]
    heads = ["run", "state", "task", "seed", "tokens", "FLOPs", "seconds"]
    return section("Runs", None, grid("Runs", heads, rows))


def state(run: RunFiles) -> Html:
    """Finished; or how far the run is, and when that was written: a stopped run looks as one that is still going."""
    if run.summary:
        return element("td", "finished", class_="words")
    if not run.records:
        return element("td", "unfinished: no steps yet", class_="words going")
    stage, step = run.records[-1]["stage"], run.records[-1]["step"]
    steps = (run.config.get(stage) or {}).get("steps", "?")
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((run.folder / "metrics.jsonl").stat().st_mtime))
    return element("td", f"unfinished: {stage} {step} of {steps}", element("small", written), class_="words going")


def scores_sections(finished: Mapping[str, Sequence[dict]]) -> list[Html]:
    """A table a task: scores on different ones are not to be compared."""
    tasks: dict[str, dict[str, Sequence[dict]]] = {}
    for name, summaries in finished.items():
        tasks.setdefault(summaries[0]["task"], {})[name] = summaries
    return [
        results_section(of_task, next(iter(of_task.values()))[0]["metric"], f"Scores on {task}", "run")
        for task, of_task in tasks.items()
    ]


def figures_section(title: str, note: str, pictures: Sequence[Picture]) -> Html:
    kind = "figures" if len(pictures) == 3 else "figures large"
    figures = element("div", *(picture.element() for picture in pictures), class_=kind)
    return section(title, note, figures) if pictures else Html("")


def spikes_section(runs: Sequence[RunFiles]) -> Html:
    found = [(run.folder.name, spike) for run in runs for spike in spikes(run.records)]
    if not found:
        return section("Loss spikes", "None.") if any(run.records for run in runs) else Html("")
    rows = [
        [name, f"{s['stage']} {s['step']}", element("td", s["trouble"], class_="words"), s["action"]]
        for name, s in found[:SHOWN_SPIKES]
    ]
    more = f" The first {SHOWN_SPIKES} of {len(found)} are listed." if len(found) > SHOWN_SPIKES else ""
    note = f"Steps whose loss or gradient was far off, and what was done: triangles on the curves.{more}"
    return section("Loss spikes", note, grid("Loss spikes", ["run", "step", "trouble", "action"], rows))


def mean_seconds(finished: Mapping[str, Sequence[dict]]) -> dict[str, dict[str, float]]:
    """Seconds by phase of each name, the mean over its runs."""
    return {
        name: {
            phase: sum(s["cost"]["seconds"].get(phase, 0.0) for s in summaries) / len(summaries)
            for phase in dict.fromkeys(phase for s in summaries for phase in s["cost"]["seconds"])
        }
        for name, summaries in finished.items()
    }


def cost_section(finished: Mapping[str, Sequence[dict]], pictures: Sequence[Picture]) -> Html:
    """Seconds by phase, peak memory and money; means over the runs of a name."""
    if not finished:
        return Html("")
    costs = mean_seconds(finished)
    phases = dict.fromkeys(phase for seconds in sorted(costs.values(), key=len, reverse=True) for phase in seconds)
    rows = [
        [phase_title(phase), *(f"{of[phase]:,.1f}" if phase in of else "-" for of in costs.values())]
        for phase in phases
    ]
    rows.append(["all phases", *(f"{sum(of.values()):,.1f}" for of in costs.values())])

    def mean(field: str) -> list[float]:
        return [statistics.fmean(s["cost"].get(field, 0) for s in summaries) for summaries in finished.values()]

    rows.append(["peak memory (GiB)", *(f"{size / 2**30:.2f}" for size in mean("peak_rss_bytes"))])
    rows += [["money", *(f"{money:,.2f}" for money in mean("money"))]] if any(mean("money")) else []
    table = grid("Cost", ["seconds", *map(arm_title, finished)], rows)
    return section("Cost", None, element("div", *(p.element() for p in pictures), class_="figures"), table)


def origin(folder: Path) -> str:
    """The command, machine and commit that made a run."""
    path = folder / "env.json"
    if not path.exists():
        return "unknown: no env.json"
    env = read_json(path)
    commit = f", commit {env['git_commit'][:10]}" if env.get("git_commit") else ""
    return f"{env.get('command')}; on {env.get('processor')}, {env.get('cores')} cores; tlm {env.get('tlm')}{commit}"


# --- the demo's arms ------------------------------------------------------------------------------------------------


def write_report(
    folder: Path, runs: Runs, task: Task, *, title: str | None = None, facts: Mapping[str, str] | None = None
) -> Path:
    """Writes curves.png and report.html into `folder`; returns the page's path.

    `runs`: finished run folders by arm. `task`: what they were trained on, for the texts. `facts`: lines on the data
    and the machine for the foot of the page, by their name.
    """
    arms = {arm: [read_json(run / "summary.json") for run in of_arm] for arm, of_arm in runs.items()}
    records = {arm: [read_metrics(run) for run in of_arm] for arm, of_arm in runs.items()}
    metric, path = next(iter(arms.values()))[0]["metric"], folder / "report.html"
    plot_curves(records, folder / "curves.png", metric)
    pictures = [panel_picture(panel, records) for panel in panels(metric)] if any(map(any, records.values())) else []
    write_page(
        path,
        title or f"{task.name}: what each arm learnt",
        element("p", verdict(arms, metric, len(task.splits["test"])), class_="lead"),
        results_section(arms, metric),
        figures_section("Learning", LEARNING_NOTE, pictures),
        retrieved_section(arms, task),
        predictions_section(runs, task),
        facts_section(facts or {}),
    )
    return path


def retrieved_section(arms: Mapping[str, Sequence[dict]], task: Task) -> Html:
    """Ten selected documents, each the best of its training text, beside that text."""
    selection = chosen_selection(arms)
    if selection is None:
        return Html("")
    analyzer = ANALYZERS[selection.manifest["options"].get("analyzer", "english")]
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
            if "queries" in selection.manifest:
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
