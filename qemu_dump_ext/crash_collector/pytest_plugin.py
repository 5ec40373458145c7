"""pytest: when a test fails, what its guests leave behind is stored, and the report says where.

::

    def test_something(qemu_guest_crash):
        with start_my_guest() as guest:
            qemu_guest_crash(guest.qmp_socket, name="web1", console=guest.console_log)
            assert guest.works()

Loaded in every pytest that has this package beside it: what it needs is imported when a test fails.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from qemu_dump_ext.third_party import require_extra
from qemu_dump_ext.value import Value

_OPTION = "--qemu-crash-dir"
_SECTION = "qemu guest crash"
_FIXTURE = "qemu_guest_crash"


class RegisterGuest(Protocol):
    """What the fixture is."""

    def __call__(
        self,
        qmp_socket: str | Path,
        *,
        name: str | None = None,
        console: str | Path | None = None,
    ) -> None:
        """Collect this guest if the test fails; arguments as `collect_crash` takes them."""


class _Registered(Value):
    qmp_socket: str | Path
    name: str | None
    console: str | Path | None
    directory: Callable[[], Path]


_GUESTS = pytest.StashKey[list[_Registered]]()
_DIRECTORY = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare where crashes go."""
    parser.getgroup("qemu").addoption(
        _OPTION,
        metavar="DIR",
        type=Path,
        help="where the guests of failing tests are stored; default: a directory beside those of"
        " tmp_path",
    )


@pytest.fixture
def qemu_guest_crash(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> RegisterGuest:
    """Register a QEMU guest: if the test fails, its dump, log and console are stored."""
    require_extra("collector", _FIXTURE)

    def directory() -> Path:
        config = request.config
        if _DIRECTORY not in config.stash:
            chosen = config.getoption(_OPTION)
            config.stash[_DIRECTORY] = chosen or tmp_path_factory.mktemp("qemu-guest-crash")
        return config.stash[_DIRECTORY]

    def register(
        qmp_socket: str | Path, *, name: str | None = None, console: str | Path | None = None
    ) -> None:
        guests = request.node.stash.setdefault(_GUESTS, [])
        guests.append(_Registered(qmp_socket, name, console, directory))

    return register


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Collect before anything is torn down; a guest is collected once."""
    report = yield
    if report.failed:
        for guest in item.stash.get(_GUESTS, []):
            where, said = _collect(guest, item.nodeid)
            report.sections.append((_SECTION, "\n".join((where, *said))))
            for owner in (report, item):  # junit takes those of the item
                owner.user_properties.append((_FIXTURE, where))
        item.stash[_GUESTS] = []
    return report


def _collect(guest: _Registered, test: str) -> tuple[str, Sequence[str]]:
    """Return where the crash is stored, or why not, and what the kernel said of it."""
    from qemu_dump_ext.crash_collector.collect.signature import (  # noqa: PLC0415 - see above
        report_of_directory,
    )
    from qemu_dump_ext.crash_collector.collect_now import collect_crash  # noqa: PLC0415
    from qemu_dump_ext.errors import DumpError  # noqa: PLC0415
    from qemu_dump_ext.printable import printable  # noqa: PLC0415

    try:
        directory = collect_crash(
            guest.qmp_socket,
            guest.directory(),
            name=guest.name,
            console=guest.console,
            detail=f"{test} failed",
            labels={"test": test},
            message=test,
        )
    except (DumpError, OSError) as error:  # the test's own failure must be seen
        return f"not stored: {error}", ()
    return str(directory), [printable(line, keep="\t") for line in report_of_directory(directory)]
