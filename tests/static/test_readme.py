"""What the README says of itself is true."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import yaml

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.cli import collector
from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.dump_command import dump_parser
from qemu_dump_ext.cli.subcommands.targets import table_of_targets
from qemu_dump_ext.crash_collector.config.file import parse_configuration
from qemu_dump_ext.crash_collector.outlets.metrics import AgentState, Metrics
from qemu_dump_ext.crash_collector.record import CAUSE_KINDS
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.discovery import collect
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


def test_every_word_of_the_crash_collector_is_described():
    commands = {name.replace("_", "-") for name in collect(collector, "COMMAND", Subcommand)}
    for word in (*commands, *CAUSE_KINDS):
        assert re.search(rf"`{word}( [A-Z]+)?`", README), word


def test_configuration_of_the_crash_collector_is_right():
    text = README.partition("    store: /var/crash/guests  ")
    block = (text[1] + text[2]).partition("\n\n")[0]
    configuration = parse_configuration(block, "README.md")
    assert configuration.guests[0].after == "reset"
    assert configuration.guests[0].labels == {"farm": "north"}
    short = re.search(r"printf '(.*)' >", README)
    assert short is not None
    assert parse_configuration(short[1].replace("\\n", "\n"), "README.md").guests[0].glob


def test_every_memory_source_has_a_row():
    for name in all_memory_sources():
        assert f"| `{name}` |" in README


def test_every_guest_image_is_of_a_target_that_can_be_dumped():
    targets = {image.target for image in load_manifest().values()}
    assert targets <= set(all_architectures())


def test_where_crashes_go_is_a_right_configuration():
    (block,) = re.findall(r"(?:^    upload:\n)(?:^    .*\n)*", README, re.MULTILINE)
    configuration = parse_configuration("store: x\n" + textwrap.dedent(block), "README.md")
    assert configuration.upload is not None
    assert configuration.report is not None
    assert configuration.metrics_port is not None


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
