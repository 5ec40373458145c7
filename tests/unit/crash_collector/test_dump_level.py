from __future__ import annotations

import pytest

from qemu_dump_ext.crash_collector.collect.dump_level import level_for_crash
from qemu_dump_ext.crash_collector.config.file import parse_configuration
from qemu_dump_ext.crash_collector.config.settings import Keep

_CACHE, _USER, _FREE = 31 - 6, 31 - 8, 31 - 16


# The functions are those of call traces that were reported to Linux.
@pytest.mark.parametrize(
    ("functions", "level"),
    [
        (["sysrq_handle_crash", "__handle_sysrq", "write_sysrq_trigger", "proc_reg_write"], 31),
        (["default_idle", "cpu_idle_loop"], 31),
        (["copy_process", "kernel_clone", "__do_sys_clone"], 31),
        (["__filemap_add_folio", "filemap_add_folio", "page_cache_ra_unbounded"], _CACHE),
        (["ext4_writepages", "do_writepages"], _CACHE),
        (["folio_wait_bit", "write_cache_pages"], _CACHE),
        (["get_page_from_freelist", "__alloc_pages", "alloc_pages_vma"], _FREE),
        (["bad_page", "free_unref_page_prepare"], _FREE),
        (["___slab_alloc", "kmem_cache_alloc_noprof"], _FREE),
        (["do_anonymous_page", "__handle_mm_fault"], _USER),
        (["zap_pte_range", "unmap_page_range"], _USER),
        (["kfree", "ext4_put_super"], 31 - 16 - 6),
        (["a", "b", "c", "d", "e", "f", "filemap_read"], 31),
        ([], 31),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
def test_what_a_crash_is_in_stays_in_its_dump(functions: list[str], level: int):
    found, remarks = level_for_crash(31, Keep(), functions)
    assert found == level
    assert bool(remarks) == (level != 31)


def test_of_a_level_that_leaves_nothing_out_nothing_is_said():
    assert level_for_crash(1, Keep(), ["filemap_read", "kfree"]) == (1, [])


def test_it_can_be_said_otherwise():
    text = "store: /x\nguests: [{socket: /a, keep: {cache: [], user: [], free: [^ours]}}]"
    (guest,) = parse_configuration(text, "test").guests
    assert level_for_crash(31, guest.keep, ["filemap_read", "do_wp_page"])[0] == 31
    level, (remark,) = level_for_crash(31, guest.keep, ["filemap_read", "ours_it_is"])
    assert (level, remark) == (
        _FREE,
        "free pages are to stay in the dump: ours_it_is() is in the call trace",
    )
