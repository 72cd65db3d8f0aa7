"""The line of cluster/crontab, as cron runs it: doubled, killed and late runs end in what the images ask for."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hashdist.collection.readers.reader import content_digest
from hashdist.index import open_index
from hashdist.models.model import load_model
from tests import REPOSITORY
from tests.worlds import reindex as world

pytestmark = pytest.mark.cluster

IMAGES = {f"{i:03d}.png": world.png(i) for i in range(120)}


class Machine:
    """A place where the crontab is installed: what its variables point to, and an index without rows."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, (base / "root").as_uri()
        world.write(base / "images", IMAGES)
        world.empty_index(self.root)
        home = base / "hashdist"
        home.mkdir()
        (home / "jobs").symlink_to(REPOSITORY / "jobs")
        (home / ".venv").symlink_to(sys.prefix)
        settings = {
            "collection": {"uri": str(base / "images")},
            "index": {"name": "photos"},
            "gate": {"lost_rows": 1.0},
        }
        (base / "pipeline.yaml").write_text(yaml.safe_dump({"root": self.root, **settings}))

    def run(self, **variables: str) -> subprocess.Popen[bytes]:
        """The line, word for word, by /bin/sh with cron's environment and the crontab's variables, placed here."""
        lines = (REPOSITORY / "cluster" / "crontab").read_text().splitlines()
        *assignments, line = (line for line in lines if not line.startswith("#"))
        given = dict(assignment.split("=", 1) for assignment in assignments)
        here = {
            "HASHDIST": str(self.base / "hashdist"),
            "CONFIG": str(self.base / "pipeline.yaml"),
            "LOG": str(self.base / "log"),
            "LOCK": str(self.base / "lock"),
            "HASHDIST_CACHE": str(self.base / "cache"),
        }
        assert given.keys() == here.keys() | {"RAY_USAGE_STATS_ENABLED"}
        cron = {"HOME": str(self.base), "LOGNAME": "hashdist", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
        command = re.fullmatch(r"(?:\S+ ){5}(.*)", line)
        assert command
        environment = {**cron, **given, **here, **variables}
        return subprocess.Popen(["/bin/sh", "-c", command[1]], env=environment, cwd="/", start_new_session=True)

    def log(self) -> str:
        return (self.base / "log").read_text()

    def results(self) -> list[dict[str, Any]]:
        """What the runs that came to an end have printed, in that order."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def files(self) -> set[Path]:
        return set((self.base / "root").rglob("*"))


@pytest.mark.skipif(sys.platform != "linux", reason="flock is of Linux")
def test_the_line_of_the_crontab_is_harmless_whatever_happens_to_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    before = machine.files()

    killed = machine.run()
    while machine.files() == before:  # until it has written something
        assert killed.poll() is None, machine.log()
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(30)
    with (tmp_path / "lock").open() as dying:
        fcntl.flock(dying, fcntl.LOCK_EX)  # the last process of the run has let go
    assert machine.results() == []

    twice = [machine.run(), machine.run(LOCK=str(tmp_path / "another lock"))]
    assert [run.wait(200) for run in twice] == [0, 0], machine.log()
    assert len(machine.results()) == 2

    with (tmp_path / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a run that goes on for long
        assert machine.run().wait(60) == 0
    assert len(machine.results()) == 2

    assert machine.run().wait(200) == 0, machine.log()
    *_, last, late = machine.results()
    assert (late["encoded"], late["version"]) == (0, last["version"])
    assert world.content(machine.root) == {key: content_digest(data) for key, data in IMAGES.items()}
    index = open_index(f"{machine.root}/indexes/photos")
    assert index.rows == len(IMAGES)
    codes_NW = load_model(str(index.model_uri)).encode(list(IMAGES.values()))
    np.testing.assert_array_equal(index.codes_of(list(IMAGES)), codes_NW)
