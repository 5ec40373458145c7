"""Whether there may be a dump now: of a signature, of a guest, and for the disk."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

from qemu_dump_ext.crash_collector.config.settings import Limits
from qemu_dump_ext.crash_collector.store.prune import prune
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.errors import NoRoomLeftError
from qemu_dump_ext.value import Value

_MIB = 1 << 20

Limit: TypeAlias = Literal["dumps_per_signature", "rate", "free"]
LIMITS: tuple[Limit, ...] = get_args(Limit)
"""Words of the configuration for which a crash has no dump."""


class Refusal(Value):
    """Why there must be no dump of a crash.

    Attributes:
        limit: What does not allow it.
        text: For people.
    """

    limit: Limit
    text: str


class CollectionGivenUpError(Exception):
    """Not an error of the crash: nothing is stored, and it stays in the journal."""


class DumpAllowance:
    """The dumps of one collection.

    Attributes:
        signatures: The signatures of those that were allowed.
    """

    def __init__(self, budget: DumpBudget) -> None:
        self.signatures: Counter[str] = Counter()
        self._budget = budget

    def refusal(
        self, guest: Guest, signature_id: str | None, *, asked_for: bool = False
    ) -> Refusal | None:
        """Return why there must be no dump of a crash of this signature, or None.

        Args:
            guest: Whose crash.
            signature_id: The signature ID of the crash; None: the dump will tell, and `surplus` is
                asked then; or the signature tells too little to cost a dump.
            asked_for: Somebody wants this dump: only the disk can refuse it.
        """
        return self._budget.allow(guest, signature_id, self.signatures, asked_for=asked_for)

    def surplus(self, guest: Guest, signature_id: str) -> Refusal | None:
        """Return why a dump that was allowed is not kept, now that its signature is known."""
        return self._budget.keep(guest, signature_id, self.signatures)


class DumpBudget:
    """Shared by all collections of an agent; may be used by several threads.

    Attributes:
        limits: The limits of the store; may be replaced at any time.
        ending: Set when the agent ends: what is under way is given up.
        needs_upload: What is not uploaded yet is never removed.
    """

    def __init__(
        self,
        store: CrashStore,
        limits: Limits,
        *,
        needs_upload: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.needs_upload = needs_upload
        self.ending = threading.Event()
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()
        self._recent: defaultdict[str, deque[float]] = defaultdict(deque)

    @contextmanager
    def collecting(self) -> Iterator[DumpAllowance]:
        """Collect one crash; its dump counts from being allowed until it is in the store."""
        allowance = DumpAllowance(self)
        try:
            yield allowance
        finally:
            with self._lock:
                self._under_way.subtract(allowance.signatures)

    def allow(
        self,
        guest: Guest,
        signature_id: str | None,
        allowed: Counter[str],
        *,
        asked_for: bool = False,
    ) -> Refusal | None:
        """Let a dump be taken, unless there must be none; `DumpAllowance` asks.

        Args:
            guest: Whose crash.
            signature_id: The signature ID of the crash; None: not known yet.
            allowed: Is told of a dump that may be taken.
            asked_for: Only the disk can refuse it.

        Returns:
            Why there must be none, or None.
        """
        with self._lock:
            refusal = None if asked_for else self._repeated(guest, signature_id)
            refusal = refusal or self._no_room()
            if refusal is None:
                if not asked_for:
                    self._recent[guest.name].append(self._clock())
                if signature_id is not None:
                    self._count(signature_id, allowed)
        return refusal

    def keep(self, guest: Guest, signature_id: str, allowed: Counter[str]) -> Refusal | None:
        """Let a dump be kept that was allowed before its signature was known.

        Args:
            guest: Whose crash.
            signature_id: The signature ID of the crash.
            allowed: Is told of a dump that may be kept.

        Returns:
            Why it must go, or None.
        """
        with self._lock:
            surplus = self._surplus(guest, signature_id)
            if surplus is None:
                self._count(signature_id, allowed)
        return surplus

    def check_ending(self) -> None:
        """Give a collection up when the agent ends.

        Raises:
            CollectionGivenUpError: It ends.
        """
        if self.ending.is_set():
            raise CollectionGivenUpError("the agent ends; the next one takes the crash up again")

    def require_room(self) -> None:
        """Check that the file system has left what it must.

        Raises:
            NoRoomLeftError: It has not.
        """
        if (free := self._store.free_bytes()) < self.limits.free:
            raise NoRoomLeftError(
                f"given up: the file system has {free // _MIB} MiB left, and"
                f" {self.limits.free // _MIB} MiB are kept free (free)"
            )

    def no_room(self) -> Refusal | None:
        """Return why the disk takes no dump, or None; what the limits allow to go has gone then."""
        with self._lock:
            return self._no_room()

    def _count(self, signature_id: str, allowed: Counter[str]) -> None:
        self._under_way[signature_id] += 1
        allowed[signature_id] += 1

    def _surplus(self, guest: Guest, signature_id: str) -> Refusal | None:
        most = guest.settings.dumps_per_signature
        if self._store.dumps_of(signature_id) + self._under_way[signature_id] < most:
            return None
        text = f"{most} dumps of this signature are kept (dumps_per_signature)"
        return Refusal("dumps_per_signature", text)

    def _repeated(self, guest: Guest, signature_id: str | None) -> Refusal | None:
        if signature_id is not None and (surplus := self._surplus(guest, signature_id)):
            return surplus
        rate, recent = guest.settings.rate, self._recent[guest.name]
        while recent and self._clock() - recent[0] > rate.per:
            recent.popleft()
        if len(recent) < rate.dumps:
            return None
        return Refusal("rate", f"{rate.dumps} dumps of this guest in {rate.per:g} s (rate)")

    def _no_room(self) -> Refusal | None:
        if self._store.free_bytes() < self.limits.free:
            prune(self._store, self.limits, needs_upload=self.needs_upload)
        try:
            self.require_room()
        except NoRoomLeftError as error:
            return Refusal("free", str(error))
        return None
