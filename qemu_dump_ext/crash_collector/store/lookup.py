"""Find a crash by what people type: the beginning of its ID, `latest`, a guest's name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qemu_dump_ext.crash_collector.forms import CRASH_ID
from qemu_dump_ext.crash_collector.store.summary import crash_directories
from qemu_dump_ext.errors import RequestError

if TYPE_CHECKING:
    from qemu_dump_ext.crash_collector.store.store import CrashStore

LATEST = "latest"
_SHOWN_MAX = 4
_SECONDS_LENGTH = len("20260131T120000")


def find_crash(store: CrashStore, words: str) -> str:
    """Return the ID of the crash that `words` mean.

    Args:
        store: Where it is.
        words: An ID; `latest`; a guest's name, or `GUEST/latest`, for its latest crash; a
            signature, for the latest of it; the beginning of one ID, with or without the guest.

    Raises:
        RequestError: None is meant, or several are; says which.
    """
    ids = sorted(crash_ids(store.path), key=_moment)
    if words in ids:
        return words
    if not ids:
        raise RequestError(f"there is no crash in {store.path}")
    if words == LATEST:
        return ids[-1]
    guest = words.removesuffix(f"/{LATEST}")
    of_guest = [crash_id for crash_id in ids if crash_id.startswith(f"{guest}/")]
    if of_guest:
        return of_guest[-1]
    of_signature = [crash_id for crash_id in ids if words and _signature(crash_id) == words]
    if of_signature:
        return of_signature[-1]
    found = [i for i in ids if words and (i.startswith(words) or _behind_guest(i, words))]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(found[-_SHOWN_MAX:])
        raise RequestError(f"{words!r} begins {len(found)} crashes: ..., {shown}")
    raise RequestError(
        f"there is no crash {words!r} in {store.path}",
        hint="an ID or its beginning, 'latest', or a guest's name, as 'list' shows them",
    )


def find_signature(store: CrashStore, words: str) -> str:
    """Return the signature that `words` mean: its own beginning, or a crash as `find_crash` has it.

    Raises:
        RequestError: None is meant, or several are.
    """
    names = {*store.signatures(), *map(_signature, crash_ids(store.path))}
    found = sorted(name for name in names if words and name.startswith(words))
    if len(found) == 1 or words in found:
        return words if words in found else found[0]
    if found:
        raise RequestError(f"{words!r} begins {len(found)} signatures: {', '.join(found)}")
    return _signature(find_crash(store, words))


def last_crash(store: CrashStore, guest: str) -> str | None:
    """Return the ID of a guest's latest crash; None: it has none. Nothing is read of it."""
    names = [f"{guest}/{path.name}" for path in (store.path / guest).glob("[!.]*")]
    return max(filter(CRASH_ID.fullmatch, names), default=None)


def short_ids(store: Path) -> dict[str, str]:
    """Return for each ID the shortest beginning that means it alone, up to a second at least."""
    ids = sorted(crash_ids(store))
    shortened = {}
    for before, name, behind in zip(["", *ids], ids, [*ids[1:], ""], strict=False):
        size = name.index("/") + 1 + _SECONDS_LENGTH
        while size < len(name) and any(near.startswith(name[:size]) for near in (before, behind)):
            size += 1
        shortened[name] = name[:size]
    return shortened


def crash_ids(store: Path) -> list[str]:
    """Return the IDs of all crashes; nothing is read of them."""
    return [name for name in crash_directories(store) if CRASH_ID.fullmatch(name)]


def _moment(crash_id: str) -> str:
    return crash_id.rpartition("/")[2]


def _behind_guest(crash_id: str, words: str) -> bool:
    return _moment(crash_id).startswith(words)


def _signature(crash_id: str) -> str:
    return _moment(crash_id).partition("-")[2].partition(".")[0]
