import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlm.batches import IGNORE, pack

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def numbered(lengths):
    """Sequences whose tokens are all different, so that a misplaced one shows."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS)
def test_every_sequence_comes_back_whole_and_in_the_callers_order(lengths):
    sequences = numbered(lengths)
    batch = pack(sequences)
    parts = batch.split(batch.tokens)
    assert [tuple(part.shape) for part in parts] == list(batch.groups)
    packed = [row for part in parts for row in part]
    for sequence, slot in zip(sequences, batch.slots, strict=True):
        assert packed[slot].tolist() == sequence.tolist()
    for part in batch.split(batch.positions):
        assert (part == torch.arange(part.shape[1])).all()
    assert batch.lengths == tuple(lengths)
    assert len(batch) == len(lengths)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(0, 99))
def test_targets_follow_their_tokens(lengths, seed):
    sequences, rng = numbered(lengths), np.random.default_rng(seed)
    targets = [np.where(rng.random(len(s)) < 0.3, s + 1000, IGNORE) for s in sequences]
    batch = pack(sequences, targets)
    assert batch.masked_tokens.tolist() == (batch.tokens[batch.masked] + 1000).tolist()
    assert sorted(batch.masked_tokens.tolist()) == [t for target in targets for t in target if t != IGNORE]


def test_groups_are_views_and_lengths_rise():
    batch = pack(numbered([3, 1, 3, 2]), labels=[7, 8, 9, 6])
    assert batch.groups == ((1, 1), (1, 2), (2, 3))
    flat = torch.zeros(9, 2)
    for i, part in enumerate(batch.split(flat)):
        part += i + 1
    assert flat[:, 0].tolist() == [1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert batch.labels.tolist() == [7, 8, 9, 6]
    assert pack(numbered([2])).labels is None
    assert pack(numbered([2])).masked.shape == (0,)


def test_any_integer_type_becomes_int64():
    batch = pack([np.array([1, 2], dtype=np.uint16)], [np.array([IGNORE, 5], dtype=np.int32)], labels=[1])
    for tensor in (batch.tokens, batch.masked, batch.masked_tokens, batch.labels, batch.to("cpu").slots):
        assert tensor.dtype == torch.int64
