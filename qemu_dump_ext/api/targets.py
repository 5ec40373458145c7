"""Where programs let a dump go."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.sinks import Sink, open_sink


def sink_for(file: str | os.PathLike[str] | BinaryIO, *, force: bool) -> Sink:
    """Return what a dump goes to; entering it opens it.

    Args:
        file: Path, or something open for writing that has a descriptor; which stays open.
        force: Replace a file that exists.

    Raises:
        RequestError: It exists already, or has no descriptor.
    """
    if isinstance(file, str | os.PathLike):
        name = f"file:{os.fspath(file)}"
    else:
        name = f"fd:{_descriptor_of(file)}"
    return open_sink(name, force=force, standard_output=None)


def _descriptor_of(file: BinaryIO) -> int:
    try:
        file.flush()
        return file.fileno()
    except (AttributeError, io.UnsupportedOperation) as error:
        raise RequestError(
            "a dump goes to a path, or to an open file that has a descriptor"
        ) from error
