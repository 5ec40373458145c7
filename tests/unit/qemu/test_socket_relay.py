from __future__ import annotations

import socket
import threading

import pytest

from qemu_dump_ext.qemu.socket_relay import always_read

PACKETS = 5000
PACKET = b"x" * 150


def _talk_as_qemu(peer: socket.socket) -> None:
    # All packets first, and only then whatever came for them.
    for _ in range(PACKETS):
        peer.sendall(PACKET)
    acknowledged = 0
    while acknowledged < PACKETS:
        acknowledged += len(peer.recv(1 << 16))
    peer.sendall(b"END")


@pytest.mark.timeout(60)
def test_two_who_do_not_read_while_they_write_both_get_through():
    owner, peer = socket.socketpair()
    before = owner.fileno()
    with owner, peer:
        talk = threading.Thread(target=_talk_as_qemu, args=(peer,))
        talk.start()
        with always_read(owner.fileno()):
            received = b""
            for _ in range(PACKETS):
                received += owner.recv(len(PACKET), socket.MSG_WAITALL)
                owner.sendall(b"+")
            received += owner.recv(3, socket.MSG_WAITALL)
        talk.join()
        assert received == PACKET * PACKETS + b"END"
        # The owner has its own connection back, as it was.
        assert (owner.fileno(), owner.getblocking()) == (before, True)
        owner.sendall(b"there")
        assert peer.recv(9) == b"there"
        peer.sendall(b"back")
        assert owner.recv(9) == b"back"


def test_what_the_owner_has_not_read_is_not_lost():
    owner, peer = socket.socketpair()
    with owner, peer:
        with always_read(owner.fileno()):
            peer.sendall(b"early")
            assert owner.recv(1) == b"e"
            assert owner.recv(9, socket.MSG_PEEK) == b"arly"
        assert owner.recv(9) == b"arly"
        peer.sendall(b"late")
        assert owner.recv(9) == b"late"


def test_the_end_of_the_peer_is_the_owners_end():
    owner, peer = socket.socketpair()
    with owner:
        with always_read(owner.fileno()):
            peer.sendall(b"bye")
            peer.close()
            assert owner.recv(9) == b"bye"
            assert owner.recv(9) == b""
        assert owner.recv(9) == b""
