import pytest

from tasks.errors import InputError
from tlm import config as configs
from tlm.config import TrainConfig, load, validate


def resolved(*arguments):
    return validate(load(TrainConfig, list(arguments)))


def test_defaults_then_yaml_then_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: small\njoint:\n  steps: 7\n  lr: 0.5\n")
    config = resolved(str(path), "joint.lr=0.25")
    assert (config.model.size, config.model.hidden, config.joint.steps, config.joint.lr) == ("small", 256, 7, 0.25)


def test_a_word_for_a_group_sets_its_first_key():
    config = resolved("model=tiny", "init=random", "run=42")
    assert (config.model.size, config.init.method, config.run) == ("tiny", "random", "42")


def test_deepspeed_keys_pass_through():
    assert resolved("deepspeed.zero_optimization.stage=1").deepspeed == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("joint.stps=3", "did you mean joint.steps"),
        ("lr=3", "joint.lr"),
        ("joint.steps=abc", "joint.steps=abc"),
        ("joint.steps=", "needs a value"),
        ("joint.steps=-1", "at least 0"),
        ("joint.mask_rate=1.5", "joint.mask_rate=1.5"),
        ("finetune.batch_ramp=-0.1", "finetune.batch_ramp=-0.1"),
        ("joint.average_share=7", "joint.average_share=7"),
        ("finetune.average=ena", "did you mean ema"),
        ("model=huge", "not a valid choice"),
        ("optimizer=muoon", "did you mean muon"),
        ("optimizer=adam8bit", "did you mean adamw8bit"),
        ("model.hidden=100", "model.heads"),
        ("deepspeed=3", "deepspeed=3"),
        ("absent.yaml", "no such file"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(argument, words):
    with pytest.raises(InputError, match="(?s).*") as error:
        resolved(argument)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_yaml_file_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("joint: [1,\n")
    with pytest.raises(InputError, match=r"broken\.yaml.*not valid YAML"):
        resolved(str(path))


def test_the_hash_covers_what_decides_the_result_alone():
    base = configs.sha256(resolved("task=a"))
    assert configs.sha256(resolved("task=a", "out=elsewhere", "run=b", "checkpoint_seconds=1")) == base
    assert configs.sha256(resolved("task=a", "seed=1")) != base
    assert configs.sha256(resolved("task=a", "joint.lr=0.1")) != base
