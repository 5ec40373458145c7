from __future__ import annotations

import pytest

from qemu_dump_ext.crash_collector.watch.libvirt import domain_of

BY_LIBVIRT = (
    *("/usr/bin/qemu-system-x86_64", "-name", "guest=web1,debug-threads=on", "-S"),
    *("-object", '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/x"}'),
    *("-no-user-config", "-nodefaults"),
    *("-chardev", "socket,id=charmonitor,fd=32,server=on,wait=off"),
    *("-mon", "chardev=charmonitor,id=monitor,mode=control", "-rtc", "base=utc", "-no-shutdown"),
)


@pytest.mark.parametrize(
    ("content", "on_crash", "remark"),
    [
        ("<on_crash>destroy</on_crash>", "destroy", "libvirt ends it at once when it panics"),
        ("<on_reboot>restart</on_reboot>", "destroy", "libvirt ends it at once when it panics"),
        ("<on_crash>restart</on_crash>", "restart", "libvirt resets it at once"),
        ("<on_crash>coredump-destroy</on_crash>", "coredump-destroy", "libvirt dumps it by itself"),
        ("<on_crash> preserve </on_crash>", "preserve", "a panic pauses it, and libvirt leaves"),
        ("<on_crash>new-word</on_crash>", "new-word", "libvirt does what is not known here"),
        ("<title>&lt;on_crash>preserve</title>", "destroy", "libvirt ends it at once"),
    ],
)
def test_what_libvirt_does_is_read_from_the_domain(tmp_path, content, on_crash, remark):
    (tmp_path / "web1.xml").write_text(f"<domstatus><domain>{content}</domain></domstatus>")
    domain = domain_of(BY_LIBVIRT, [tmp_path / "none", tmp_path])
    assert domain is not None
    assert (domain.name, domain.on_crash) == ("web1", on_crash)
    assert domain.remark.startswith(remark)
    assert domain.leaves_it == (on_crash == "preserve")


def test_domain_that_cannot_be_read_is_told(tmp_path):
    domain = domain_of(BY_LIBVIRT, [tmp_path])
    assert domain is not None
    assert domain.on_crash is None
    assert "cannot be read" in domain.remark
    odd = tuple(word.replace("web1", "../a,,b") for word in BY_LIBVIRT)
    domain = domain_of(odd, [tmp_path])
    assert domain is not None
    assert (domain.name, domain.on_crash) == ("../a,b", None)


@pytest.mark.parametrize(
    "words", [(), ("qemu",), ("qemu", "-mon", "chardev=mine"), ("qemu", "-name", "charmonitor")]
)
def test_other_qemus_are_not_of_libvirt(words):
    assert domain_of(words, []) is None
