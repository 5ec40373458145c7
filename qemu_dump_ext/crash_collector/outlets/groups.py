"""Crashes by what they are: the signatures of a report. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from qemu_dump_ext.crash_collector.outlets.crash_source import SourcedCrash
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.store.states import (
    STATE_NAMES,
    SignatureState,
    SignatureStates,
    release_key,
)
from qemu_dump_ext.crash_collector.store.store import SignatureCount
from qemu_dump_ext.value import Value


class SignatureGroup(Value):
    """All crashes of a signature, and of those merged into it.

    Attributes:
        signature_id: The one that stands for all.
        state: What people made of it.
        count: How often it was seen, and when; also crashes that are gone.
        crashes: Those that are kept, the newest first.
        merged: The other signatures in it.
    """

    signature_id: str
    state: SignatureState
    count: SignatureCount
    crashes: Sequence[SourcedCrash]
    merged: Sequence[str]

    @property
    def guests(self) -> Sequence[str]:
        """Names of the guests, with their hosts where there are several."""
        return sorted({guest_text(crash) for crash in self.crashes})

    @property
    def kernels(self) -> Sequence[str]:
        """Releases of their kernels, the newest first."""
        found = {crash.record.kernel for crash in self.crashes if crash.record.kernel}
        return sorted(found, key=release_key, reverse=True)


def guest_text(crash: SourcedCrash) -> str:
    """Return whose crash it is."""
    return f"{crash.host}/{crash.record.guest}" if crash.host else crash.record.guest


def group_crashes(
    crashes: Iterable[SourcedCrash],
    counts: Iterable[Mapping[str, SignatureCount]],
    states: SignatureStates,
) -> Sequence[SignatureGroup]:
    """Return the signatures: what needs somebody first, and of that what was seen last.

    Args:
        crashes: All that are kept.
        counts: What each store has counted.
        states: What people made of them.
    """
    kept: defaultdict[str, list[SourcedCrash]] = defaultdict(list)
    for crash in sorted(crashes, key=lambda crash: crash.record.moment, reverse=True):
        kept[states.canonical(crash.record.signature.id)].append(crash)
    counted: defaultdict[str, list[SignatureCount]] = defaultdict(list)
    members: defaultdict[str, set[str]] = defaultdict(set)
    for by_signature in counts:
        for name, count in by_signature.items():
            counted[states.canonical(name)].append(count)
            members[states.canonical(name)].add(name)
    groups = [
        SignatureGroup(
            name,
            states.of(name),
            _count_of(counted[name], [crash.record for crash in kept[name]]),
            kept[name],
            sorted(members[name] - {name}),
        )
        for name in {**kept, **counted}
    ]
    groups.sort(key=lambda group: group.count.last_seen, reverse=True)
    # What is new and what came back are equally urgent.
    return sorted(groups, key=lambda group: max(1, STATE_NAMES.index(group.state.state)))


def _count_of(counted: Sequence[SignatureCount], records: Sequence[CrashRecord]) -> SignatureCount:
    if not counted:
        return SignatureCount(
            records[0].signature.message[:1000], len(records), records[-1].time, records[0].time
        )
    latest = max(counted, key=lambda count: count.last_seen)
    return SignatureCount(
        latest.message,
        max(sum(count.count for count in counted), len(records), 1),
        min(count.first_seen for count in counted),
        latest.last_seen,
    )
