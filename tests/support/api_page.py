"""The examples of docs/api.md, which are run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import qemu_dump_ext
from tests.support.waiting import wait_until

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text("utf-8")
_EXAMPLE = re.compile(
    r"(?P<linux><!-- a Linux guest -->\n\n)?```python\n(?P<code>.*?)```", re.DOTALL
)
_SOCKET = "/run/vm.qmp"


def run_examples(qmp_socket: Path, *, of_linux: bool, **names: object) -> dict[str, object]:
    """Run the examples for a guest one behind the other, in the working directory.

    Args:
        qmp_socket: Of the guest, which stands for the one in the page.
        of_linux: Those that want a Linux guest, or the others.
        names: What is known before.

    Returns:
        The names that they leave.
    """
    known: dict[str, object] = {**names, "qd": qemu_dump_ext}
    for example in _EXAMPLE.finditer(PAGE):
        if (example["linux"] is not None) == of_linux:
            line = PAGE.count("\n", 0, example.start("code"))
            code = example["code"].replace(_SOCKET, str(qmp_socket))
            # QEMU may still have to notice that the example before has left.
            wait_until(lambda: _is_free(qmp_socket), "nobody is connected")
            exec(compile("\n" * line + code, "docs/api.md", "exec"), known)  # noqa: S102 - ours
    return known


def _is_free(socket: Path) -> bool:
    ways = (way for found in qemu_dump_ext.guests() for way in found.ways)
    return any(way.address == str(socket) and not way.taken for way in ways)
