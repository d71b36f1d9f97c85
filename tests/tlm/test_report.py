"""The report, from run folders made up here: what stands in it, and that users' text cannot break it."""

import base64
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from retrieval.analyze import ANALYZERS
from retrieval.corpus import open_corpus
from retrieval.select import select
from tasks.errors import InputError
from tasks.readers import read_task
from tlm import report, tables
from tlm.cli import main

NASTY = "<script>alert('&')</script> \"quoted\" </p>"
VOID = {"meta", "img", "source"}


@pytest.fixture(scope="module")
def task(tiny_task, tmp_path_factory):
    """The tiny task; its first training and test texts are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    for path in tiny_task.iterdir():
        lines = path.read_text().splitlines()
        if path.stem in ("train", "test"):
            first = json.loads(lines[0])
            lines[0] = json.dumps(first | {"text": f"{NASTY} {first['text']}"})
        (folder / path.name).write_text("\n".join(lines) + "\n")
    return read_task(str(folder))


@pytest.fixture(scope="module")
def selection(task, tiny_corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return select(task, open_corpus(str(tiny_corpus), cache), cache=cache, k=50, max_documents=200)


def make_run(folder: Path, task, arm: str, accuracy: float, seed: int = 0, selection=None, num_wrong: int = 9) -> Path:
    """A finished run in the format of the design, with `num_wrong` wrong predictions at the end of the test set."""
    folder.mkdir(parents=True)
    scores = {"accuracy": accuracy, "macro_f1": accuracy - 0.02, "micro_f1": accuracy}
    summary = {
        "name": folder.name, "task": task.name, "metric": "accuracy", "labels": list(task.labels), "arm": arm,
        "seed": seed,
        "dev": scores, "test": scores | {"accuracy_interval": [accuracy - 0.03, accuracy + 0.03]}, "model": {},
        "data": {"train_examples": 60, "external_documents": 200 if selection else 0},
        "selection": {"folder": str(selection.folder), **selection.manifest} if selection else None,
        "cost": {"flops": 12_300_000_000, "tokens": 1_234_567, "seconds": {"joint": 10.4, "finetune": 2.2}},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    tests = task.splits["test"]
    with (folder / "predictions.jsonl").open("w") as file:
        for number, example in enumerate(tests):
            others = [label for label in task.labels if label != example.label]
            chosen = others[0] if number >= len(tests) - num_wrong else example.label
            shares = {label: 0.7 if label == chosen else 0.15 for label in task.labels}
            line = {"id": example.id, "label": example.label, "prediction": chosen, "probabilities": shares}
            file.write(json.dumps(line) + "\n")
    if arm != "tfidf":
        with (folder / "metrics.jsonl").open("w") as file:
            for stage, last in (("joint", 40), ("finetune", 20)):
                for step in range(10, last + 1, 10):
                    mlm = 7.0 - step / 10 if stage == "joint" and selection else None
                    train = {"kind": "train", "loss": 1.0, "mlm_loss": mlm, "task_loss": 1.0 / step}
                    file.write(json.dumps({"stage": stage, "step": step} | train) + "\n")
                dev = {"stage": stage, "step": last, "kind": "dev", "accuracy": accuracy - 0.1 * (stage == "joint")}
                file.write(json.dumps(dev) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(task, selection, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "tfidf": [make_run(folder / "tfidf", task, "tfidf", 0.903)],
        "scratch": [make_run(folder / "scratch", task, "scratch", 0.7)],
        "<b>mine</b>": [make_run(folder / "mine", task, "mine", 0.85)],
        "tlm": [make_run(folder / "tlm", task, "tlm", 0.8, selection=selection)],
    }


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order. Keeps tags with attributes, texts with their path."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))

    def inside(self, tag: str, kind: str | None = None) -> list[str]:
        """The text of each place in an element of this tag and class, in order."""
        return [data for path, data in self.texts if any(t == tag and kind in (None, c) for t, c in path)]


@pytest.fixture(scope="module")
def source(runs, task, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    path = report.write_report(folder, runs, task, title="A <title>", facts={"machine": "two <cores>"})
    assert sorted(p.name for p in folder.iterdir()) == ["curves.png", "report.html"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    return path.read_text()


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


def test_page_stands_alone(source, page):
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    addresses = [a[name] for _, a in page.tags for name in ("src", "srcset", "href") if name in a]
    assert len(addresses) == 6  # three panels, by day and by night
    for address in addresses:
        kind, content = address.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
    assert "url(" not in source
    assert "@import" not in source


def test_texts_are_escaped(page):
    everything = "".join(data for _, data in page.texts)
    assert everything.count("<script>alert('&')</script>") == 2  # a training text and a test text
    assert "<b>mine</b>" in page.inside("th")
    assert "b" not in {tag for tag, _ in page.tags}
    assert "A <title>" in page.inside("h1")
    assert "two <cores>" in page.inside("dd")


def test_pictures_are_told_in_words(page):
    alts = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert alts[0].startswith("Masked-LM loss, joint stage")
    assert "TLM from 6.00 to 3.00, best 3.00" in alts[0]
    assert "task only from 60.00 to 70.00, best 70.00" in alts[2]
    assert "TF-IDF" not in "".join(alts)  # it takes no steps


def test_verdict_states_who_wins(page):
    (sentence,) = page.inside("p", "lead")
    assert "On 45 test texts, accuracy in percent: TF-IDF + logistic regression 90.3, <b>mine</b> 85.0, " in sentence
    assert "TLM 80.0, task only 70.0. " in sentence
    assert "TLM is 10.3 points behind TF-IDF + logistic regression, 10.0 points ahead of task only" in sentence
    assert sentence.endswith("and 5.0 points behind <b>mine</b>.")


def test_results_hold_every_arm(page):
    heads = [text for text in page.inside("th") if text in ("test accuracy", "FLOPs", "seconds", "external documents")]
    assert len(heads) == 4
    cells = page.inside("td")
    assert cells.count("87.3 to 93.3") == 1
    assert cells.count("1.2e10") == 4
    assert cells.count("13") == 4  # 10.4 and 2.2 seconds
    assert page.inside("td", "best") == ["90.3", "87.3 to 93.3", "88.3", "90.3", "88.3"]


def test_documents_stand_beside_the_text_that_fetched_them(page, selection, task):
    heads = [data for path, data in page.texts if path[-1:] == (("h3", None),) and ("li", "pair") in path]
    assert len(heads) == 20
    best = {}
    for record in selection.records():
        best.setdefault(record["query"], record["id"])
    for left, right in zip(heads[::2], heads[1::2], strict=True):
        query = re.fullmatch(r"training text (.+), labelled \w+", left)[1]
        assert right.startswith(f"{best[query]}, rank ")


def test_marks_whole_words_and_escapes_the_rest():
    marked = report.marked("Aston's cars, <b>\ncarsick", {"aston", "cars"}, ANALYZERS["english"])
    assert marked == "<mark>Aston</mark>'s <mark>cars</mark>, &lt;b&gt;\ncarsick"


def test_predictions_show_right_and_wrong_ones(page):
    assert len(page.inside("span", "right")) == 5
    wrong = page.inside("span", "wrong")
    assert len(wrong) == 5
    assert all(re.fullmatch(r"wrong: labelled \w+", text) for text in wrong)
    assert page.inside("dl", "shares").count("70%") == 10


def test_few_mistakes_leave_room_for_right_ones(task, tmp_path):
    runs = {"tlm": [make_run(tmp_path / "tlm", task, "tlm", 0.95, num_wrong=2)]}
    page = Page(report.write_report(tmp_path, runs, task).read_text())
    assert len(page.inside("span", "wrong")) == 2
    assert len(page.inside("span", "right")) == 8
    assert not page.inside("li", "pair")  # no selection


def text_of(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_table_shows_one_seed_or_the_mean_of_several(task, tmp_path):
    scores = (0.8, 0.85, 0.9)
    folders = [make_run(tmp_path / str(seed), task, "tlm", score, seed) for seed, score in enumerate(scores)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    several = text_of(tables.table({"tlm": summaries}))
    assert f"85.0 ±{100 * statistics.stdev(scores):.1f}" in several
    assert "83.0 ±5.0" in several
    one = text_of(tables.table({"tlm": summaries[0]}))
    assert "80.0" in one
    assert "±" not in one
    assert re.search(r"1\.2M\s+1\.2e10\s+13", one)
    page = Page(report.write_report(tmp_path / "out", {"tlm": folders}, task).read_text())
    assert "85.0 ±5.0" in page.inside("td")


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (1234, "1.2k"), (1.2e5, "120k"), (2.5e6, "2.5M")])
def test_short_numbers(number, text):
    assert tables.short(number) == text


def test_unfinished_or_damaged_runs_are_refused(runs, task, tmp_path):
    with pytest.raises(InputError, match="no-such-run"):
        report.write_report(tmp_path / "out", {"tlm": [tmp_path / "no-such-run"]}, task)
    assert not (tmp_path / "out").exists()
    damaged = make_run(tmp_path / "damaged", task, "tlm", 0.8)
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "joi')
    with pytest.raises(InputError, match="line 9"):
        report.write_report(tmp_path / "out", {"tlm": [damaged]}, task)


# --- any runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(task, tmp_path):
    """Two seeds of one configuration, the second unfinished and with a spike; TF-IDF; and what is no run."""
    folder = tmp_path / "several"
    for seed in (0, 1, 10):
        run = make_run(folder / f"tlm-{seed}", task, "tlm", 0.8, seed)
        config = {"run": run.name, "seed": seed, "task": NASTY, "joint": {"steps": 40}, "finetune": {"steps": 50}}
        (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (run / "summary.json").unlink()
    spike = {"stage": "finetune", "step": 15, "kind": "spike", "trouble": f"{NASTY} is nan", "action": "skip"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-2], json.dumps(spike), *lines[-2:], ""]))
    run = make_run(folder / "tfidf", task, "tfidf", 0.9)
    (run / "config.yaml").write_text("model: {size: tfidf}")
    (run / "env.json").write_text(json.dumps({"command": "tlm train", "processor": "a", "cores": 2, "tlm": "0.1"}))
    (folder / "notes").mkdir()
    return folder


def test_a_folder_of_runs_becomes_a_page_and_pictures(several, tmp_path, capsys):
    out = tmp_path / "pages" / "all.html"
    assert main(["report", str(several), f"out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    source = out.read_text()
    page = Page(source)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in source
    pictures = [tag for tag, _ in page.tags if tag == "picture"]
    files = sorted((out.parent / "all").iterdir())
    assert len(files) == len(pictures) == 9
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert {"total-loss.png", "learning-rate.png", "mfu.png", "seconds-by-phase.png"} < {file.name for file in files}

    heads = page.inside("th")
    assert heads.count("tlm-10") == 2  # in the runs and beside its spike; after tlm-1
    assert heads.index("tlm-1") < heads.index("tlm-10")
    assert page.inside("td", "words going")[:1] == ["unfinished: finetune 20 of 50"]
    assert page.inside("td", "words").count("finished") == 3
    assert "80.0 ±0.0" in page.inside("td")  # the two seeds that are finished
    assert "87.0 to 93.0" in page.inside("small")
    assert f"{NASTY} is nan" in page.inside("td", "words")
    assert [t for t in page.inside("td") if t in ("finetune 15", "skip")] == ["finetune 15", "skip"]
    assert {"all phases", "finetune", "12.6"} < {*heads, *page.inside("td")}
    assert "tlm train; on a, 2 cores; tlm 0.1" in page.inside("dd")


def test_a_run_and_a_selection_folder_show_what_was_selected(task, several, selection, tmp_path):
    """One section for a selection, however many runs trained on it, with the manifest's numbers and escaped samples."""
    for name in ("tlm-20", "tlm-21"):
        run = make_run(several / name, task, "tlm", 0.8, selection=selection)
        (run / "config.yaml").write_text(f"seed: {name[-2:]}")
    arguments = [str(several / "tlm-20"), str(several / "tlm-21"), str(selection.folder)]
    assert main(["report", *arguments, f"out={tmp_path / 'two.html'}"]) == 0
    page = Page((tmp_path / "two.html").read_text())
    heads = [head for head in page.inside("h2") if head.startswith("Selection")]
    assert heads == [f"Selection of tlm-20, tlm-21, {selection.folder.name}"]
    manifest = selection.manifest
    assert "tiny" in page.inside("th")
    assert f"{manifest['by_source']['tiny']['words']:,}" in page.inside("td")
    said = page.inside("li")
    assert f"terms that pulled most: {', '.join(manifest['terms'])}" in said
    assert any(f"reduction {manifest['kl']['reduction']:.3f}" in sentence for sentence in said)
    for sample in manifest["samples"]:
        assert sample["text"] in page.inside("p", "text")

    assert main(["report", str(selection.folder), f"out={tmp_path / 'one.html'}"]) == 0
    page = Page((tmp_path / "one.html").read_text())
    assert page.inside("h1") == [selection.folder.name]
    assert page.inside("h2") == [f"Selection of {selection.folder.name}"]


def test_an_unfinished_run_alone_has_no_scores_and_no_cost(several, tmp_path):
    assert main(["report", str(several / "tlm-10"), f"out={tmp_path / 'one.html'}"]) == 0
    page = Page((tmp_path / "one.html").read_text())
    assert page.inside("h1") == ["tlm-10"]
    assert page.inside("h2") == ["Runs", "Learning", "Loss spikes", "Optimization", "Speed", "How it was made"]


def test_runs_of_one_name_are_told_apart_by_their_folders(task, several, tmp_path):
    other = make_run(tmp_path / "other" / "tfidf", task, "tfidf", 0.5)
    (other / "config.yaml").write_text("seed: 0")
    named = report.by_name([report.read_run(folder) for folder in (several / "tfidf", other)])
    assert list(named) == ["tfidf", "other/tfidf"]


def test_seeds_of_different_configurations_are_not_one(several):
    path = several / "tlm-1" / "config.yaml"
    path.write_text(path.read_text().replace('"steps": 40', '"steps": 60'))
    named = report.by_name([report.read_run(folder) for folder in report.find_runs(several)])
    assert list(named) == ["tfidf", "tlm", "tlm-1"]
    assert [run.folder.name for run in named["tlm"]] == ["tlm-0", "tlm-10"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report"], "say which run"),
        (["report", "{}/absent"], "no such run"),
        (["report", "{}/several/notes"], "holds no run"),
        (["report", "{}/several", "out={}/page"], "out="),
        (["report", "{}/several/broken"], "metrics.jsonl, line 3"),
        (["report", "{}/several/tlm-0", "{}/several/other"], "metrics.jsonl, line 1"),
        (["report", "{}/several/damaged"], "summary.json: damaged"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, words, several, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, file, content in (
        ("broken", "metrics.jsonl", '{"stage": "joint", "step": 1, "kind": "dev"}\n' * 2 + '{"stage": "joi'),
        ("other", "metrics.jsonl", '["no", "record"]\n'),
        ("damaged", "summary.json", "{"),
    ):
        (several / name).mkdir()
        (several / name / "config.yaml").write_text("seed: 0")
        (several / name / file).write_text(content)
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["several"]
