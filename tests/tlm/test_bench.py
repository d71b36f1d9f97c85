"""The rivals of `tlm bench train` are given the same work as we are, and what is reported is what was measured."""

import json
from functools import partial
from itertools import islice, repeat

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tlm import engine as engines
from tlm.batches import IGNORE, pack
from tlm.benches import rounds, train
from tlm.cli import main
from tlm.config import BenchConfig
from tlm.mixture import EXTERNAL, TASK
from tlm.progress import Progress

SMALL = dict(hidden=[64], layers=2, vocabulary=400, max_length=32, batch_tokens=200, steps=4, seconds=0, threads=1)
KEYS = ["bench", "case", "engine", "metric", "value", "unit", "runs"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def job(tiny_task, cache):
    config = BenchConfig(task=str(tiny_task), cache=cache, **SMALL)
    data = train.prepare_data(config, Progress(quiet=True))
    return train.make_job(config, {EXTERNAL: data.external, TASK: data.task}, 64, data.vocabulary)


def packed_order(sequences):
    return np.argsort([len(s) for s in sequences], kind="stable")


def test_rivals_get_the_same_tokens_masked_at_the_same_positions(job):
    for nth in range(2):
        steps = [job.objective.step(job.mixture.draw(step))[0] for step in job.turn(nth)]
        masked = [batch for batch in train.rival_batches(job, nth) if batch[0] == "mlm"]
        assert [micro.source for micro in steps] == [source for _, source, _ in masked] == [EXTERNAL] * 3 + [TASK]
        assert sum(sum(micro.batch.lengths) for micro in steps) == job.tokens
        for micro, (_, _, examples) in zip(steps, masked, strict=True):
            inputs = train.pad(examples)
            rows = packed_order([e["input_ids"] for e in examples])
            real = inputs["attention_mask"][rows].bool()
            assert torch.equal(inputs["input_ids"][rows][real], micro.batch.tokens)
            targets = inputs["labels"][rows][real]
            assert torch.equal(torch.nonzero(targets != IGNORE).flatten(), micro.batch.masked)
            assert torch.equal(targets[micro.batch.masked], micro.batch.masked_tokens)
            assert (inputs["labels"][rows][~real] == IGNORE).all()


def test_first_losses_agree_from_the_same_weights(job):
    engines.launch()
    ours = train.our_step(train.our_engine(job, "adamw"), job, 0)
    batches = train.rival_batches(job, 0)
    for sparse in (False, True):
        theirs = train.rival_model(job, "mlm", sparse)(**train.pad(batches[0][2])).loss
        assert ours == pytest.approx(theirs.item(), abs=1e-4)

    head, source, examples = batches[-1]
    assert (head, source) == ("classification", TASK)
    batch = pack([e["input_ids"] for e in examples], labels=[e["labels"] for e in examples])
    model = train.start_model(job)
    mine = F.cross_entropy(model.classify(model(batch), batch), batch.labels)
    theirs = train.rival_model(job, "classification")(**train.pad(examples)).loss
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-4)


def test_prompted_tasks_are_the_same_work_for_all(pool_folder, pool_cache):
    """Each token and each answer's token once; the first losses agree; the last token of all asks nothing of us."""
    config = BenchConfig(pool=str(pool_folder), cache=str(pool_cache), cases=["multitask"], **SMALL)
    job = train.multitask_job(config, train.prepare_data(config, Progress(quiet=True)).pool, 64)
    batches = train.rival_batches(job, 0)
    steps = [job.objective.step(job.mixture.draw(step))[0] for step in job.turn(0)]
    assert sum(len(step.batch.tokens) for step in steps) == job.tokens
    for step, (head, _, examples) in zip(steps, batches, strict=True):
        assert head == "causal"
        padded = train.pad(examples)
        assert padded["attention_mask"].sum() == len(step.batch.tokens) + len(examples)
        asked = padded["labels"][padded["labels"] != IGNORE]
        assert sorted(asked.tolist()) == sorted(step.batch.masked_tokens.tolist())
    engines.launch()
    ours = train.our_step(train.our_engine(job, "adamw"), job, 0)
    theirs = train.rival_model(job, "causal")(**train.pad(batches[0][2])).loss
    assert ours == pytest.approx(theirs.item(), abs=1e-4)
    assert job.flops(0, muon=False) < job.flops(0, muon=True)


def test_parts_add_up_to_the_time_of_the_steps(job):
    turns = islice(train.ours_in_parts(job, "muon"), 3)
    assert next(turns) is None
    for parts in turns:
        assert set(parts) == set(train.PARTS)
        assert min(parts.values()) > 0


def test_backward_goes_where_forward_went():
    embedding, first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4000)
    train.name_scope(second, "MLM head")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(20):
            F.cross_entropy(
                second(first(embedding(torch.randn(512, 8)))), torch.zeros(512, dtype=torch.long)
            ).backward()
    events = profiler.events()
    parts = train.attribute(events)
    products = [e for e in events if e.name in train.MATMULS]
    inside = [e for e in products if any(a.name == "MLM head" for a in train.ancestors(e))]
    assert len(inside) == 20  # forward only, of 20 * (3 + 2 * 3 - 1) products
    assert len(products) == 160
    assert 0 < parts["matmuls"] < sum(e.self_cpu_time_total for e in products) / 1e6 - parts["matmuls"]
    assert parts["attention"] == parts["data"] == parts["optimizer"] == 0


def collated(job):
    """What the Trainer gets in turn 0, by default and grouped: lists of batches as `pad` makes them."""
    yield
    given, pad = [], train.pad
    train.pad = lambda examples: given[-1].append(pad(examples)) or given[-1][-1]
    for arguments in ({}, train.GROUPED):
        given.append([])
        next(islice(train.hf_trainer(job, **arguments), 1, None))
    yield from repeat([[{name: t.numpy() for name, t in batch.items()} for batch in batches] for batches in given])


def allocated(megabytes):
    """A turn holds that much for a moment."""
    while True:
        yield
        np.ones(megabytes << 20, np.uint8)


def contest(contestants):
    return rounds.contest("test", contestants, 0, 1, train.PRELOAD, Progress(quiet=True))


def test_the_trainer_goes_through_the_same_texts_in_as_many_steps(job):
    pytest.importorskip("accelerate")
    ours = train.rival_batches(job, 0)
    tokens = sum(len(e["input_ids"]) for _, _, examples in ours for e in examples)
    targets = np.concatenate([e["labels"] for head, _, examples in ours if head == "mlm" for e in examples])
    for batches in contest({"trainer": partial(collated, job)})["trainer"].turns[0]:
        assert len(batches) == len(ours)
        assert sum(b["attention_mask"].sum() for b in batches) == tokens
        masked = np.concatenate([b["labels"].ravel() for b in batches if b["labels"].ndim == 2])
        assert sorted(masked[masked != IGNORE]) == sorted(targets[targets != IGNORE])


def test_peak_memory_is_of_each_contestant_alone():
    records = contest({"large": partial(allocated, 100), "small": partial(allocated, 10)})
    assert [len(record.turns) for record in records.values()] == [rounds.LEAST_ROUNDS] * 2
    assert records["large"].peak_memory / 2**20 == pytest.approx(100, abs=2)
    assert records["small"].peak_memory / 2**20 == pytest.approx(10, abs=2)


def test_the_command_writes_what_it_shows(tiny_task, cache, tmp_path, capsys):
    settings = [f"{name}={value}" for name, value in SMALL.items()]
    out = tmp_path / "new" / "parts.json"
    assert (
        main(["bench", "train", f"task={tiny_task}", f"cache={cache}", f"out={out}", "cases=[parts]", *settings]) == 0
    )
    content = json.loads(out.read_text())
    assert content["machine"]["threads"] == 1
    assert content["machine"]["versions"]["transformers"]
    assert all(list(row) == KEYS and row["bench"] == "train" and row["runs"] == 3 for row in content["rows"])
    values = {row["metric"]: row["value"] for row in content["rows"]}
    assert values["step"] == pytest.approx(sum(values[part] for part in train.PARTS))
    assert {row["unit"] for row in content["rows"]} == {"s"}
    shown = capsys.readouterr().out
    assert all(rounds.SHOWN["s"](value) in shown for value in values.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "serve", "task=x"], "bench serve: no such verb; use one of bench train"),
        (["bench", "train"], "task=: missing"),
        (["bench", "train", "task=absent-folder"], "absent-folder"),
        (["bench", "train", "task=x", "cases=[grow]"], "did you mean growth"),
        (["bench", "train", "task=x", "cases=grow"], "did you mean growth"),  # one word is a list of one
        (["bench", "train", "task=x", "cases=[]"], "nothing to measure"),
        (["bench", "train", "cases=[multitask]"], "pool=: missing"),
        (["bench", "train", "pool=x", "cases=[multitask,mlm]"], "task=: missing"),
        (["bench", "train", "task=x", "hidden=[100]"], "multiples of 64"),
        (["bench", "train", "task=x", "hidden=[0]"], "multiples of 64"),
        (["bench", "train", "task=x", "steps=6"], "a multiple of 4"),
        (["bench", "train", "task=x", "secnds=6"], "did you mean seconds"),
        (["bench", "train", "task=x", "layers=0"], "at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "RIVALS_NEED", ())
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_rival_is_named_with_the_mend(capsys, monkeypatch):
    monkeypatch.setattr(train, "RIVALS_NEED", ("absent_package",))
    assert main(["bench", "train", "task=x"]) == 2
    assert "absent_package: not installed" in capsys.readouterr().err
