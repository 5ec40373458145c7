"""Targets that QEMU itself refuses to dump, and where their Linux puts registers into notes.

Offsets are those of Linux's structures, written down here independently of the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qemu_dump_ext.structures.c_struct import ByteOrder
from tests.support.newer_qemu import own_qemu_is_newer, own_qemu_version


def _names(prefix: str, count: int, first: int = 0) -> str:
    return " ".join(f"{prefix}{index}" for index in range(first, first + count))


def _list(names: str) -> str:
    return ", ".join(sorted(names.split()))


@dataclass(frozen=True)
class Target:
    """One guest that QEMU does not dump.

    Attributes:
        name: Of the architecture, behind `newer-` where it is by a newer QEMU, before a variant.
        arguments: Of QEMU; the first two are its machine.
        stub: Registers in the order of the stub's numbers; `-` is not planted, a trailing `=`
            is not either, but is compared.
        pr_reg: Registers in the order of Linux's pr_reg, by the stub's names; `-` is anything.
        e_machine: Of the ELF header.
        wide: ELFCLASS64.
        big: Byte order.
        pid: Offset of pr_pid.
        registers: Offset of pr_reg.
        size: Of struct elf_prstatus.
        fp_reg: Registers in the order of Linux's elf_fpregset_t, as in pr_reg; empty where there
            is no such note, or a test of its own.
        e_flags: Of the ELF header.
        gdb: What gdb is told before it connects.
        shown: gdb's names of registers by those of the stub, where gdb takes cores of this target;
            empty where its BFD knows no such note.
        fp_shown: The same for those of floating point.
        bfd: What gdb 16 is told to take a core for; empty where it knows.
        flags: Bits that are set in registers which are not planted.
        missing: Registers that no source gives.
        missing_by_qmp: Registers that only the stub gives.
        is_high: Memory lies beyond 4 GiB, which takes ELFCLASS64.
        has_kdump: A kdump can be had: memory does not lie beyond what a page map reaches.
        is_backed: A file can back the memory of the machine.
        package: Which has a newer QEMU; empty: the machine's own.
        emulator: Behind qemu-system-, where it is not the name.
        stub_order: Byte order of the stub, where it is another one than the target's.
    """

    name: str
    arguments: tuple[str, ...]
    stub: str
    pr_reg: str
    e_machine: int
    wide: bool
    big: bool
    pid: int
    registers: int
    size: int
    gdb: tuple[str, ...]
    fp_reg: str = ""
    e_flags: int = 0
    shown: dict[str, str] = field(default_factory=dict)
    bfd: str = ""
    fp_shown: dict[str, str] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    missing: str = ""
    missing_by_qmp: str = ""
    is_high: bool = False
    has_kdump: bool = True
    is_backed: bool = True
    package: str = ""
    emulator: str = ""
    stub_order: ByteOrder | None = None

    @property
    def architecture(self) -> str:
        return self.name.removeprefix("newer-").partition("-")[0]

    @property
    def word(self) -> int:
        return 8 if self.wide else 4

    @property
    def header_word(self) -> int:
        return 8 if self.is_high else self.word

    @property
    def order(self) -> str:
        return ">" if self.big else "<"


_GPRS = _names("r", 32)
_FPRS = _names("f", 32)
_MIPS_STUB = f"- {_names('r', 31, first=1)} status= lo hi badvaddr cause= pc {_FPRS} fsr= fir="
_MIPS_CONTROL = "lo hi pc badvaddr status cause"
_MIPS_SHOWN = {name: name for name in f"{_names('r', 31, first=1)} lo hi pc cause".split()}
_MIPS_SHOWN |= {"status": "sr", "badvaddr": "bad"}
_CU1, _FR = 1 << 29, 1 << 26
_ALPHA = _names("r", 31)
_DOUBLES = " ".join(f"d{index}" for index in range(0, 64, 2))
_UPPER_DOUBLES = " ".join(f"f{index}" for index in range(32, 64, 2))
_SPARC64_STUB = (
    f"- {_names('g', 7, first=1)} {' '.join(_names(x, 8) for x in 'oli')} {_DOUBLES}"
    " pc npc state= fsr fprs y"
)
_SH4 = _names("r", 16)
_SH4_FPRS = _names("fr", 16)
_SH4_OTHER_BANK = _names("xf", 16)
_SH4_STUB = f"{_SH4} pc pr gbr - mach macl sr= fpul fpscr= {_SH4_FPRS}"
_MICROBLAZE_STUB = f"{_GPRS} pc msr= ear esr fsr"
_HPPA = _names("gr", 31, first=1)
_HPPA_SPACES = _names("sr", 8)
_HPPA_FPRS = _names("fr", 32)
_HPPA_HALVES = " ".join(f"{name}.{half}" for name in _HPPA_FPRS.split() for half in "01")
_HPPA_TEMPORARY = _names("cr", 7, first=24)
_MALTA = ("-M", "malta", "-bios", "BIOS")


def _mips(name: str, cpu: str, *more: str, wide: bool, big: bool) -> Target:
    return Target(
        name,
        (*_MALTA, "-cpu", cpu, *more),
        stub=_MIPS_STUB,
        pr_reg=f"{_GPRS} {_MIPS_CONTROL}" if wide else f"{'- ' * 6} {_GPRS} {_MIPS_CONTROL}",
        e_machine=8,
        wide=wide,
        big=big,
        pid=32 if wide else 24,
        registers=112 if wide else 72,
        size=480 if wide else 256,
        gdb=(
            f"set architecture mips:isa{64 if wide else 32}r2",
            f"set endian {'big' if big else 'little'}",
        ),
        e_flags=0x80000000 if wide else 0x70001000,
        shown=_MIPS_SHOWN,
        flags={"status": _CU1 | (_FR if wide else 0)},  # lets the monitor show floating point
        missing_by_qmp="badvaddr",
    )


def _narrow(name: str, *arguments: str, big: bool = True, **facts: Any) -> Target:
    return Target(name, arguments, wide=False, big=big, **({"pid": 24, "registers": 72} | facts))


def _sh4(name: str, *arguments: str, big: bool) -> Target:
    return _narrow(
        name,
        *arguments,
        big=big,
        stub=_SH4_STUB,
        pr_reg=f"{_SH4} pc pr sr gbr mach macl",
        e_machine=42,
        size=168,
        gdb=("set architecture sh4", f"set endian {'big' if big else 'little'}"),
        fp_reg=f"{_SH4_FPRS} {_SH4_OTHER_BANK} fpscr fpul",
        shown={name: name for name in f"{_SH4} pc pr gbr mach macl fpscr".split()},
        fp_shown={name: name for name in f"{_SH4_FPRS} fpul".split()},
        bfd=f"elf32-sh{'big' if big else ''}-linux",
        e_flags=9,
        missing=_list(_SH4_OTHER_BANK),
        missing_by_qmp=_list(f"{_SH4_FPRS} {_SH4_OTHER_BANK} mach macl"),
    )


def _microblaze(name: str, *, big: bool) -> Target:
    return _narrow(
        name,
        "-M",
        "none",
        "-cpu",
        "microblaze-cpu",
        big=big,
        stub=_MICROBLAZE_STUB,
        pr_reg=f"{_GPRS} pc msr ear esr fsr",
        e_machine=189,
        size=228,
        gdb=("set architecture sh4", f"set endian {'big' if big else 'little'}"),
    )


_TARGETS_OF_7_2 = (
    _mips("mips64el", "5KEf", "-smp", "2", wide=True, big=False),
    _mips("mipsel", "24Kf", wide=False, big=False),
    _mips("mips64", "5KEf", wide=True, big=True),
    _mips("mips", "24Kf", "-smp", "2", wide=False, big=True),
    Target(
        "sparc64",
        ("-M", "sun4u"),
        stub=_SPARC64_STUB,
        pr_reg=f"{' '.join(_names(x, 8) for x in 'goli')} state pc npc y",
        fp_reg=f"{_DOUBLES} fsr - fprs",
        missing="gsr",
        missing_by_qmp="gsr",
        e_machine=43,
        wide=True,
        big=True,
        pid=32,
        registers=112,
        size=408,
        gdb=("set architecture sparc:v9", "set endian big"),
        flags={"state": 0x5A << 32 | 0x80 << 24},  # CCR, ASI
        is_backed=False,
    ),
    _narrow(
        "sparc",
        "-M",
        "SS-5",
        stub=f"- {_names('g', 7, first=1)} {' '.join(_names(x, 8) for x in 'oli')} {_FPRS}"
        " y psr= - - pc npc fsr",
        pr_reg=f"{' '.join(_names(x, 8) for x in 'goli')} psr pc npc y",
        e_machine=2,
        size=228,
        gdb=("set architecture sparc", "set endian big"),
    ),
    _narrow(
        "m68k",
        "-M",
        "none",
        "-cpu",
        "m68040",
        stub=f"{_names('d', 8)} {_names('a', 8)} sr= pc",
        pr_reg=f"{_names('d', 7, first=1)} {_names('a', 7)} d0 a7 - sr pc",
        e_machine=4,
        pid=22,
        registers=70,
        size=154,
        gdb=("set architecture m68k", "set endian big"),
        flags={"sr": 0x15},
        shown={name: name for name in f"{_names('d', 8)} {_names('a', 6)} pc".split()}
        | {"a6": "fp", "a7": "sp", "sr": "ps"},
    ),
    Target(
        "alpha",
        ("-M", "clipper", "-smp", "2"),
        stub=f"{_ALPHA} - {_names('f', 31)} fpcr pc - unique",
        pr_reg=f"{_ALPHA} pc unique",
        fp_reg=f"{_names('f', 31)} fpcr",
        e_machine=0x9026,
        wide=True,
        big=False,
        pid=32,
        registers=112,
        size=384,
        gdb=("set architecture alpha",),
        missing_by_qmp="unique",
    ),
    _sh4("sh4", "-M", "none", "-cpu", "sh7751r", big=False),
    _sh4("sh4eb", "-M", "none", "-cpu", "sh7751r", big=True),
    _narrow(
        "or1k",
        "-M",
        "none",
        "-cpu",
        "or1200",
        stub=f"{_GPRS} - pc sr=",
        pr_reg=f"{_GPRS} pc sr",
        e_machine=92,
        size=212,
        gdb=("set architecture sh4", "set endian big"),
        missing_by_qmp="sr",
    ),
    _microblaze("microblaze", big=True),
    _microblaze("microblazeel", big=False),
    _narrow(
        "hppa",
        "-M",
        "hppa",
        "-smp",
        "2",
        stub=f"psw= {_HPPA} sar iaoq_f iasq_f iaoq_b iasq_b cr15 iir isr ior ipsw - sr4 sr0 sr1"
        f" sr2 sr3 sr5 sr6 sr7 cr0 cr8 cr9 cr10 cr12 cr13 {_HPPA_TEMPORARY} {_HPPA_HALVES}",
        fp_reg=_HPPA_HALVES,
        pr_reg=f"psw {_HPPA} {_HPPA_SPACES} iaoq_f iaoq_b iasq_f iasq_b sar iir isr ior ipsw cr0"
        f" {_HPPA_TEMPORARY} - cr8 cr9 cr12 cr13 cr10 cr15",
        e_machine=15,
        size=396,
        gdb=("set architecture hppa1.0", "set endian big"),
        e_flags=0x210,
        shown={f"gr{index}": f"r{index}" for index in range(1, 32)}
        | {"iaoq_f": "pcoqh", "iasq_f": "pcsqh", "iaoq_b": "pcoqt", "iasq_b": "pcsqt", "sar": "sar"}
        | {"fr0.0": "fpsr"}
        | {f"fr{index // 2}.{index % 2}": f"fpe{index}" for index in range(1, 8)}
        | {"psw": "flags", "gr2": "rp", "gr27": "dp", "gr28": "ret0", "gr29": "ret1", "gr30": "sp"},
        fp_shown={f"fr{index}.0": f"fr{index}" for index in range(4, 32)}
        | {f"fr{index}.1": f"fr{index}R" for index in range(4, 32)},
        missing="cr31",
        missing_by_qmp=_list(
            f"cr0 cr8 cr9 cr10 cr12 cr13 cr15 {_HPPA_TEMPORARY} cr31 {_HPPA_FPRS}"
            " iasq_b iasq_f ior ipsw isr sar"
        ),
    ),
    _narrow(
        "xtensa",
        "-M",
        "none",
        "-cpu",
        "dc232b",
        big=False,
        stub=f"pc {_names('ar', 32)}",
        pr_reg=f"pc {'- ' * 63} {_names('ar', 32)}",
        e_machine=94,
        size=588,
        gdb=("set architecture powerpc:7400", "set endian little"),
    ),
    _narrow(
        "xtensaeb",
        "-M",
        "none",
        "-cpu",
        "test_kc705_be",
        stub=f"pc {_names('ar', 32)}",
        pr_reg=f"pc {'- ' * 63} {_names('ar', 32)}",
        e_machine=94,
        size=588,
        gdb=("set architecture powerpc:7400", "set endian big"),
    ),
    Target(
        "loongarch64",
        ("-M", "none", "-cpu", "la464"),
        stub=f"- {_names('r', 31, first=1)} - pc badv {_FPRS} fcc fcsr",
        pr_reg=f"{_GPRS} - pc badv",
        e_machine=258,
        wide=True,
        big=False,
        pid=32,
        registers=112,
        size=480,
        gdb=("set architecture alpha",),
        fp_reg=f"{_FPRS} fcc fcsr",
        missing="ecfg",
        missing_by_qmp="ecfg, fcc",
    ),
)


_PACKAGES = dict.fromkeys(("mips", "mipsel", "mips64", "mips64el"), "qemu-system-mips")
_PACKAGES |= {"sparc": "qemu-system-sparc", "sparc64": "qemu-system-sparc"}
_OTHERWISE_IN_NEWER: dict[str, dict[str, Any]] = {
    # Machines whose memory no file can back, or that have much more of it than they are given.
    "or1k": {"arguments": ("-M", "or1k-sim", "-smp", "2"), "is_backed": False},
    "microblaze": {"arguments": ("-M", "petalogix-s3adsp1800"), "is_backed": False},
    "sh4": {"arguments": ("-M", "r2d"), "is_backed": False},
    "xtensa": {"arguments": ("-M", "sim", "-smp", "2"), "is_backed": False},
    "xtensaeb": {"arguments": ("-M", "sim", "-cpu", "test_kc705_be"), "is_backed": False},
    # It describes its registers, each double of the lower half as two singles.
    "sparc64": {
        "stub": _SPARC64_STUB.replace(_DOUBLES, f"{'- ' * 16} {_UPPER_DOUBLES}"),
        "fp_reg": f"{'- ' * 16} {_UPPER_DOUBLES} fsr - fprs",
    },
    "sparc": {"arguments": ("-M", "SS-10", "-smp", "2"), "is_high": True},
    # The monitor shows all control registers.
    "hppa": {"arguments": ("-M", "B160L", "-smp", "2"), "missing": "", "missing_by_qmp": ""},
    "microblazeel": {
        "arguments": ("-M", "petalogix-ml605"),
        "emulator": "microblaze",
        "stub_order": "big",
        "is_backed": False,
    },
}
_BY_NAME = {target.name: target for target in _TARGETS_OF_7_2}
_VARIANTS = (
    replace(
        _BY_NAME["hppa"],
        name="hppa-64",
        arguments=("-M", "C3700", "-smp", "2"),
        stub=_BY_NAME["hppa"].stub.replace(_HPPA_HALVES, _HPPA_FPRS),
        fp_reg=_HPPA_FPRS,
        wide=True,
        pid=32,
        registers=112,
        size=760,
        e_flags=0x80214,
        has_kdump=False,
        gdb=("set architecture powerpc:7400", "set endian big"),
        shown={},
        fp_shown={},
        missing="",
        missing_by_qmp="",
    ),
)
_IN_NEWER = tuple(
    replace(target, **_OTHERWISE_IN_NEWER.get(target.name, {}))
    for target in _TARGETS_OF_7_2
    if target.name != "loongarch64"  # which a newer QEMU dumps
)
_NOT_YET_DUMPED = (_BY_NAME["loongarch64"],) if own_qemu_version() < (9, 2, 0) else ()
TARGETS = (*_IN_NEWER, *_NOT_YET_DUMPED) if own_qemu_is_newer() else _TARGETS_OF_7_2
NEWER_TARGETS = tuple(
    replace(
        target,
        name=f"newer-{target.name}",
        package=_PACKAGES.get(target.name, "qemu-system-misc"),
    )
    for target in (*_IN_NEWER, *_VARIANTS)
)
