"""Name the functions at which vCPUs stand, by the kernel's System.map.

Source: Linux scripts/mksysmap; KERNELOFFSET of VMCOREINFO is what KASLR adds to each address.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number

_TEXT_TYPES = frozenset("tTwW")


def functions_at(
    system_map: Path, vmcoreinfo: bytes, program_counters: Iterable[int]
) -> Sequence[str]:
    """Return the function of each program counter that lies in the kernel's own text.

    Raises:
        RequestError: The file cannot be read, is no System.map, or names no function: so does the
            one in Debian's linux-image-*; the real one is in linux-image-*-dbg.
    """
    try:
        lines = system_map.read_text("ascii", "replace").splitlines()
        words = [line.split() for line in lines]
        table = [(int(w[0], 16), w[1], w[2]) for w in words if len(w) >= 3]
    except OSError as error:
        raise RequestError(f"cannot read {system_map}: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{system_map} is no System.map") from error
    symbols = sorted((address, name) for address, kind, name in table if kind in _TEXT_TYPES)
    if not symbols:
        raise RequestError(f"{system_map} names no function")
    bounds = {name: address for address, _, name in table if name in {"_stext", "_etext"}}
    offset = vmcoreinfo_number(vmcoreinfo, "KERNELOFFSET", 16) or 0
    starts = [address for address, _ in symbols]
    found = []
    for counter in program_counters:
        address = counter - offset
        if bounds.get("_stext", 0) <= address < bounds.get("_etext", 1 << 64):
            index = bisect_right(starts, address) - 1
            found += [symbols[index][1]] if index >= 0 else []
    return found
