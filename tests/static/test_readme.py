"""What the README says of itself is true."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import yaml

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.cli.dump_command import dump_parser
from qemu_dump_ext.cli.subcommands.targets import table_of_targets
from qemu_dump_ext.crash_collector.configuration import parse_configuration
from qemu_dump_ext.crash_collector.crash_store import CrashStore
from qemu_dump_ext.crash_collector.metrics import AgentState, Metrics
from qemu_dump_ext.guest_images.manifest import load_manifest
from qemu_dump_ext.memory_sources import all_memory_sources

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_table_of_targets_is_what_the_command_prints():
    assert "\n".join(table_of_targets()) in README


def test_every_option_is_described():
    options = {option for action in dump_parser()._actions for option in action.option_strings} - {
        "-h",
        "--help",
        "--sparse",
        "--qmp",
        "--gdb",
    }
    described = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", README))
    assert options <= described


def test_every_memory_source_has_a_row():
    for name in all_memory_sources():
        assert f"| `{name}` |" in README


def test_every_guest_image_is_of_a_target_that_can_be_dumped():
    targets = {image.target for image in load_manifest().values()}
    assert targets <= set(all_architectures())


def test_every_configuration_of_the_crash_collector_is_right():
    blocks = re.findall(r"(?:^    store: .*\n)(?:^    .*\n)*", README, re.MULTILINE)
    assert blocks
    for block in blocks:
        assert parse_configuration(textwrap.dedent(block), "README.md").guests


def test_the_daemon_set_is_well_formed():
    (block,) = re.findall(r"(?:^    apiVersion: .*\n)(?:^    .*\n)*", README, re.MULTILINE)
    template = yaml.safe_load(textwrap.dedent(block))["spec"]["template"]["spec"]
    (container,) = template["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in template["volumes"]}


def test_every_metric_is_described(tmp_path):
    metrics = Metrics(CrashStore(tmp_path), lambda: AgentState(0, 0, 0))
    families = {family.name: family.type for family in metrics._registry.collect()}
    ours = {
        name.removeprefix("qemu_crash_collector_") + ("_total" if kind == "counter" else "")
        for name, kind in families.items()
        if name.startswith("qemu_crash_collector_")
    }
    assert ours <= set(re.findall(r"`(\w+)(?:\{[\w,]+\})?`", README))
    assert len(ours) == 16
