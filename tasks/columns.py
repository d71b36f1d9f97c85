"""Which columns of a record hold the text, the label, the split and the id: given, or guessed from usual names."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from tasks.errors import InputError

# In order of preference; compared in lower case, spaces and hyphens as underscores.
TEXT_NAMES = (
    "text", "sentence", "content", "review", "article", "abstract", "tweet", "body", "comment", "message", "question",
    "query", "utterance", "post", "document", "passage", "paragraph", "description", "review_text", "review_body",
    "reviewtext", "summary", "string", "input", "title", "headline",
)  # fmt: skip
LABEL_NAMES = (
    "label_text", "label_name", "label", "labels", "class", "category", "target", "sentiment", "topic", "intent",
    "emotion", "gold_label", "gold", "class_index", "class_label", "rating", "stars", "tag", "y",
)  # fmt: skip
TITLE_NAMES = ("title", "headline")  # go before the text where both are there
SPLIT_NAMES = ("split", "fold")
ID_NAMES = ("id", "_id", "uid", "guid", "idx")


def text_columns(columns: list[str], given: str | None, where: str) -> list[str]:
    """The columns whose values, joined by a space, are the text: `given` (joined by "+"), or the guess.

    Raises InputError where a given column is not there, or none looks like a text.
    """
    if given is not None:
        return [given] if given in columns else [present(part.strip(), columns, where) for part in given.split("+")]
    body = _first(TEXT_NAMES, columns)
    if body is None:
        raise InputError(f"{where}: no column looks like a text; name it with text_column=... ({_listed(columns)})")
    title = _first(TITLE_NAMES, columns)
    return [body] if title in (None, body) else [title, body]


def label_column(columns: list[str], given: str | None, where: str) -> str:
    """The label's column: `given`, or the guess. Raises InputError as text_columns does."""
    if given is not None:
        return present(given, columns, where)
    found = _first(LABEL_NAMES, columns)
    if found is None:
        raise InputError(f"{where}: no column looks like a label; name it with label_column=... ({_listed(columns)})")
    return found


def split_column(columns: list[str]) -> str | None:
    return _first(SPLIT_NAMES, columns)


def id_column(columns: list[str]) -> str | None:
    return _first(ID_NAMES, columns)


def present(name: str, columns: Collection[str], where: str) -> str:
    """`name`, if it is one of `columns`; otherwise raises InputError, which says what is there."""
    if name in columns:
        return name
    raise InputError(f"{where}: no column {name!r}{nearest(name, columns)} ({_listed(columns)})")


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error adds where the name is nearly one of `known`: ", did you mean 'x'?", or nothing."""
    by_lower = {str(k).lower(): k for k in known}
    found = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f", did you mean {by_lower[found[0]]!r}?" if found else ""


def _first(names: tuple[str, ...], columns: list[str]) -> str | None:
    by_name = {column.strip().lower().replace(" ", "_").replace("-", "_"): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def _listed(columns: Iterable[str]) -> str:
    return "columns: " + ", ".join(map(repr, columns))
