"""Making things ahead changes when they are made, not what they are."""

import threading

import pytest

from tlm.ahead import Ahead


def test_the_next_is_begun_while_this_one_is_used_and_jumps_are_allowed():
    made, begun = [], threading.Event()

    def make(index):
        made.append(index)
        if index == 8:
            begun.set()
        return index * 10

    with Ahead(make) as ahead:
        assert ahead(7) == 70
        assert begun.wait(5)  # nobody has asked for it yet
        assert ahead(8) == 80
        assert ahead(3) == 30
        assert ahead(4) == 40
    assert made[:2] == [7, 8]
    assert made.count(8) == 1


def test_an_error_is_raised_where_its_result_is_asked_for():
    with Ahead(lambda index: 1 // (2 - index)) as ahead:
        assert ahead(1) == 1
        with pytest.raises(ZeroDivisionError):
            ahead(2)
