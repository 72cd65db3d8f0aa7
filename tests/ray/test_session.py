"""The Ray that hashdist starts by itself."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from hashdist import distributed
from hashdist.settings import ClusterSettings


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, new = {pid}, [pid]
    while new:
        new = [child for one in new for child in children.get(one, [])]
        found |= set(new)
    return found


def sockets(pids: set[int]) -> set[str]:
    found = set()
    for pid in pids:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    found.add(os.readlink(entry))
    return found


def listening() -> dict[str, str]:
    """Local address of every listening TCP socket, as /proc writes it, by the socket's name."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]": row[1].partition(":")[0] for row in rows if row[3] == "0A"}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_it_listens_on_the_loopback_only(ray_session: None) -> None:
    @ray.remote
    def where() -> str:
        return str(ray.util.get_node_ip_address())

    assert ray.get(where.remote()) == "127.0.0.1"
    own = sockets(descendants(os.getpid()))
    addresses = {address for name, address in listening().items() if name in own}
    assert addresses
    assert addresses <= LOOPBACK


def test_a_start_that_took_too_long_is_made_again_and_any_other_error_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["The current node timed out during startup.", "The current node timed out during startup.", "", "no"])
    started: list[dict[str, object]] = []

    def init(**options: object) -> None:
        started.append(options)
        if what := next(said):
            raise RuntimeError(what)

    monkeypatch.setattr(distributed.ray, "init", init)
    monkeypatch.setattr(distributed.ray, "shutdown", lambda: None)
    distributed._start(ClusterSettings(cpus=5), "folder")
    assert [one["num_cpus"] for one in started] == [5, 5, 5]
    with pytest.raises(RuntimeError, match="no"):
        distributed._start(ClusterSettings(), "folder")
    assert len(started) == 4
