"""Fuzz every parser: `python -m tests.fuzz.run --inputs 100000 [PARSER...]`.

An input that ends in anything but an answer or a DumpError, that takes over five seconds or over
500 MiB, is kept in the folder that --keep names, and told with the traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType

from qemu_dump_ext.errors import DumpError
from tests.fuzz.mutation import mutate
from tests.fuzz.parsers import PARSERS, Parser

SECONDS = 5.0
BYTES = 500 << 20
_SHOWN = 10


class _TookTooLongError(BaseException):
    """No handler of `Exception` may take it for an answer."""


def _on_alarm(_number: int, _frame: FrameType | None) -> None:
    raise _TookTooLongError


def fault_of(parser: Parser, data: bytes) -> str | None:
    """Return what is wrong with how an input ends: a traceback, or None."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process alone: others are busy, too
    try:
        parser.use(data)
    except DumpError:
        return None
    except BaseException:  # noqa: BLE001 - whatever it is, it is told
        return traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def run(name: str, inputs: int, seed: int, keep: Path | None) -> int:
    """Fuzz one parser; returns how many different faults there were."""
    parser = PARSERS[name]
    seeds = parser.seeds()
    chance = random.Random(f"{name} {seed}")  # noqa: S311 - to be had again
    faults: Counter[str] = Counter()
    started, slowest = time.process_time(), 0.0
    for number in range(inputs):
        valid = number < len(seeds)
        data = (
            seeds[number]
            if valid
            else mutate(chance.choice(seeds), seeds, chance, most=parser.most)
        )
        before = time.process_time()
        fault = fault_of(parser, data)
        slowest = max(slowest, time.process_time() - before)
        if fault is None:
            continue
        where = [line for line in fault.splitlines() if line.startswith("  File")][-1]
        kind = fault.splitlines()[-1].partition(":")[0] + where
        faults[kind] += 1
        if faults[kind] == 1 and len(faults) <= _SHOWN:
            print(f"{name}: input {number} of seed {seed}:\n{fault}", flush=True)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{name}: {inputs} inputs, {len(faults)} kinds of fault ({faults.total()} inputs),"
        f" {seconds:.0f} s, slowest {slowest:.2f} s, {peak} MiB at most",
        flush=True,
    )
    return len(faults)


def main() -> int:
    """Run what the command line asks for; the exit status is 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parsers", nargs="*", choices=[[], *PARSERS], metavar="PARSER")
    parser.add_argument("--inputs", type=int, default=1000, help="of each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for inputs that end in a fault")
    arguments = parser.parse_args()
    logging.disable()
    signal.signal(signal.SIGPROF, _on_alarm)
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    names = arguments.parsers or list(PARSERS)
    return int(
        sum(run(name, arguments.inputs, arguments.seed, arguments.keep) for name in names) > 0
    )


if __name__ == "__main__":
    sys.exit(main())
