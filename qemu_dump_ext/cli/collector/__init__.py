"""The subcommands of `qemu-crash-collector`: each file is one, found by scanning this folder."""
