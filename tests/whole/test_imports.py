"""`import hashdist` and a local search are light: neither torch nor Ray, nor faiss, is loaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hashdist
from tests import REPOSITORY

SEARCH = """
import sys, numpy as np, hashdist
heavy = {"torch", "ray", "faiss", "boto3", "sklearn"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
index = hashdist.create_index(sys.argv[1], bits=64)
codes = np.arange(80, dtype=np.uint8).reshape(10, 8)
index.append(codes, [f"image-{i}" for i in range(10)])
hits = hashdist.open_index(sys.argv[1]).search(codes[:2], k=3)
assert hits.keys()[0][0] == "image-0" and hits.distances[0, 0] == 0
loaded = {"torch", "ray", "faiss", "sklearn"} & set(sys.modules)
assert not loaded, loaded
print("ok", sorted(name for name in hashdist.__all__))
"""


def test_a_local_search_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, str(tmp_path / "index")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        hashdist.nothing_like_it  # noqa: B018
    assert all(hasattr(hashdist, name) for name in hashdist.__all__ if name != "load_model")


READ_ONLY = """
import numpy as np
from numba.core.caching import NullCache
from hashdist.nearest import scan
assert isinstance(scan._nearest._cache, NullCache)
found = scan.nearest(np.zeros((9, 8), np.uint8), np.zeros((1, 8), np.uint8), 3)
assert found.rows_QK.tolist() == [[0, 1, 2]]
"""


def test_a_search_works_where_no_cache_folder_can_be_written(tmp_path: Path) -> None:
    """numba refuses to cache when it finds no writable folder; the kernels are then compiled anew."""
    package = REPOSITORY / "hashdist"
    copy = tmp_path / "site" / "hashdist"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    blocked = tmp_path / "blocked"
    blocked.touch()  # a file where a folder would have to be made: not writable even for root
    for folder in {path.parent for path in copy.rglob("*.py")}:
        (folder / "__pycache__").touch()
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(tmp_path / "site"),
        "HOME": str(blocked),
        "XDG_CACHE_HOME": str(blocked),
    }
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


COMMANDS = ("index", "search", "protocol", "purge", "storage", "dedup")
LIGHT = ["hashdist.cli", "hashdist.reindex.run", *(f"hashdist.commands.{name}" for name in COMMANDS)]
HEAVY = {"torch", "ray", "sklearn", "matplotlib", "faiss"}


def test_what_a_cron_or_an_operator_runs_is_light_when_it_is_imported() -> None:
    code = f"import sys, {', '.join(LIGHT)}; print(*{HEAVY} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
