"""Curves out of records made up here: stages joined, steps done again, spikes marked."""

from matplotlib.figure import Figure

from tlm import curves
from tlm.curves import LIGHT, TOTAL


def train(step, loss, stage="joint"):
    return {"stage": stage, "step": step, "kind": "train", "loss": loss}


def spike(step, stage="joint"):
    return {"stage": stage, "step": step, "kind": "spike", "trouble": "the loss is nan", "action": "rewind"}


def test_a_curve_joins_the_stages():
    records = [
        {"stage": "joint", "step": 10, "kind": "train", "task_loss": 2.0, "mlm_loss": None},
        {"stage": "joint", "step": 20, "kind": "train", "task_loss": 1.0, "mlm_loss": 5.0},
        {"stage": "joint", "step": 20, "kind": "dev", "accuracy": 0.5},
        {"stage": "finetune", "step": 10, "kind": "train", "task_loss": 0.5, "mlm_loss": None},
    ]
    mlm, task_loss, dev = curves.panels("accuracy")
    assert curves.curve(records, mlm) == ([20], [5.0])
    assert curves.curve(records, task_loss) == ([10, 20, 30], [2.0, 1.0, 0.5])
    assert curves.curve(records, dev) == ([20], [50.0])


def test_of_steps_done_again_the_last_count():
    records = [train(10, 3.0), train(20, 2.0), spike(25), train(10, 3.1), train(20, 2.1), train(30, 1.0)]
    assert curves.curve(records, TOTAL) == ([10, 20, 30], [3.1, 2.1, 1.0])


def test_spikes_are_triangles_on_the_curve_and_words():
    """One at joint step 15; one at finetune step 5, which is step 35; one where there is no curve yet."""
    joint = [train(10, 3.0), spike(15), train(20, 2.0), train(30, 1.0)]
    run = [spike(2), *joint, spike(5, "finetune"), train(10, 0.5, "finetune")]
    axes = Figure().subplots()
    curves.draw(axes, LIGHT, TOTAL, {"tlm": [run]})
    (triangles,) = axes.collections
    assert triangles.get_offsets().tolist() == [[15.0, 2.5], [35.0, 0.75]]
    words = curves.in_words(TOTAL, {"tlm": [run]})
    assert words == "Total loss over the optimizer steps: TLM from 3.00 to 0.50, best 0.50. Loss spikes: 3."


def test_small_phases_are_drawn_as_one():
    axes = Figure().subplots()
    costs = {"a": {f"phase_{i}": float(i) for i in range(1, 9)}, "b": {"fit": 0.5}}
    curves.draw_costs(axes, LIGHT, "Seconds", costs)
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {**{f"phase {i}": [float(i), 0.0] for i in (8, 7, 6, 5, 4)}, "other": [6.0, 0.5]}


def test_more_runs_than_colours_differ_in_their_dashes():
    names = [*(f"run {i}" for i in range(10)), "tlm", "random"]
    axes = Figure().subplots()
    curves.draw(axes, LIGHT, TOTAL, {name: [[train(1, 1.0), train(2, 1.0)]] for name in names})
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12
