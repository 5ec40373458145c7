"""What a fixture gives for its parameters, made side by side: a stopped QEMU leaves CPUs idle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _NoCall:
    params: Mapping[str, Any] = {}


_NO_CALL = _NoCall()
NamedT = TypeVar("NamedT", bound=_Named)
ResultT = TypeVar("ResultT")


@contextmanager
def made_side_by_side(
    request: pytest.FixtureRequest,
    directory: pytest.TempPathFactory,
    fixture: str,
    make: Callable[[NamedT, Path], ResultT],
) -> Iterator[Mapping[str, Future[ResultT]]]:
    """Begin to make all that the tests of a module will ask `fixture` for.

    Args:
        request: Of a fixture of the module.
        directory: Has a folder of its own for each parameter, which is removed at the end.
        fixture: Its name; its parameters have names, of which no two are the same.
        make: Gets a parameter and its folder; runs in a thread.

    Yields:
        What is made, by name of the parameter.
    """
    parameters: dict[str, NamedT] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module:
            found: NamedT | None = getattr(item, "callspec", _NO_CALL).params.get(fixture)
            if found is not None:
                parameters.setdefault(found.name, found)
    folders = {name: directory.mktemp(name) for name in parameters}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield {
            name: pool.submit(make, parameter, folders[name])
            for name, parameter in parameters.items()
        }
    finally:
        pool.shutdown(cancel_futures=True)
        for folder in folders.values():
            shutil.rmtree(folder)
