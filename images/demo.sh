#!/bin/sh
# The main job, from nothing: boot a public guest under TCG, dump it through gdb, and let a reader
# prove that the dump opens.
set -eu
cd "$(dirname "$0")/.."
. images/set_up.sh

set_up "gcc python3-dev liblzo2-dev qemu-system-x86 gdb makedumpfile apt" "demo"
output=${1:-guest.kdump}
[ ! -e "$output" ] || { echo "$output exists: name another file" >&2; exit 2; }

say "booting the guest image x86_64"
.venv/bin/qemu-dump images fetch x86_64
guest=$(.venv/bin/qemu-dump images boot x86_64 --detach --json)
value() {
    printf '%s' "$guest" | .venv/bin/python -c "import json, sys; print(json.load(sys.stdin)['$1'])"
}
trap 'kill "$(value pid)"; rm -rf "$(value folder)"' EXIT

say "dumping it through gdb"
gdb -nx -q -batch -iex 'set confirm off' \
    -ex "target remote $(value gdb)" \
    -ex "$(.venv/bin/qemu-dump gdbinit)" \
    -ex "qemu-dump-guest-memory -z zlib -R $output" \
    -ex disconnect -ex 'quit $_qemu_dump_status'

say "opening $output with makedumpfile and drgn"
log=$(mktemp)
makedumpfile --dump-dmesg -f "$output" "$log" >/dev/null 2>&1
.venv/bin/python - "$output" <<'EOF'
import sys
import drgn

program = drgn.Program()
program.set_core_dump(sys.argv[1])
print("drgn:           ", program.platform, "kernel dump:", bool(program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL))
EOF
echo "kernel version:  $(sed -n 's/.*\] Linux version \([^ ]*\).*/\1/p' "$log")"
echo "CPUs:            $(sed -n 's/.*Brought up .* \([0-9]*\) CPUs.*/\1/p' "$log")"
echo "last message:    $(tail -n 1 "$log")"
rm -f "$log"
