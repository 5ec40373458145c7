"""What a fixture gives for its parameters, made side by side: a stopped QEMU leaves CPUs idle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pytest


class _Named(Protocol):
    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=_Named)
ResultT = TypeVar("ResultT")


class SideBySide(Generic[NamedT, ResultT]):
    """Makes things of parameters, as many at a time as there are CPUs."""

    def __init__(
        self,
        make: Callable[[NamedT, Path], ResultT],
        parameters: Mapping[str, NamedT],
        directory: pytest.TempPathFactory,
    ) -> None:
        self._folders = {name: directory.mktemp(name) for name in parameters}
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._results: dict[str, Future[ResultT]] = {
            name: self._pool.submit(make, parameter, self._folders[name])
            for name, parameter in parameters.items()
        }

    def result(self, parameter: NamedT) -> ResultT:
        """Return what was made, once it is."""
        return self._results[parameter.name].result()

    def discard(self, parameter: NamedT) -> None:
        """Remove its folder, which otherwise stays until the end."""
        shutil.rmtree(self._folders.pop(parameter.name))

    def close(self) -> None:
        """Begin nothing more, wait for what has begun, and remove all folders."""
        self._pool.shutdown(cancel_futures=True)
        for folder in self._folders.values():
            shutil.rmtree(folder)


@contextmanager
def made_side_by_side(
    request: pytest.FixtureRequest,
    directory: pytest.TempPathFactory,
    fixture: str,
    make: Callable[[NamedT, Path], ResultT],
) -> Iterator[SideBySide[NamedT, ResultT]]:
    """Begin to make all that the tests of a module will ask `fixture` for.

    Args:
        request: Of a fixture of the module.
        directory: Where each parameter gets a folder of its own.
        fixture: Its name; its parameters have names, of which no two are the same.
        make: Gets a parameter and its folder; runs in a thread.
    """
    parameters: dict[str, NamedT] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module:
            found: NamedT | None = getattr(item, "callspec", _NO_CALL).params.get(fixture)
            if found is not None:
                parameters.setdefault(found.name, found)
    made = SideBySide(make, parameters, directory)
    try:
        yield made
    finally:
        made.close()


class _NoCall:
    params: Mapping[str, Any] = {}


_NO_CALL = _NoCall()
