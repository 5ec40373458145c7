"""What is asked of a monitor by several questions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qemu_dump_ext.connections.libvirt import LibvirtMonitor
from qemu_dump_ext.guest.access import SourceContext


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


class _OneByOne(_Monitor):
    asks_at_once = LibvirtMonitor.asks_at_once


@pytest.mark.parametrize(("kind", "most"), [(_Monitor, 16), (_OneByOne, 1)])
def test_each_question_is_asked_once_and_as_many_at_once_as_the_monitor_takes(kind, most):
    monitor = kind()
    context = SourceContext(monitor, None, ())
    questions = [f"xp {number}" for number in range(40)]
    assert context.ask(questions[:20]) == [f"answer to {one}" for one in questions[:20]]
    assert context.ask([*questions, questions[0]])[-1] == "answer to xp 0"
    assert monitor.asked == questions
    assert monitor.most == most
