"""A selection as a person reads it, from its manifest: rows and sentences for the terminal, a section for the page."""

from collections.abc import Iterator, Mapping

from tlm.page import Html, element, grid, section


def source_rows(manifest: Mapping) -> list[tuple[str, str, str, float]]:
    """(source, documents, words, its share of the words), most words first."""
    entries = sorted(manifest["by_source"].items(), key=lambda item: -item[1]["words"])
    total = max(manifest["words"], 1)
    return [(name, f"{e['documents']:,}", f"{e['words']:,}", e["words"] / total) for name, e in entries]


def score_rows(manifest: Mapping) -> list[tuple[str, str, float]]:
    """(from score to score, documents, their share), best first."""
    histogram = manifest["scores"]["histogram"]
    bounds, counts = histogram["bounds"], histogram["documents"]
    steps = zip(bounds, bounds[1:], counts, strict=False)
    return [(f"{low:.4g} to {high:.4g}", f"{n:,}", n / sum(counts)) for low, high, n in steps][::-1]


def sentences(manifest: Mapping) -> Iterator[str]:
    """Everything else that the manifest counts; what one of an older version lacks is left out."""
    for part in manifest.get("tasks", ()):
        k = f", {part['k']:,} documents a query" if "k" in part else ""
        yield (
            f"{part['task']}: {part['documents']:,} documents, {part['words']:,} words (quota {part['quota']:.0%}{k})"
            + (f"; {kl_sentence(part['kl'])}" if part.get("kl") else "")
        )
    if "queries" in manifest:
        queries, hits = manifest["queries"], manifest["queries"]["hits"]
        yield (
            f"{queries['number']:,} queries found {hits['fewest']} to {hits['most']} documents each, "
            f"{hits['median']:.0f} in the middle; {queries['without_hits']:,} found nothing"
            + (f" ({', '.join(queries['without_hits_examples'])})." if queries["without_hits"] else ".")
        )
        if "fetched" in queries:
            steps = [f"{step_name(step)} by {step['queries']:,}" for step in queries["fetched"]]
            yield f"documents of the selection that a query fetched: {'; '.join(steps)}."
    if manifest.get("kl"):
        yield f"n-grams: {kl_sentence(manifest['kl'])}."
    if "scores" in manifest:
        percentiles = manifest["scores"]["percentiles"]
        yield "scores: " + ", ".join(f"{score:.4g} at {q}%" for q, score in percentiles.items())
    if manifest.get("terms"):
        yield "terms that pulled most: " + ", ".join(manifest["terms"])
    leaks = manifest["leaks"]
    yield f"{leaks['dropped']:,} documents that overlap with dev or test texts were dropped."
    for example in leaks["examples"]:
        yield f"  such as {example['id']}, which shares with {text_of(example)}: {example['shared']!r}"
    if repeats := manifest.get("near_duplicates"):
        yield f"{repeats['dropped']:,} documents that are nearly the same as a better one were dropped."
        for example in repeats["examples"]:
            yield f"  such as {example['id']}, {example['similarity']:.0%} like {example['like']}"


def kl_sentence(kl: Mapping) -> str:
    return (
        f"KL divergence of the training texts from the selection {kl['to_selection']:.3f}, from random documents "
        f"{kl['to_random']:.3f}, reduction {kl['reduction']:.3f}"
    )


def step_name(step: Mapping) -> str:
    return f"{step['from']:,}" + (f" to {step['to']:,}" if step["to"] > step["from"] else "")


def text_of(example: Mapping) -> str:
    return f"{example['task']} {example['split']} {example['text']}" if "split" in example else "a dev or test text"


def sample_head(sample: Mapping) -> str:
    return f"{sample['id']}, {sample['source']}, rank {sample['rank']:,}, score {sample['score']:.4g}"


def selection_section(title: str, manifest: Mapping) -> Html:
    sources = [[name, documents, words, f"{share:.1%}"] for name, documents, words, share in source_rows(manifest)]
    tables = [grid("Sources", ["source", "documents", "words", "of the words"], sources)]
    if "scores" in manifest:
        steps = [[step, documents, f"{share:.1%}"] for step, documents, share in score_rows(manifest)]
        tables.append(grid("Scores", ["score", "documents", "of the documents"], steps))
    said = element("ul", *(element("li", sentence) for sentence in sentences(manifest)))
    pairs = []
    for sample in manifest.get("samples", ()):
        sides = [(sample_head(sample), sample["text"])]
        if fetched := sample["query"]:
            sides.insert(0, (f"training text {fetched['id']}", fetched["text"]))
        cards = (element("div", element("h3", head), element("p", text, class_="text")) for head, text in sides)
        pairs.append(element("li", *cards, class_="pair"))
    size = f"{manifest['documents']:,} documents, {manifest['words']:,} words"
    note = f"{size}, chosen for {manifest['task']} by {name_of(manifest)}."
    return section(title, note, said, *tables, element("ol", *pairs, class_="cards"))


def name_of(manifest: Mapping) -> str:
    options = manifest["options"]
    return options["selector"] + (f" with {options['k']:,} documents a query" if options.get("k") else "")
