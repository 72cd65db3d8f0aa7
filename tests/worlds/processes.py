"""What processes of this machine there are, and where they listen: read from /proc."""

import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def descendants(pid: int) -> set[int]:
    """The process, its children, and theirs, also those that lead sessions of their own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, new = {pid}, [pid]
    while new:
        new = [child for one in new for child in children.get(one, [])]
        found.update(new)
    return found


def listening(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Address and port of every TCP socket that these processes listen on."""
    own = {name for pid in pids for name in _open_files(pid)}
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            local, state, inode = fields[1], fields[3], fields[9]
            if state == "0A" and f"socket:[{inode}]" in own:
                address, port = local.split(":")
                found.add((_address(family, address), int(port, 16)))
    return found


def _open_files(pid: int) -> list[str]:
    names = []
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                names.append(os.readlink(entry))
    return names


def _address(family: int, words: str) -> str:
    """An address as /proc writes it (32-bit words in the machine's order, in hexadecimal) in the usual form."""
    packed = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
    return socket.inet_ntop(family, packed)
