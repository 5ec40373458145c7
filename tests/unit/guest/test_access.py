"""What is asked of a monitor by several questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from qemu_dump_ext.connections.libvirt import LibvirtMonitor
from qemu_dump_ext.guest.access import AskedOnce, GuestAccess, SourceContext, execute_all


class _Monitor:
    """Answers with the question; knows how many were begun before one was waited for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.most = 0
        self._begun = 0

    def execute(self, command: str) -> str:
        return self.begin(command)()

    def begin(self, command: str) -> Callable[[], str]:
        self.asked.append(command)
        self._begun += 1
        self.most = max(self.most, self._begun)

        def answer() -> str:
            self._begun -= 1
            return f"answer to {command}"

        return answer


class _Batches(_Monitor):
    def begin_all(self, commands: Sequence[str]) -> list[Callable[[], str]]:
        self.batches.append(len(commands))
        return [self.begin(command) for command in commands]

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []


class _OneByOne(_Monitor):
    asks_at_once = LibvirtMonitor.asks_at_once


@pytest.mark.parametrize(("kind", "most"), [(_Monitor, 16), (_Batches, 16), (_OneByOne, 1)])
def test_each_question_is_asked_once_and_as_many_at_once_as_the_monitor_takes(kind, most):
    monitor = kind()
    still = SourceContext(monitor, None, ()).still
    questions = [f"xp {number}" for number in range(40)]
    assert still.ask(questions[:20]) == [f"answer to {one}" for one in questions[:20]]
    assert still.ask([*questions, questions[0]])[-1] == "answer to xp 0"
    assert still.execute("xp 39") == "answer to xp 39"
    assert monitor.asked == questions
    assert monitor.most == most


def test_questions_go_in_batches_where_a_monitor_takes_them_so():
    monitor = _Batches()
    execute_all(monitor, [f"xp {number}" for number in range(40)])
    assert monitor.batches == [16, 16, 8]


def test_what_lasts_is_asked_once_of_all_that_know_the_guest_by_one_access():
    monitor = _Monitor()
    access = GuestAccess.by_monitor(monitor)
    access.lasting.ask(["info version", "info kvm"])
    assert replace(access, pid=1).lasting.execute("info kvm") == "answer to info kvm"
    assert monitor.asked == ["info version", "info kvm"]


def test_what_is_asked_once_is_known_to_who_asks_several_questions():
    monitor = _Monitor()
    known = AskedOnce(monitor)
    known.ask(["info cpus"])
    assert execute_all(known, ["info cpus", "info kvm"])[0] == "answer to info cpus"
    assert monitor.asked == ["info cpus", "info kvm"]
