"""Several tasks' rankings into one selection, each task by its quota: a draft.

The task that is furthest behind its share takes its best document that is still free, until the bound is reached. So a
smaller selection is a prefix of a larger one, and the order of the tasks decides ties alone. A task whose documents are
used up leaves its share to the others. With one task this is its ranking, cut.
"""

from collections.abc import Callable, Sequence

import numpy as np

from retrieval.ranking import Found


def draft(
    rankings: Sequence[Found],
    shares: Sequence[float],
    words: np.ndarray,
    max_documents: int | None = None,
    max_words: int | None = None,
    refuses: Callable[[int], bool] | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """(The places that each ranking gave, ascending; int32: whose turn it was, for each document of the selection.)

    `words` int32[corpus]: a document's words, which shares are counted in where `max_words` bounds the selection, else
    documents are. The selection ends before the document that would pass a bound. `refuses(row)` is asked once for
    each document whose turn it is.
    """
    weights, bound = (np.ones_like(words), np.inf) if max_words is None else (words, max_words)
    taken, turns = np.zeros(len(words), bool), []
    places, given = [0] * len(rankings), [[] for _ in rankings]
    used, behind = [0.0] * len(rankings), list(range(len(rankings)))
    rows = [ranking.rows.tolist() for ranking in rankings]
    total = 0
    while behind and len(turns) != max_documents:
        task = min(behind, key=lambda task: used[task] / shares[task])
        if places[task] == len(rows[task]):
            behind.remove(task)
            continue
        place = places[task]
        row = rows[task][place]
        places[task] += 1
        if taken[row]:
            continue
        taken[row] = True
        if refuses and refuses(row):
            continue
        weight = int(weights[row])
        total += weight
        if total > bound:
            break
        used[task] += weight
        given[task].append(place)
        turns.append(task)
    return [np.array(each, np.int64) for each in given], np.array(turns, np.int32)
