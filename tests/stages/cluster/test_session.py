"""The Ray that hashdist starts by itself."""

import os

import pytest
import ray

from hashdist.ground.settings import ClusterSettings
from hashdist.stages.cluster import session
from tests import REPOSITORY
from tests.worlds.processes import LOOPBACK, descendants, listening

pytestmark = pytest.mark.cluster


def test_it_listens_on_the_loopback_only(ray_session: None) -> None:
    @ray.remote
    def where() -> str:
        return str(ray.util.get_node_ip_address())

    assert ray.get(where.remote()) == "127.0.0.1"
    addresses = {address for address, _ in listening(descendants(os.getpid()))}
    assert addresses
    assert addresses <= LOOPBACK


def test_a_start_that_took_too_long_is_made_again_and_any_other_error_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["The current node timed out during startup.", "The current node timed out during startup.", "", "no"])
    started: list[dict[str, object]] = []

    def init(**options: object) -> None:
        started.append(options)
        if what := next(said):
            raise RuntimeError(what)

    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    session._start(ClusterSettings(cpus=5), "folder")
    assert [one["num_cpus"] for one in started] == [5, 5, 5]
    with pytest.raises(RuntimeError, match="no"):
        session._start(ClusterSettings(), "folder")
    assert len(started) == 4


def test_workers_import_the_package_from_the_checkout_that_it_runs_from() -> None:
    folders = session._worker_environment()["PYTHONPATH"].split(os.pathsep)
    assert folders[0] == str(REPOSITORY)
