import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlm.optimizers import AdamW8bit
from tlm.pieces import cut, cut_moments


def flat_pieces(content, size, width):
    """As ZeRO 1 and 2 cut: one run, padded to `size` pieces of `width`."""
    return list(torch.nn.functional.pad(content, (0, size * width - len(content))).split(width))


def pieces_by_parameter(parameters, size):
    """As ZeRO 3 cuts: each process holds its share of every parameter."""
    widths = [math.ceil(len(p) / size) for p in parameters]
    shares = [flat_pieces(p, size, width) for p, width in zip(parameters, widths, strict=True)]
    return [torch.cat(of_one) for of_one in zip(*shares, strict=True)]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_a_flat_group_is_cut_as_the_new_processes_would_have(total, old, new, old_slack, new_slack):
    content = torch.arange(1.0, total + 1)
    before, after = (math.ceil(total / n) + slack for n, slack in ((old, old_slack), (new, new_slack)))
    pieces, wanted = flat_pieces(content, old, before), flat_pieces(content, new, after)
    assert all(torch.equal(cut(pieces, [total], [before], [after], rank), wanted[rank]) for rank in range(new))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 5), st.integers(1, 5))
def test_parameters_are_cut_one_by_one(sizes, old, new):
    parameters = [torch.rand(size) for size in sizes]
    pieces, wanted = pieces_by_parameter(parameters, old), pieces_by_parameter(parameters, new)
    before, after = ([math.ceil(size / n) for size in sizes] for n in (old, new))
    assert all(torch.equal(cut(pieces, sizes, before, after, rank), wanted[rank]) for rank in range(new))


@pytest.mark.parametrize("whose", ["ours", "bitsandbytes"])
def test_8_bit_moments_are_refused(whose):
    """bitsandbytes keeps the scales of their blocks in a dict of its own."""
    weight = torch.nn.Parameter(torch.rand(8192))
    weight.grad = torch.rand(8192)
    if whose == "ours":
        optimizer = AdamW8bit([dict(params=[weight])])
    else:
        optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit([weight])
    optimizer.step()
    with pytest.raises(ValueError, match="8-bit"):
        cut_moments([optimizer.state_dict()], lambda pieces, group: pieces[0])


def test_pieces_of_another_size_are_refused():
    with pytest.raises(ValueError, match="512 numbers where 7,028"):
        cut([torch.rand(256), torch.rand(256)], [7028], [256], [7028], 0)
