import pytest

from tlm.ledger import WATTS, Ledger, Meter, Power, paper_flops

# The paper's hyper-parameters by task, in its order AG, Hyp, Help, IMDB, ACL, SciERC, Chem, RCT (arXiv 2111.04130,
# appendix): steps in thousands, batch, tokens a text; parameters in millions; and the FLOPs it reports (table 1, the
# mean over the tasks). IMDB small: own texts of 512 tokens to external ones of 128 as 1 to 19.
PAPER = {
    "small": (
        [100, 50, 150, 150, 150, 150, 150, 100],
        [256] * 8,
        [128] * 3 + [(512 + 19 * 128) / 20] + [128] * 4,
        109,
        2.74e18,
    ),
    "medium": ([300, 100, 300, 300, 300, 300, 300, 300], [256] * 8, [128] * 3 + [512] + [128] * 4, 109, 8.30e18),
    "large": (
        [500, 300, 500, 500, 500, 300, 500, 500],
        [256, 512, 512, 512, 512, 512, 256, 256],
        [128] * 3 + [512] + [128] * 4,
        355,
        7.59e19,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_rule_reproduces_the_papers_flops(size):
    steps, batch, length, millions, reported = PAPER[size]
    tasks = [
        paper_flops(millions * 10**6, round(thousands * 1000 * texts * tokens))
        for thousands, texts, tokens in zip(steps, batch, length, strict=True)
    ]
    assert sum(tasks) / len(tasks) == pytest.approx(reported, rel=0.001)


def test_the_meter_reads_means_and_fills_the_ledger():
    ledger = Ledger()
    meter = Meter(ledger, peak_flops=1e9)
    meter.begin("joint")
    for mlm, task in ((8.0, 0.0), (4.0, 6.0)):
        meter.add(
            loss=1.5, mlm=mlm, masked=4, task=task, texts=3 if task else 0, tokens=10, external_tokens=5, flops=100
        )
        meter.add(steps=1)
    values = meter.read(list)
    assert (values["loss"], values["mlm_loss"], values["task_loss"]) == (1.5, 1.5, 2.0)
    assert (ledger.flops, ledger.tokens, ledger.joint_tokens, ledger.external_tokens) == (200, 20, 20, 10)
    meter.begin("finetune")
    meter.add(loss=1.0, task=2.0, texts=2, tokens=10, flops=50, steps=1)
    assert meter.read(list)["mlm_loss"] is None
    assert (ledger.flops, ledger.tokens, ledger.joint_tokens) == (250, 30, 20)
    assert set(ledger.seconds) == {"joint", "finetune"}


def test_a_ledger_comes_back_from_its_state():
    ledger = Ledger(flops=3, tokens=4, joint_tokens=2, seconds={"joint": 1.5})
    copy = Ledger(**ledger.state())
    copy.add_seconds("joint", 1.0)
    assert copy.seconds == {"joint": 2.5}
    assert ledger.seconds == {"joint": 1.5}


def test_a_phase_is_charged_even_when_it_fails():
    ledger = Ledger()
    with pytest.raises(ValueError, match="stop"), ledger.phase("retrieval"):
        raise ValueError("stop")
    assert ledger.seconds["retrieval"] >= 0


def test_power_is_read_from_the_counters_which_run_over(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000\n")
    (zone / "energy_uj").write_text("900000\n")
    power = Power(tmp_path)
    power.began -= 10.0
    (zone / "energy_uj").write_text("950000\n")
    power.sample()
    (zone / "energy_uj").write_text("50000\n")
    assert power.watts() == pytest.approx(0.15 / 10, rel=0.01)
    assert Power(tmp_path / "absent").watts() is None


def test_energy_that_cannot_be_read_is_called_estimated(monkeypatch, tmp_path):
    monkeypatch.setattr("tlm.ledger.POWER", Power(tmp_path))
    cost = Ledger(seconds={"joint": 10.0}).cost(1)
    assert (cost["energy_joules"], cost["energy_is_estimated"]) == (10 * WATTS, True)
