"""A node that is lost in the middle changes nothing. The long form, over networks: tests/worlds/machines.py."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.full]

IMAGES, PARTS = 60, 30
HEALTH = {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 3}
ENVIRONMENT = {
    **{f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()},
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "PYTHONPATH": str(REPOSITORY),
    # as a job has it that was submitted with this variable
    "AWS_DEFAULT_REGION": "us-east-1",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"AWS_DEFAULT_REGION": "us-east-1"}}}),
}


def test_features_and_graph_are_the_same_when_a_node_is_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(IMAGES):  # large, so that they take a while
        tiles = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        image = tiles.resize((2500, 2500), Image.Resampling.NEAREST)
        image.save(tmp_path / "images" / f"{number:03d}.png", compress_level=1)
    command = [sys.executable, "-m", "tests.worlds.lost_node", str(tmp_path)]
    with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | ENVIRONMENT | {"RAY_TMPDIR": folder}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert 0 < found["done"] < PARTS
    assert len(found["without"]["features"]) == PARTS
    assert found["with"] == found["without"]
