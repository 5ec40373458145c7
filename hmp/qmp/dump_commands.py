"""The commands of QMP about dumps, which the proxy answers itself."""

from __future__ import annotations

import asyncio
from argparse import ArgumentTypeError
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from qemu_dump_ext.dump_formats import all_dump_formats, find_dump_format, format_by_words
from qemu_dump_ext.engine.capabilities import query_capabilities
from qemu_dump_ext.errors import CodecUnavailableError, RequestError, UnsupportedTargetError
from qemu_dump_ext.options.dump_options import DEFAULT_CODEC, parse_dump_level
from qemu_dump_ext.plan.request import (
    DEFAULT_FORMAT,
    MINI_DUMPS,
    DumpRequest,
    Live,
    MemoryRange,
)
from qemu_dump_ext.value import Value

from ..dump_job import DumpJob
from ..dump_manager import DumpManager
from ..dump_target import DumpTarget, is_for_qemu_alone
from ..human.command_table import DUMP_COMMAND
from ..human.interpreter import DumpDefaults
from ..upstream.by_qmp import QmpUpstream, formats_of
from .descriptors import NamedDescriptors
from .messages import LeftToQemuError, Message, arguments_of, name_of

CommandHandler = Callable[[Message], Coroutine[Any, Any, object]]
"""Returns what a command returns."""

_BY_DESCRIPTOR, _BY_NAME = "fd:", "file:"
_ARGUMENTS = frozenset(("paging", "protocol", "detach", "begin", "length", "format"))
_INT_MAX = (1 << 63) - 1


class _Destination(Value):
    # Where a dump goes, and what is to be done when QEMU would have used it up.
    target: DumpTarget
    release: Callable[[], None]
    forget: Callable[[], None]


class DumpCommands:
    """The dump commands of one client."""

    def __init__(
        self,
        upstream: QmpUpstream,
        dumps: DumpManager,
        defaults: DumpDefaults,
        descriptors: NamedDescriptors,
        gone: Callable[[], Coroutine[Any, Any, object]],
    ) -> None:
        self._upstream = upstream
        self._dumps = dumps
        self._defaults = defaults
        self._descriptors = descriptors
        self._gone = gone
        self.handlers: Mapping[str, CommandHandler] = {
            DUMP_COMMAND: self._dump,
            "query-dump": self._query_dump,
            "query-dump-guest-memory-capability": self._query_capability,
        }

    async def _query_dump(self, request: Message) -> object:
        if arguments_of(request) or self._dumps.job is None or self._dumps.latest_is_native:
            raise LeftToQemuError
        return self._dumps.query()

    async def _query_capability(self, request: Message) -> object:
        if arguments_of(request):
            raise LeftToQemuError
        native = formats_of(await self._upstream.call(name_of(request)))
        known = all_dump_formats()
        # Of every guest but one: QEMU tells which may be one of Windows.
        ours = [
            name
            for name in query_capabilities().formats
            if name in native or not known[name].of_windows
        ]
        return {"formats": [*ours, *(name for name in native if name not in ours)]}

    async def _dump(self, request: Message) -> object:
        arguments = arguments_of(request)
        dump_request = _request_of(arguments, mended=self._defaults.mended)
        destination = self._destination_of(arguments["protocol"])
        try:
            job = await self._dumps.start(
                dump_request,
                destination.target,
                self._defaults.memory,
                release=destination.release,
            )
        except UnsupportedTargetError as error:
            destination.forget()
            raise LeftToQemuError from error
        except CodecUnavailableError as error:
            codec = find_dump_format(dump_request.format).codec
            raise RequestError(f"kdump-{codec} is not available now") from error
        if not arguments.get("detach", False):
            await self._wait(job)
        return {}

    async def _wait(self, job: DumpJob) -> None:
        gone = asyncio.ensure_future(self._gone())
        ends: set[asyncio.Future[Any]] = {job.finished, gone}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not job.finished.done():
            job.cancel()
        await asyncio.shield(job.finished)

    def _destination_of(self, protocol: str) -> _Destination:
        if protocol.startswith(_BY_DESCRIPTOR):
            return self._descriptor_of(protocol, protocol.removeprefix(_BY_DESCRIPTOR))
        name, directory = protocol.removeprefix(_BY_NAME), self._upstream.qemu_directory()
        if is_for_qemu_alone(name, directory):
            raise LeftToQemuError
        return _Destination(DumpTarget(name, directory / name), _nothing, _nothing)

    def _descriptor_of(self, protocol: str, name: str) -> _Destination:
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            raise LeftToQemuError
        return _Destination(
            DumpTarget(protocol, None, descriptor),
            release=partial(self._use_up, name),
            forget=partial(self._descriptors.drop, name),
        )

    def _use_up(self, name: str) -> None:
        self._descriptors.drop(name)
        closing = {"execute": "closefd", "arguments": {"fdname": name}}
        self._upstream.post(closing, lambda _reply: None)


def _with_live(request: DumpRequest, value: object) -> DumpRequest:
    if value not in tuple(Live):
        raise RequestError(f"one of {', '.join(Live)} expected")
    return replace(request, live=Live(str(value)))


def _with_level(request: DumpRequest, value: object) -> DumpRequest:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise RequestError("a number, or a text such as '31!', expected")
    try:
        level = parse_dump_level(str(value))
    except ArgumentTypeError as error:
        raise RequestError(str(error)) from error
    return replace(request, dump_level=level.number, dump_level_required=level.required)


def _with_mini(request: DumpRequest, value: object) -> DumpRequest:
    for kind in MINI_DUMPS:
        if value == kind:
            # QEMU has none, so it cannot be as QEMU writes it.
            return replace(request, mini=kind, exact=False)
    raise RequestError(f"one of {', '.join(MINI_DUMPS)} expected")


def _with_size(request: DumpRequest, value: object) -> DumpRequest:
    if not isinstance(value, int) or not _is_bound(value) or not value:
        raise RequestError("a number of bytes above 0 expected")
    return replace(request, max_bytes=value)


_EXTENSIONS: Mapping[str, Callable[[DumpRequest, Any], DumpRequest]] = {
    "x-live": _with_live,
    "x-dump-level": _with_level,
    "x-mini": _with_mini,
    "x-max-bytes": _with_size,
}
"""Arguments that QEMU does not have: what the options of such names are on the command line."""


def _request_of(arguments: Mapping[str, Any], *, mended: bool) -> DumpRequest:
    if not _is_ours(arguments):
        raise LeftToQemuError
    begin = arguments.get("begin")
    request = DumpRequest(
        format=_format_of(arguments),
        exact=not mended,
        paging=arguments["paging"],
        memory_range=None if begin is None else MemoryRange(begin, arguments["length"]),
    )
    for name in _extensions_in(arguments):
        try:
            request = _EXTENSIONS[name](request, arguments[name])
        except RequestError as error:
            raise RequestError(f"{name}: {error.message}") from error
    try:
        find_dump_format(request.format).check(request)
    except RequestError as error:
        if _extensions_in(arguments):  # QEMU would name an argument, and not what is wrong
            raise
        raise LeftToQemuError from error
    return request


def _extensions_in(arguments: Mapping[str, Any]) -> list[str]:
    return [name for name in _EXTENSIONS if name in arguments]


def _format_of(arguments: Mapping[str, Any]) -> str:
    usual = format_by_words(DEFAULT_CODEC, raw=False) if "x-mini" in arguments else DEFAULT_FORMAT
    return str(arguments.get("format", usual))


def _is_ours(arguments: Mapping[str, Any]) -> bool:
    # What QEMU would refuse is left to QEMU, for its words.
    dump_format, protocol = arguments.get("format", DEFAULT_FORMAT), arguments.get("protocol")
    bounds = [arguments[name] for name in ("begin", "length") if name in arguments]
    return (
        not arguments.keys() - _ARGUMENTS - _EXTENSIONS.keys()
        and isinstance(arguments.get("paging"), bool)
        and isinstance(arguments.get("detach", False), bool)
        and isinstance(protocol, str)
        and protocol.startswith((_BY_NAME, _BY_DESCRIPTOR))
        and isinstance(dump_format, str)
        and dump_format in all_dump_formats()
        and len(bounds) != 1
        and all(map(_is_bound, bounds))
    )


def _is_bound(value: object) -> bool:
    # QMP's int has 64 bits and a sign; what QEMU makes of a negative one depends on its version.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _INT_MAX


def _nothing() -> None:
    pass
