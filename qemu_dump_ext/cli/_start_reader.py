"""Start a reader in place of this program."""

from __future__ import annotations

import os
from typing import NoReturn

from qemu_dump_ext.engine.opening import Opening
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import tell


def start_reader(opening: Opening) -> NoReturn:
    """Say what is started, and become it.

    Raises:
        RequestError: It cannot be started.
    """
    tell(printable(opening.line()))
    try:
        os.execvp(opening.argv[0], opening.argv)  # noqa: S606 - what the user wants to be in
    except OSError as error:
        raise RequestError(f"cannot start {opening.argv[0]}: {error.strerror}") from error
