"""A short run of every fuzzer, in a process of its own, whose memory is limited."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.fuzz.mutation import mutate
from tests.fuzz.parsers import PARSERS, Parser
from tests.fuzz.run import fault_of


@pytest.mark.parametrize("name", PARSERS)
def test_every_seed_is_taken(name: str):
    for seed in PARSERS[name].seeds():
        PARSERS[name].use(seed)


def test_whatever_others_wrote_ends_in_an_answer_or_an_error_of_ours():
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--inputs", "200"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("0 kinds of fault") == len(PARSERS)


def test_a_fault_is_noticed():
    def use(data: bytes) -> None:
        data.decode("ascii")

    parser = Parser(lambda: [b""], use)
    assert fault_of(parser, b"fine") is None
    assert "UnicodeDecodeError" in (fault_of(parser, b"\xff") or "")


def test_mutations_are_the_same_for_the_same_seed_and_no_longer_than_allowed():
    seeds = [b"a: 0x10\n" * 50, b"b" * 300]
    once, again = (
        [mutate(seeds[0], seeds, chance, most=500) for _ in range(200)]
        for chance in (random.Random(1), random.Random(1))  # noqa: S311 - to be had again
    )
    assert once == again
    assert len(set(once)) > 150
    assert max(map(len, once)) <= 500
