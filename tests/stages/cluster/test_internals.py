"""The private parts of Ray that this package touches, by name: another Ray has to be read before it is used."""

import ctypes
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray import _raylet
from ray._common.tls_utils import add_port_to_grpc_server
from ray._private import ray_constants, worker
from ray._private.state import state
from ray.serve import api
from ray.serve._private import replica
from ray.serve._private.http_util import ASGIReceiveProxy
from ray.train._internal.utils import get_address_and_port

from hashdist.stages.cluster import internals
from tests import REPOSITORY


def test_it_was_read_against_the_ray_that_is_installed() -> None:
    assert ray.__version__ == internals.READ_AGAINST, (
        f"Ray {internals.READ_AGAINST} was read, Ray {ray.__version__} is installed: read every private part that "
        "hashdist/stages/cluster/internals.py touches in the new source, then write its version there"
    )


@pytest.mark.parametrize(
    ("part", "parameters"),
    [
        (add_port_to_grpc_server, ["server", "address"]),
        (state.get_max_resources_from_cluster_config, []),
        (get_address_and_port, []),
        (ASGIReceiveProxy.__init__, ["self", "scope", "request_metadata", "receive_asgi_messages"]),
    ],
)
def test_private_functions_take_what_they_took(part: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(part).parameters) == parameters


def test_private_names_stand_where_they_stood() -> None:
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    assert "add_port_to_grpc_server(" in inspect.getsource(replica), "replicas no longer open their port by this name"
    assert "self._receive_asgi_messages(" in inspect.getsource(ASGIReceiveProxy)
    assert "__serve_build_asgi_app__" in inspect.getsource(api), "service/app.py builds its application in that method"
    assert {"_node_ip_address", "_temp_dir"} <= internals.on_loopback("folder").keys()
    assert callable(worker.print_to_stdstream)
    assert ctypes.c_int.in_dll(ctypes.CDLL(_raylet.__file__), internals._LOG_LEVEL).value in range(-2, 4)
    assert all(name in inspect.getsource(ray.init) for name in internals.on_loopback("folder"))


def test_no_other_file_touches_them() -> None:
    own = REPOSITORY / "hashdist" / "stages" / "cluster" / "internals.py"
    others = [
        str(path)
        for path in (REPOSITORY / "hashdist").rglob("*.py")
        if path != own and any(part in path.read_text() for part in ("._private", "._internal", "ray._common"))
    ]
    assert not others
