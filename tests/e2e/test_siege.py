"""Short forms of what `support.siege` does to a live server for minutes: nothing may be wrong, however slow it is."""

import os

import pytest

from support.siege import TWO_RANKS, kills, outlived, steady

pytestmark = [
    pytest.mark.slow,  # each starts a server; parts of this are in test_server.py and test_recovery.py
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two CPUs"),
]


def test_many_streams_for_a_while_are_each_what_plain_decoding_says() -> None:
    report = steady(seconds=5.0, num_streams=64, num_tokens=100, overrides=TWO_RANKS)
    assert not report.faults, report


def test_kills_of_anybody_spoil_no_answer_and_leave_nothing() -> None:
    report = kills(
        seconds=20.0, every_s=4.0, num_streams=16, num_tokens=150, seed=1, overrides=(*TWO_RANKS, MANY)
    )
    assert not report.faults, report


def test_streams_outlive_the_server() -> None:
    report = outlived(num_streams=6, num_tokens=400, overrides=TWO_RANKS)
    assert not report.faults, report


MANY = "cluster.max_restarts=100"  # kills come faster here than a busy machine starts a process
