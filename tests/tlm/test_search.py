"""Prompt search: it climbs, judges as formulas say, counts what it costs, and ends the same by its seed."""

import json
import random

import numpy as np
import pytest

from tasks.genes import Genes, genes_of
from tasks.pool import Instance
from tasks.prompts import Prompt
from tlm.cli import main
from tlm.search import by_information, by_labels, search


def shot(target):
    return Instance("t", "i", "train", "x", target, ("a", "b"))


def test_labels_judge_by_accuracy_and_then_by_probability():
    scores = [np.log([0.9, 0.1]), np.log([0.6, 0.4]), np.log([0.3, 0.7])]
    found = by_labels(scores, [shot("a"), shot("b"), shot("b")])
    assert found == pytest.approx((2 / 3, (0.9 + 0.4 + 0.7) / 3))


def test_information_is_what_inputs_tell_of_choices():
    """0 where every input is answered alike, however surely; log 2 where two are answered surely and apart."""
    assert by_information([np.array([9.0, 0.0])] * 3, [])[0] == pytest.approx(0)
    assert by_information([np.array([99.0, 0.0]), np.array([0.0, 99.0])], [])[0] == pytest.approx(np.log(2))
    p, q = np.array([0.8, 0.2]), np.array([0.3, 0.7])
    by_hand = sum(-m * np.log(m) for m in (p + q) / 2) - np.mean([-(x * np.log(x)).sum() for x in (p, q)])
    assert by_information([np.log(p), np.log(q)], [])[0] == pytest.approx(by_hand)


def test_it_climbs_to_what_is_wanted():
    """Wanted: three genes that no first prompt has together."""

    def fitness(genes):
        return (float(genes.form == "capital") + (genes.synonym == 2) + genes.after.endswith("is"),)

    own = [genes_of(Prompt("{input}\nSo?"))]
    known = search(fitness, own, 8, 6, random.Random(0))
    assert len(known) == 8 * 7
    assert max(known.values()) == (3.0,)
    assert known[own[0]] == (0.0,)
    assert list(known) == list(search(fitness, own, 8, 6, random.Random(0)))
    assert all(isinstance(genes, Genes) for genes in known)


def test_a_run_is_searched(pretrained, pool_folder, pool_cache, capsys):
    settings = [f"pool={pool_folder}", f"cache={pool_cache}", "threads=1", "population=4", "generations=2", "shots=6"]
    assert main(["search", str(pretrained), *settings]) == 0
    first = json.loads((pretrained / "search.json").read_text())
    assert first["prompts"].keys() == {"hidden"}
    assert first["prompts_judged"] == 12
    assert first["prompts"]["hidden"]["fitness"] >= first["prompts"]["hidden"]["fitness_of_own"]
    gain = first["all"]["found_prompt"]["mean"] - first["all"]["mean_prompt"]["mean"]
    assert first["all"]["found_prompt_gain"]["mean"] == pytest.approx(gain)
    assert first["by_task"]["hidden"]["balanced"]["chance"] == pytest.approx(1 / 3)  # its test texts have three labels
    assert first["cost"]["search"]["flops"] > first["cost"]["test"]["flops"] > 0
    assert main(["search", str(pretrained), *settings]) == 0
    again = json.loads((pretrained / "search.json").read_text())
    assert again["prompts"] == first["prompts"]
    assert again["all"] == first["all"]
    assert main(["search", str(pretrained), *settings, "labels=false", "limit=3"]) == 0
    assert json.loads((pretrained / "search.json").read_text())["judged_by"] == "mutual information"
    for more, told in (
        (["categories=[topics]"], "trained on topics"),
        (["population=1"], "population=1"),
        (["rule=head"], "rule=head"),
    ):
        assert main(["search", str(pretrained), *settings, *more]) == 2
        assert told in capsys.readouterr().err
