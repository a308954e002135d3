"""`spread`: the same results whether this process does the work, others do, or both."""

import os
import time

import pytest

from colintern.files import parallel
from colintern.files.parallel import spread


def where(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def slowly(number: int) -> tuple[int, int]:
    time.sleep(0.15)
    return where(number)


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_results_come_in_order_from_here_or_from_other_processes(monkeypatch, seconds):
    monkeypatch.setattr(parallel, "START", seconds)
    found = list(spread(where, range(9), "squares", "number"))
    assert [square for square, _ in found] == [number * number for number in range(9)]
    assert {process == os.getpid() for _, process in found} == {seconds > 0}


def test_what_is_left_after_the_first_seconds_goes_to_other_processes(monkeypatch):
    monkeypatch.setattr(parallel, "START", 0.2)
    found = list(spread(slowly, range(5), "squares", "number"))
    assert [square for square, _ in found] == [0, 1, 4, 9, 16]
    assert [process == os.getpid() for _, process in found] == [True, True, False, False, False]


def test_nothing_to_do():
    assert list(spread(where, [], "squares", "number")) == []
