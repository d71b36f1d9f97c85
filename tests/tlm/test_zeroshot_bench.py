"""`tlm bench zeroshot`: lm-eval's scores of the exported run are ours, and both are timed."""

import json

import pytest

from tlm.benches import zeroshot
from tlm.cli import main


@pytest.fixture
def rival(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.mark.usefixtures("rival", "in_this_process")
def test_scores_and_accuracies_are_equal(pretrained, pool_folder, pool_cache, tmp_path):
    out = tmp_path / "zeroshot.json"
    given = [f"run={pretrained}", f"pool={pool_folder}", f"cache={pool_cache}", "limit=6", "batch=[1,4]", "threads=1"]
    assert main(["bench", "zeroshot", *given, "seconds=0", f"out={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    found = {(row["engine"], row["metric"]): row["value"] for row in rows}
    for engine in ("lm-eval, batch 1", "lm-eval, batch 4"):
        assert found[engine, "largest difference of a score"] < 1e-4
        assert found[engine, "accuracy, mean over tasks"] == found["tlm", "accuracy, mean over tasks"]
        assert found[engine, "choices/s"] > 0
        assert found[engine, "times the seconds of tlm"] > 0


def test_without_lm_eval_it_says_how_to_get_it(pretrained, pool_folder, monkeypatch, capsys):
    monkeypatch.setattr(zeroshot.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "zeroshot", f"run={pretrained}", f"pool={pool_folder}"]) == 2
    assert "needs lm-eval; get it by pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run=nowhere", "nowhere: holds no finished run"),
        ("categories=[topics]", "was trained on topics, so its scores there are not zero-shot"),
        ("categories=[nothing]", "nothing"),
    ],
)
@pytest.mark.usefixtures("rival")
def test_bad_input_is_one_sentence(change, said, pretrained, pool_folder, pool_cache, capsys):
    given = [f"run={pretrained}", f"pool={pool_folder}", f"cache={pool_cache}", change]
    assert main(["bench", "zeroshot", *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("rival")
def test_what_transformers_has_no_decoder_for_is_refused(general_run, pool_folder, pool_cache, capsys):
    assert main(["bench", "zeroshot", f"run={general_run}", f"pool={pool_folder}", f"cache={pool_cache}"]) == 2
    assert "no decoder of transformers" in capsys.readouterr().err
