"""`tlm pool build`: a pool of real published tasks, out of pip packages alone or of collections on the hub."""

import gzip
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from retrieval import folders
from tasks import hub, pool_sources
from tasks.errors import InputError
from tasks.pool import open_pool
from tlm.config import PoolBuildConfig
from tlm.progress import Progress

KIND, VERSION = "task pool", 1


def build(config: PoolBuildConfig) -> int:
    """Writes the pool whole or not at all."""
    out, progress = Path(config.out).expanduser(), Progress()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; delete it or name another folder")
    sources = {"bigbench": config.bigbench, "evals": config.evals or (None if config.hub else installed_evals())}
    sources |= {f"hub_{name}": name for name in config.hub if hub.describe(name)}
    if not any(sources.values()):
        raise InputError(
            "bigbench=, evals=, hub=: no source; `pip download --no-deps bigbench==1.0.0` gives the archive for "
            "bigbench=, and what `pip install --no-deps evals` brings is found by itself"
        )
    with progress.phase("pool"):
        manifest = folders.ensure(out, KIND, VERSION, lambda folder: write(folder, sources))
    pool = open_pool(str(out))
    print(
        f"{out}: {len(pool.tasks):,} tasks ({', '.join(f'{n:,} of {s}' for s, n in manifest['tasks'].items())}), "
        f"{len(pool.heldout):,} of them held out; {manifest['too_small']:,} were too small"
    )
    return 0


def write(folder: Path, sources: dict[str, str | None]) -> dict:
    readers = {"bigbench": pool_sources.read_bigbench, "evals": pool_sources.read_evals}
    readers |= {shard: hub.read_collection for shard in sources if shard.startswith("hub_")}
    tasks, too_small = {}, 0
    for shard, path in sources.items():
        if path is None:
            continue
        with (
            (folder / f"{shard}.jsonl.gz").open("wb") as file,
            gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,  # no name, no time: the same pool to the byte
        ):
            for found in readers[shard](path):
                written = pool_sources.records(found, shard)
                if written is None:
                    too_small += 1
                    continue
                if found.name in tasks:
                    raise InputError(f"{path}: two tasks would be named {found.name}; rename one of their folders")
                tasks[found.name], lines = written
                packed.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
    if not tasks:
        raise InputError(f"{', '.join(filter(None, sources.values()))}: no task of {pool_sources.LEAST} texts or more")
    (folder / "tasks.jsonl").write_text(
        "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks.values()), encoding="utf-8"
    )
    held = set(map(pool_sources.category_name, pool_sources.HELDOUT_KEYWORDS))
    held |= {c for shard, name in sources.items() if shard.startswith("hub_") for c in hub.describe(name)["heldout"]}
    categories = sorted({task["category"] for task in tasks.values()})
    splits = {
        "train_categories": [category for category in categories if category not in held],
        "heldout_categories": [category for category in categories if category in held],
    }
    (folder / "splits.json").write_text(json.dumps(splits, indent=1) + "\n")
    return {"tasks": Counter(task["shard"] for task in tasks.values()), "too_small": too_small}


def installed_evals() -> str | None:
    """Where the package's data lies; it is not imported."""
    spec = find_spec("evals")
    places = [Path(place) / "registry" / "data" for place in spec.submodule_search_locations or ()] if spec else []
    return next((str(place) for place in places if place.is_dir()), None)
