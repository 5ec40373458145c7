"""Collects crashes of QEMU guests: watches them, and stores what each crash leaves behind."""
