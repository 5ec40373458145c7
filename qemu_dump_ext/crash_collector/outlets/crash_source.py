"""Where a report has its crashes from: a store of this host, or what several hosts uploaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from qemu_dump_ext.crash_collector.forms import CRASH_ID
from qemu_dump_ext.crash_collector.outlets.destination import REMOTE_STATES, without_password
from qemu_dump_ext.crash_collector.outlets.html import quoted
from qemu_dump_ext.crash_collector.record import CorruptRecordError, CrashRecord, parse_record
from qemu_dump_ext.crash_collector.store.files import RECORD_FILE
from qemu_dump_ext.crash_collector.store.states import (
    STATES_BYTES_MAX,
    SignatureState,
    SignatureStates,
    parse_states,
)
from qemu_dump_ext.crash_collector.store.store import CrashStore, SignatureCount
from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.third_party import import_package
from qemu_dump_ext.value import Value

_RECORD_BYTES_MAX = 16 << 20
_RECORDS_MAX = 100_000
_HOSTS_MAX = 10_000

_logger = logging.getLogger(__name__)


class SourcedCrash(Value):
    """A crash, and where it is.

    Attributes:
        record: The crash.
        source: Where its files are read.
        host: Whose guest it was; empty where there is one host only.
        where: The directory of the crash, for links; ends in no slash, and is empty where a
            browser can follow none.
        directory: The same, as its source reads it.
    """

    record: CrashRecord
    source: CrashSource
    host: str
    where: str
    directory: str


class CrashSource(Protocol):
    """A store, or a copy of one."""

    name: str

    def crashes(self) -> Iterator[SourcedCrash]:
        """Yield every crash; what cannot be read is logged and passed over."""

    def counts(self) -> Mapping[str, SignatureCount]:
        """Return what was counted, by signature; also of crashes that are gone."""

    def states(self) -> SignatureStates:
        """Return what people made of the signatures."""

    def read_end(self, crash: SourcedCrash, name: str, size: int) -> str:
        """Return the last bytes of a file of a crash; nothing where it cannot be read."""


class StoreSource:
    """A store of this host."""

    def __init__(self, store: CrashStore, page: Path, host: str = "") -> None:
        """Prepare.

        Args:
            store: Whose crashes.
            page: From which links lead to them.
            host: What it is called among others; empty: there are no others.
        """
        self.name = str(store.path)
        self._store = store
        self._host = host
        self._base = Path(os.path.relpath(store.path, page.parent)).as_posix()

    def crashes(self) -> Iterator[SourcedCrash]:
        """Yield every crash."""
        for record in self._store.records():
            directory = str(self._store.directory(record.id))
            where = quoted(f"./{self._base}/{record.id}")
            yield SourcedCrash(record, self, self._host, where, directory)

    def counts(self) -> Mapping[str, SignatureCount]:
        """Return what was counted, by signature."""
        return self._store.signatures()

    def states(self) -> SignatureStates:
        """Return what people made of the signatures."""
        return self._store.states()

    def read_end(self, crash: SourcedCrash, name: str, size: int) -> str:
        """Return the last bytes of a file of a crash."""
        try:
            with Path(crash.directory, name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                return file.read(size).decode("utf-8", "replace")
        except OSError:
            return ""


class RemoteSource:
    """What agents uploaded below a URL: `URL/[HOST/]GUEST/TIME-SIGNATURE/`."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """Connect.

        Args:
            url: Of any kind that fsspec knows.
            options: What fsspec takes besides.

        Raises:
            RequestError: No package for such URLs is installed.
        """
        fsspec = import_package("fsspec", "--from URL")
        self._url = url.rstrip("/")
        self.name = without_password(self._url)
        try:
            self._files, root = fsspec.url_to_fs(self._url, skip_instance_cache=True, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise RequestError(f"cannot look at {self.name}: {error}") from error
        self._root = root.rstrip("/")

    def crashes(self) -> Iterator[SourcedCrash]:
        """Yield every crash.

        Raises:
            SourceError: What is there cannot be listed.
        """
        for path in self._paths(RECORD_FILE)[:_RECORDS_MAX]:
            directory = path.removesuffix(f"/{RECORD_FILE}")
            below = directory.removeprefix(self._root).strip("/").split("/")
            if not CRASH_ID.fullmatch("/".join(below[-2:])):
                continue
            try:
                record = parse_record(self._files.cat_file(path, end=_RECORD_BYTES_MAX))
            except CorruptRecordError as error:
                _logger.warning("%s is passed over: %s", path, error)
                continue
            except Exception as error:  # noqa: BLE001 - as above
                _logger.warning("%s cannot be read: %s", path, error)
                continue
            host = "/".join(below[:-2])
            yield SourcedCrash(record, self, host, self._link("/".join(below)), directory)

    def _link(self, below: str) -> str:
        parts = urlsplit(self.name)
        if parts.scheme in {"http", "https", "file"}:
            return f"{self.name}/{quoted(below)}"
        return ""

    def counts(self) -> Mapping[str, SignatureCount]:
        """Return nothing: what is counted is not uploaded."""
        return {}

    def states(self) -> SignatureStates:
        """Return what people of all hosts made of the signatures."""
        found = []
        for path in self._paths(f"{REMOTE_STATES}*.json")[:_HOSTS_MAX]:
            try:
                found.append(parse_states(self._files.cat_file(path, end=STATES_BYTES_MAX)))
            except Exception as error:  # noqa: BLE001 - as above
                _logger.warning("%s is passed over: %s", path, error)
        return latest_states(found)

    def _paths(self, name: str) -> Sequence[str]:
        try:
            return sorted(map(str, self._files.glob(f"{self._root}/**/{name}")))
        except Exception as error:  # each kind of URL has errors of its own
            raise SourceError(f"cannot look at {self.name}: {error}") from error

    def read_end(self, crash: SourcedCrash, name: str, size: int) -> str:
        """Return the last bytes of a file of a crash."""
        try:
            data: bytes = self._files.tail(f"{crash.directory}/{name}", size)
        except Exception as error:  # noqa: BLE001 - as above
            _logger.warning("%s of %s cannot be read: %s", name, crash.record.id, error)
            return ""
        return data.decode("utf-8", "replace")


def latest_states(all_states: Iterable[SignatureStates]) -> SignatureStates:
    """Return the states of several stores: of each signature, what was said last."""
    known: dict[str, SignatureState] = {}
    for states in all_states:
        for name, state in states.known.items():
            if name not in known or _said(state) > _said(known[name]):
                known[name] = state
    return SignatureStates(known)


def _said(state: SignatureState) -> datetime:
    return (
        datetime.min.replace(tzinfo=UTC)
        if state.changed is None
        else datetime.fromisoformat(state.changed)
    )
