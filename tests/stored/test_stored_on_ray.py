"""What earlier releases wrote is recognised by the stages, and a training run that was killed then is finished now."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hashdist

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]

Written = dict[str, Any]
Command = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def first_collection(written: Written) -> None:
    """The collection as it was when its pipeline ran."""
    os.rename("images", "grown")
    os.rename("first", "images")


@pytest.fixture
def root(tmp_path: Path) -> list[str]:
    """The root by its own path: workers of a cluster work in folders of their own."""
    return ["--root", str(tmp_path / "root")]


def test_every_stage_is_recognised_as_done(written: Written, root: list[str], command: Command) -> None:
    files = stored()
    stages = command("pipeline", *root)["stages"]
    assert {name for name, stage in stages.items() if stage["skipped"]} == set(written["stages"]) - {"evaluate"}
    for name, then in written["stages"].items():
        assert Path(stages[name].get("snapshot", "")).parts[-2:] == Path(then.get("snapshot", "")).parts[-2:]
        assert stages[name].get("rows") == then.get("rows")
    assert stages["evaluate"]["metrics"] == pytest.approx(written["stages"]["evaluate"]["metrics"])
    assert stored() == files


def test_a_killed_run_is_trained_to_the_same_end(written: Written, root: list[str], command: Command) -> None:
    then = written["killed"]
    manifests = Path(then["run"], "manifests")
    left = {path.name: path.read_bytes() for path in manifests.iterdir()}
    trained = command("train", *then["words"], *root)
    assert not trained["skipped"]
    assert Path(trained["snapshot"]).parts[-2:] == Path(then["snapshot"]).parts[-2:]
    assert len(list(manifests.iterdir())) == then["checkpoints"] > len(left) > 0  # none of them was made again
    assert {name: Path(manifests, name).read_bytes() for name in left} == left

    model = hashdist.load_model(trained["snapshot"])
    assert [epoch["loss"] for epoch in model.manifest["history"]] == pytest.approx(then["history"], rel=1e-4)
    codes_NW = model.encode(list(then["codes"]))
    recorded_NW = np.array([list(bytes.fromhex(code)) for code in then["codes"].values()], np.uint8)
    same_machine = written["machine"] == {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if same_machine:  # bit by bit
        assert trained["model_digest"] == then["model_digest"]
        assert np.array_equal(codes_NW, recorded_NW)
    else:
        assert np.unpackbits(codes_NW ^ recorded_NW).mean() < 0.01


def stored() -> list[str]:
    """Every file below the root."""
    return sorted(str(path) for path in Path("root").rglob("*") if path.is_file())
