"""Where finished crashes are uploaded to."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from qemu_dump_ext.crash_collector.config.settings import Upload
from qemu_dump_ext.crash_collector.forms import utc_text
from qemu_dump_ext.crash_collector.record import (
    CrashRecord,
    FileFacts,
    UploadFacts,
    parse_record,
)
from qemu_dump_ext.crash_collector.store.files import CHECKSUM_FILE, RECORD_FILE, record_files
from qemu_dump_ext.crash_collector.store.states import SignatureStates, states_text
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.third_party import import_package

REMOTE_STATES = ".states-"
"""How the name of the file begins that a host has for its states, beside its crashes."""
_BLOCK = 1 << 20
_RECORD_BYTES_MAX = 16 << 20


# Where directories have permissions; object stores have rules of their own.
_CHMOD_OF: dict[str, Callable[[Any], Callable[[str, int], None]]] = {
    "file": lambda files: files.chmod,
    "sftp": lambda files: files.ftp.chmod,
}


class Destination:
    """Where an upload goes.

    Attributes:
        url: The URL as records show it: without a password.
        given_up: Set where nobody waits any more: nothing is changed over there from then on.
    """

    def __init__(self, settings: Upload) -> None:
        """Connect.

        Raises:
            RequestError: No package for such URLs is installed.
        """
        check_upload(settings)
        fsspec = import_package("fsspec", "upload")
        url = settings.url.format(host=socket.gethostname()).rstrip("/")
        # A connection that was lost must not be found again in a cache.
        filesystem, root = fsspec.url_to_fs(url, skip_instance_cache=True, **settings.options)
        self._files: Any = filesystem
        self._root = root.rstrip("/")
        self.url = without_password(url)
        self.given_up = threading.Event()
        self._confirms_content = settings.confirm == "content"

    def put(self, store: CrashStore, record: CrashRecord) -> UploadFacts:
        """Copy a crash; what is there already is not copied again.

        Raises:
            DumpWriteError: It did not arrive as it is here, or the name is taken.
        """
        remote = f"{self._root}/{record.id}"
        local = store.directory(record.id)
        existing = self._record_at(remote)
        if existing is not None and existing.files != record.files:
            raise DumpWriteError(f"{self.url}/{record.id} is another crash")
        self._require_wanted()
        self._files.makedirs(remote, exist_ok=True)
        self._set_mode(remote, 0o700)  # while it is empty
        for name, facts in record.files.items():
            path = f"{remote}/{name}"
            if not self._is_there(path, facts):
                self._require_wanted()
                self._files.put_file(str(local / name), path)
                if not self._is_there(path, facts):
                    raise DumpWriteError(f"{self.url}/{record.id}/{name} is not what was sent")
        if existing is not None and existing.uploaded is not None:
            return existing.uploaded
        uploaded = UploadFacts(f"{self.url}/{record.id}", utc_text(datetime.now(UTC)))
        contents = record_files(replace(record, uploaded=uploaded))
        self._put_small(f"{remote}/{CHECKSUM_FILE}", contents[CHECKSUM_FILE])
        self._put_small(f"{remote}/{RECORD_FILE}", contents[RECORD_FILE])
        return uploaded

    def put_states(self, states: SignatureStates) -> None:
        """Write down there what people made of the signatures of this host.

        Raises:
            DumpWriteError: It did not arrive as it is here.
        """
        self._require_wanted()
        self._files.makedirs(self._root, exist_ok=True)
        name = f"{REMOTE_STATES}{socket.gethostname()}.json"
        self._put_small(f"{self._root}/{name}", states_text(states), mode=0o600)

    def _record_at(self, remote: str) -> CrashRecord | None:
        path = f"{remote}/{RECORD_FILE}"
        self._files.invalidate_cache()
        if not self._files.exists(path):
            return None
        return parse_record(self._files.cat_file(path, end=_RECORD_BYTES_MAX))

    def _set_mode(self, remote: str, mode: int) -> None:
        protocol = self._files.protocol
        chmod = _CHMOD_OF.get(protocol if isinstance(protocol, str) else protocol[0])
        if chmod is not None:
            chmod(self._files)(remote, mode)

    def _is_there(self, path: str, facts: FileFacts) -> bool:
        self._files.invalidate_cache()
        try:
            if self._files.info(path)["size"] != facts.bytes:
                return False
            if not self._confirms_content:
                return True
            digest = hashlib.sha256()
            with self._files.open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except FileNotFoundError:
            return False
        return digest.hexdigest() == facts.sha256

    def _require_wanted(self) -> None:
        if self.given_up.is_set():
            raise DumpWriteError(f"{self.url}: given up")

    def _put_small(self, path: str, content: bytes, *, mode: int | None = None) -> None:
        self._require_wanted()
        self._files.pipe_file(f"{path}.part", content)
        if mode is not None:
            self._set_mode(f"{path}.part", mode)
        if self._files.cat_file(f"{path}.part") != content:
            raise DumpWriteError(f"{self.url}: {path} is not what was sent")
        self._require_wanted()
        self._files.mv(f"{path}.part", path)


def check_upload(settings: Upload) -> None:
    """Look whether there is a package for such URLs; nobody is asked.

    Raises:
        RequestError: There is none; says which one would be.
    """
    fsspec = import_package("fsspec", "upload")
    scheme = urlsplit(settings.url).scheme
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise RequestError(f"cannot upload to {scheme}://: {error}") from error


def without_password(url: str) -> str:
    """Return a URL as it may be shown."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    shown = parts.netloc.replace(f":{parts.password}@", "@", 1)
    return parts._replace(netloc=shown).geturl()
