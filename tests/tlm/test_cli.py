import subprocess
import sys
import time

import pytest

from tlm import __version__
from tlm.cli import VERBS, main


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb}" in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_lists_its_keys(verb, capsys):
    from tlm.config import rows_of

    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown and text in shown for key, _, _, text in rows_of(VERBS[verb].config()))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tlm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean train"),
        (["train"], "task=: missing"),
        (["bench"], "bench: no such verb; use one of bench train, bench retrieval"),
        (["bench", "resmue", "task=x"], "bench resmue: no such verb; did you mean bench resume?"),
        (["bench", "task=x"], "use one of bench train"),
        (["bench", "resume"], "task=: missing; `tlm bench resume task=...` needs it"),
        (["pool"], "use one of pool build, pool show"),
        (["train", "task=absent-folder", "--fast"], "--fast: no such option"),
        (["train", "extra"], "not key=value"),
        (["train", "task=absent-folder"], "absent-folder"),
        (["eval"], "say which run"),
        (["eval", "absent-run"], "no such run"),
        (["predict", "absent-run"], "no such run"),
        (["export", "absent-run", "out=x"], "absent-run"),
        (["export", "absent-run"], "out=: missing"),
        (["retrieve", "task=x"], "corpus=: missing"),
        (["retrieve", "--dry-run", "task=x", "corpus=y"], "no dry run"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy():
    """The goal is half a second; what decides it is what is imported, whatever the machine's load."""
    heavy = "torch numpy deepspeed numba sklearn pyarrow tokenizers matplotlib omegaconf datasets rich".split()
    code = (
        "import sys; from tlm.cli import main; main(['train', '--help']);"
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stderr.strip() == "[]"


def test_help_answers_within_half_a_second():
    def once():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tlm", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 0.5
