"""What all guests of an agent share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

from qemu_dump_ext.crash_collector.agent.journal import Journal
from qemu_dump_ext.crash_collector.agent.slots import CollectionSlots
from qemu_dump_ext.crash_collector.collect.budget import DumpBudget
from qemu_dump_ext.crash_collector.outlets.outlets import CrashOutlets
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.value import Value


class Services(Value):
    """Made by the agent.

    Attributes:
        store: Where crashes go.
        journal: What is under way.
        budget: Whether there may be a dump.
        outlets: Where a crash is shown once it is stored.
        slots: Where collections run.
        answer_seconds: How long QEMU may take to answer.
        collection_seconds: How long QEMU may be asked about one crash.
        retry_seconds: Until a crash that could not be stored is collected again.
        now: The clock of the records.
        ending: Set when the agent ends.
    """

    store: CrashStore
    journal: Journal
    budget: DumpBudget
    outlets: CrashOutlets
    slots: CollectionSlots
    answer_seconds: float
    collection_seconds: float
    retry_seconds: float
    now: Callable[[], datetime]
    ending: asyncio.Event
