"""A Ray cluster of several machines on this one, and what the loss of a machine does to a run of hashdist.

    python -m tests.worlds.machines                                  # as root; all faults, some ten minutes
    python -m tests.worlds.machines --faults kill:train mend:reindex --json

A machine is a set of Linux namespaces: its own network (one cable to a switch that the script makes), processes,
host name, shared memory, and folder for everything that is written; the rest of the file system is read-only, so
that nothing passes from node to node but over the network (but for compiled code beside its source, as an image would
hold it). One machine runs an S3 server, one the Ray head, the
others are worker nodes. Addresses and interfaces exist inside these namespaces only, nothing of the host's is
touched, and all of it ends with the script, however that ends.

Each run is two Ray jobs on an empty root in S3: `pipeline`, then, on a collection in which images were added, changed
and removed, `reindex` with the difference encoded through Ray. A fault is FAULT:STAGE:

    kill    all processes of a worker node get SIGKILL
    cut     its cable is pulled
    mend    its cable is pulled, and plugged in again once Ray has given the node up

in the middle of `features`, `train` or `reindex`. A new node takes its place, as an autoscaler would have it. Both
jobs must end by themselves, and with what they give without a fault: the same collection, features, graph, weights,
codes, index and answers, bit by bit. The exit code is 0 if so, 1 if not, 2 where such a run is not possible.

Ray learns that a node is gone by health checks, after 15 to 65 s as it comes; here their settings are shorter.
"""

import argparse
import io
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from tests import REPOSITORY

STAGES = ("features", "train", "reindex")
FAULTS = ("kill", "cut", "mend")
TOOLS = ("ip", "mount", "nsenter", "setpriv", "unshare")

NETWORK = "10.91.0."
SWITCH, S3, HEAD = f"{NETWORK}1", f"{NETWORK}2", f"{NETWORK}3"
S3_PORT, RAY_PORT, DASHBOARD_PORT = 9000, 6379, 8265
AGENT_PORTS = ("dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent", "metrics-export")
"""Of a node; where they are not given, a node waits 15 s for its agents to choose some, and dies if they are slower."""
BUCKET = "hashdist"

OBJECT_STORE = 200 << 20
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}

IMAGES, PART_ROWS = 800, 16
ADDED, CHANGED, REMOVED = 140, 70, 24
SIZE = 32
UNDER_WAY = {"features": 8, "train": 3, "reindex": 3}
"""Committed records (parts; checkpoints) of a stage after which a fault comes."""


class Wrong(Exception):
    """The run did not do what it must."""


def say(text: str) -> None:
    """A line on stderr, with the time."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


# Machines


MACHINE = """
set -e
read -r _
ip link set lo up
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
hostname "$NAME"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$FOLDER/own"
mkdir "$HOME" "$TMPDIR"
for kept in $KERNELS; do mount --bind "$kept" "$kept"; done
mount -o remount,bind,ro "$FOLDER"
mount -o remount,bind,ro /
cd "$HOME"
"$@"
"""


class Machine:
    """A machine on the switch; its first process is a shell that runs one command.

    Args:
        name: its host name, and the name of its port on the switch.
        address: of its network interface.
        folder: with its output; each machine sees an empty folder of its own at `folder`/own.
        command: what it runs.
        environment: of that command.
    """

    def __init__(
        self, name: str, address: str, folder: Path, command: Sequence[str], environment: dict[str, str]
    ) -> None:
        self.name, self.address, self.log = name, address, folder / f"{name}.log"
        places = {"HOME": f"{folder}/own/home", "TMPDIR": f"{folder}/own/tmp", "FOLDER": str(folder)}
        isolated = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *isolated, "sh", "-c", MACHINE, "sh", *command],
                env={**environment, **places, "NAME": name, "ADDRESS": address},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        _wait("a network namespace", self._is_apart, 20)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(self.process.pid))
        _ip("link", "set", name, "master", "switch", "up")
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.close()

    def _is_apart(self) -> bool:
        return os.readlink(f"/proc/{self.process.pid}/ns/net") != os.readlink("/proc/self/ns/net")

    def plug(self, *, plugged: bool) -> None:
        """Plug its cable into the switch, or pull it."""
        _ip("link", "set", self.name, "up" if plugged else "down")

    def kill(self) -> None:
        """SIGKILL for every process of it: the first one's, which takes all others with it."""
        self.process.kill()
        self.process.wait()

    @property
    def ended(self) -> bool:
        """Whether its command has."""
        return self.process.poll() is not None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _wait(what: str, there: Callable[[], Any], seconds: float, every: float = 0.05) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := there():
            return found
        time.sleep(every)
    raise Wrong(f"waited {seconds:.0f} s for {what}")


# The cluster


class Cluster:
    """An S3 server, a Ray head without CPUs of its own, and worker nodes.

    Args:
        folder: for what is written.
        cpus: logical CPUs of each.
        ceph: shell script that starts a Ceph gateway on a loopback; empty = moto serves S3.
    """

    def __init__(self, folder: Path, cpus: int, ceph: str) -> None:
        self.folder, self.cpus, self.workers = folder, cpus, dict[str, Machine]()
        self._addresses, self._heads = (f"{NETWORK}{number}" for number in range(10, 250)), count(1)
        access = ("testkey", "testsecret") if ceph else ("test", "test")
        self.store_access = {
            "AWS_ENDPOINT_URL": f"http://{S3}:{S3_PORT}",
            "AWS_ACCESS_KEY_ID": access[0],
            "AWS_SECRET_ACCESS_KEY": access[1],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": f"{folder}/own",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "60",
            "RAY_worker_niceness": "0",
            "HASHDIST_CACHE": f"{folder}/own/home/cache",
            "KERNELS": " ".join(map(str, (REPOSITORY / "hashdist").rglob("__pycache__"))),
            **HEALTH,
            **self.token,
        }
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "switch", "type", "bridge")
        _ip("address", "add", f"{SWITCH}/24", "dev", "switch")
        _ip("link", "set", "switch", "up")
        self.s3 = self._machine("s3", S3, self._s3_command(ceph))
        self.head = self._head()

    def _s3_command(self, ceph: str) -> list[str]:
        if not ceph:
            return [sys.executable, "-m", "moto.server", "-H", S3, "-p", str(S3_PORT)]
        # the script's servers listen on a loopback, which no other machine reaches
        moved = f"cd $FOLDER/own; sed 's/127[.]0[.]0[.]1/{S3}/g' {Path(ceph).resolve()} > ceph.sh"
        return ["sh", "-c", f"{moved}; bash ceph.sh up ceph {S3_PORT}; exec sleep infinity"]

    def _ray_command(self, address: str, *more: str) -> list[str]:
        head = more == ("--head",)
        role = (
            [*more, "--port", str(RAY_PORT), "--dashboard-host", HEAD] if head else ["--address", f"{HEAD}:{RAY_PORT}"]
        )
        sizes = ["--num-cpus", str(0 if head else self.cpus), "--object-store-memory", str(OBJECT_STORE)]
        for number, name in enumerate(AGENT_PORTS, 52365):
            sizes += [f"--{name}-port", str(number)]
        start = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        return [
            *start,
            *role,
            *sizes,
            "--node-ip-address",
            address,
            *(["--temp-dir", f"{self.folder}/own/ray"] if head else []),
        ]

    def _machine(self, name: str, address: str, command: Sequence[str]) -> Machine:
        return Machine(name, address, self.folder, command, self.environment)

    def _head(self) -> Machine:
        return self._machine(f"head{next(self._heads)}", HEAD, self._ray_command(HEAD, "--head"))

    def add_node(self) -> Machine:
        """One more worker node."""
        address = next(self._addresses)
        name = f"node{int(address.rpartition('.')[2]) - 9}"
        self.workers[name] = self._machine(name, address, self._ray_command(address))
        return self.workers[name]

    def start(self, nodes: int, seconds: float = 600) -> None:
        """Wait for the S3 server and the head, and start the worker nodes."""
        import boto3

        os.environ.update(self.store_access | self.token)
        s3 = boto3.client("s3")
        _wait("the S3 server", lambda: _quietly(s3.list_buckets), seconds, 0.3)
        s3.create_bucket(Bucket=BUCKET)
        self.wait_for_nodes(seconds)
        for _ in range(nodes):
            self.add_node()
            self.wait_for_nodes(seconds)

    def wait_for_nodes(self, seconds: float = 600) -> None:
        """Until the head and all worker machines are nodes that live. A node may fail to start on a busy machine."""
        tries = 5

        def there() -> bool:
            nonlocal tries
            for machine in [machine for machine in (self.s3, self.head, *self.workers.values()) if machine.ended]:
                tries -= 1
                if tries < 0 or machine is self.s3 or (machine is self.head and self.workers):
                    raise Wrong(f"{machine.name} has ended:\n{machine.log.read_text()[-2000:]}")
                if machine is self.head:
                    self.head = self._head()
                else:
                    del self.workers[machine.name]
                    self.add_node()
            wanted = {machine.address for machine in (self.head, *self.workers.values())}
            return wanted <= set(_quietly(self.alive) or {})

        _wait("all Ray nodes", there, seconds, 0.5)

    def alive(self) -> dict[str, str]:
        """Address of every live node -> its id."""
        from ray.util.state import list_nodes

        found = list_nodes(address=self.dashboard, timeout=10)
        return {node.node_ip: node.node_id for node in found if node.state == "ALIVE"}

    def actors(self, job: str) -> list[Any]:
        """What Ray's state API tells of the actors of a job."""
        from ray.util.state import list_actors

        return list(
            list_actors(address=self.dashboard, filters=[("job_id", "=", job)], detail=True, limit=1000, timeout=10)
        )

    def tasks(self, job: str) -> list[Any]:
        """What it tells of the attempts of all tasks of a job."""
        from ray.util.state import list_tasks

        found = list_tasks(
            address=self.dashboard, filters=[("job_id", "=", job)], detail=True, limit=10_000, timeout=30
        )
        return list(found)

    def stop_jobs(self) -> None:
        """Those that still run."""
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(self.dashboard)
        for job in client.list_jobs():
            if job.submission_id and not job.status.is_terminal():
                client.stop_job(job.submission_id)
        self.wait_for_nodes()

    @property
    def dashboard(self) -> str:
        """URL of the head's dashboard, which takes jobs."""
        return f"http://{HEAD}:{DASHBOARD_PORT}"

    def machine_of(self, node_id: str) -> Machine | None:
        """The worker machine that is this node, None for the head or one that is gone."""
        address = next((address for address, found in self.alive().items() if found == node_id), None)
        return next((machine for machine in self.workers.values() if machine.address == address), None)


def _quietly(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception:
        return None


# Jobs


class Job:
    """A command of hashdist as a Ray job, submitted as the README says.

    Args:
        cluster: where.
        script: file name in jobs/.
        config: settings, as they stand in YAML.
        words: more of the command line.
    """

    def __init__(self, cluster: Cluster, script: str, config: dict[str, Any], *words: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self.cluster, self.script, self.started = cluster, script, time.monotonic()
        self.client = JobSubmissionClient(cluster.dashboard)
        with tempfile.TemporaryDirectory(dir=cluster.folder) as folder:
            shutil.copytree(REPOSITORY / "jobs", Path(folder) / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
            (Path(folder) / "pipeline.yaml").write_text(json.dumps(config))  # JSON is YAML
            self.id = self.client.submit_job(
                entrypoint=f"{sys.executable} jobs/{script}.py --config pipeline.yaml --json {' '.join(words)}",
                runtime_env={"working_dir": folder, "env_vars": cluster.store_access},
            )

    @property
    def ray_id(self) -> str:
        """The id that Ray's state API knows it by."""
        return str(self.client.get_job_info(self.id).driver_info.id)

    @property
    def over(self) -> bool:
        """Whether it is."""
        return self.client.get_job_status(self.id).is_terminal()

    def result(self, seconds: float) -> dict[str, Any]:
        """What it printed as JSON. Raises Wrong if it has failed, or is not over after so many seconds of its life."""
        try:
            _wait(self.script, lambda: self.over, self.started + seconds - time.monotonic(), 0.2)
        except Wrong:
            raise Wrong(f"{self.script} was not over after {seconds:.0f} s:\n{self._tail()}") from None
        if self.client.get_job_status(self.id) != "SUCCEEDED":
            raise Wrong(f"{self.script} failed:\n{self._tail()}")
        lines = self.client.get_job_logs(self.id).splitlines()
        found: dict[str, Any] = next(json.loads(line) for line in reversed(lines) if line.startswith("{"))
        return {**found, "job_seconds": time.monotonic() - self.started}

    def _tail(self) -> str:
        return "\n".join(self.client.get_job_logs(self.id).splitlines()[-60:])


# A run


@dataclass
class Loss:
    """A fault that was made, and what came of it."""

    fault: str
    stage: str
    done: int
    """Records that the stage had committed when the node was lost."""
    noticed_s: float
    """Seconds until Ray counted the node as dead."""
    of: int = 0
    """Records of the stage in the end."""
    retried: int = 0
    """Attempts of tasks after their first (features, reindex), or worker groups after the first (train)."""


@dataclass
class Run:
    """Both jobs on a root of their own, with faults or without."""

    cluster: Cluster
    name: str
    faults: dict[str, str]
    """Stage -> fault."""
    limit_s: float
    losses: list[Loss] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """Where everything is committed."""
        return f"s3://{BUCKET}/{self.name}/root"

    def go(self) -> None:
        """Run, make the faults in their stages, and read what came out."""
        first, changes, removed = pictures()
        self._put(first)
        pipeline = Job(self.cluster, "pipeline", self._config())
        for stage in ("features", "train"):
            if stage in self.faults:
                self._lose(pipeline, stage)
        result = pipeline.result(self.limit_s)
        self.seconds = {stage: found["seconds"] for stage, found in result["stages"].items()}
        self._count(pipeline)
        self.outcome = outcome(self.root, "")
        self._put(changes, removed)
        reindex = Job(self.cluster, "reindex", self._config(), "--in_process", "10")
        if "reindex" in self.faults:
            self._lose(reindex, "reindex")
        self.seconds["reindex"] = reindex.result(self.limit_s)["seconds"]
        self._count(reindex)
        self.outcome |= outcome(self.root, "reindex ")
        say(f"{self.name}: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items()))

    def _config(self) -> dict[str, Any]:
        return {
            "root": self.root,
            "collection": {"uri": f"s3://{BUCKET}/{self.name}/images", "part_rows": PART_ROWS},
            "features": {"backbone": "pixels"},
            "graph": {"train_sample": 600, "part_rows": 300},
            "train": {
                "method": "dsah",
                "bits": 32,
                "workers": 2,
                "checkpoint_steps": 8,
                "options": {"lr": 1e-3, "lambda_": 1.0, "epochs": 20},
            },
            "index": {"name": "photos"},
            "evaluate": {"queries": 200},
        }

    def _put(self, images: dict[str, bytes], removed: Sequence[str] = ()) -> None:
        import boto3

        s3, base = boto3.client("s3"), f"{self.name}/images/"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: s3.put_object(Bucket=BUCKET, Key=base + key, Body=images[key]), images))
            list(pool.map(lambda key: s3.delete_object(Bucket=BUCKET, Key=base + key), removed))

    # The fault

    def _lose(self, job: Job, stage: str) -> None:
        """Lose a node that works on the stage, in the middle of it; another one takes its place."""

        def under_way() -> int:
            if job.over:
                job.result(0)
                raise Wrong(f"{job.script} was over before a node could be lost")
            done = self._records(stage)
            return done if done >= UNDER_WAY[stage] else 0

        _wait(f"{stage} to be under way", under_way, self.limit_s)
        fault, victim = self.faults[stage], self._victim(job, stage)
        done = under_way()
        started = time.monotonic()
        victim.kill() if fault == "kill" else victim.plug(plugged=False)
        say(f"{self.name}: {stage}: {fault} {victim.name} after {done} records")
        _wait(
            "Ray to notice",
            lambda: victim.address not in (_quietly(self.cluster.alive) or {victim.address: ""}),
            120,
            0.2,
        )
        loss = Loss(fault, stage, done, time.monotonic() - started)
        del self.cluster.workers[victim.name]
        if fault == "mend":
            victim.plug(plugged=True)
        self.losses.append(loss)
        say(f"{self.name}: Ray noticed after {loss.noticed_s:.1f} s")
        self.cluster.add_node()
        self.cluster.wait_for_nodes()
        if fault == "mend":
            _wait("the node that was cut off to leave", lambda: victim.ended, 120, 0.2)
            say(f"{self.name}: {victim.name} has left")
        victim.kill()

    def _records(self, stage: str) -> int:
        """What the stage has committed so far: parts of features, checkpoints."""
        from hashdist.store import open_store

        kind, part = ("runs", "/manifests/") if stage == "train" else ("features", "/parts/")
        found = sum(part in entry.name for entry in open_store(f"{self.root}/{kind}").list())
        return found - -(-IMAGES // PART_ROWS) if stage == "reindex" else found

    def _checkpoints(self) -> list[Any]:
        from hashdist.store import open_store
        from hashdist.store.commit import Log

        root = open_store(f"{self.root}/runs")
        runs = {found.name.partition("/")[0] for found in root.list() if "/manifests/" in found.name}
        return [log.read(number).manifest for log in (Log(root.child(run)) for run in runs) for number in log.numbers()]

    def _victim(self, job: Job, stage: str) -> Machine:
        """A node that works on it now: in training that of rank 0, which writes; the other is cut off for good."""
        if stage == "train":
            writer = self.cluster.workers[self._checkpoints()[-1]["worker"]["host"]]
            if self.faults[stage] != "cut":
                return writer
            others = self._nodes_of(job, "RayTrainWorker") - {writer.name}
        else:
            others = self._nodes_of(job, "MapWorker")
        if not others:
            raise Wrong(f"no worker node was found that works on {stage}")
        return self.cluster.workers[min(others)]

    def _nodes_of(self, job: Job, actor: str) -> set[str]:
        found = [a.node_id for a in self.cluster.actors(job.ray_id) if a.state == "ALIVE" and actor in a.class_name]
        return {machine.name for node in found if (machine := self.cluster.machine_of(node))}

    def _count(self, job: Job) -> None:
        """What became of the losses in this job. Raises Wrong for one that came too late, or was not felt."""
        again = sum(task.attempt_number > 0 for task in self.cluster.tasks(job.ray_id))
        for loss in [loss for loss in self.losses if (loss.stage == "reindex") == (job.script == "reindex")]:
            loss.of, loss.retried = self._records(loss.stage), again
            if loss.stage == "train":
                loss.retried = len({json.dumps(found["worker"]) for found in self._checkpoints()}) - 1
            if loss.done >= loss.of or not loss.retried:
                raise Wrong(f"{loss} did not come in the middle of its stage")


def pictures() -> tuple[dict[str, bytes], dict[str, bytes], list[str]]:
    """Handwritten digits as PNG by key: those at first, those that come or change later, and keys that go then."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)

    def png(number: int, shift: int = 0) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(np.roll(pixels[number], shift, axis=1)).resize((SIZE, SIZE)).save(sink, "png")
        return sink.getvalue()

    keys = [f"{label}/{number:04d}.png" for number, label in enumerate(digits.target)]
    first = {keys[number]: png(number) for number in range(IMAGES)}
    changes = {keys[number]: png(number) for number in range(IMAGES, IMAGES + ADDED)}
    changes |= {keys[number]: png(number, 1) for number in range(CHANGED)}
    return first, changes, keys[CHANGED : CHANGED + REMOVED]


def outcome(root: str, prefix: str) -> dict[str, Any]:
    """What a run has given, as digests that do not depend on where the root is or who did which part when."""
    from hashdist import open_index
    from hashdist.store import open_store
    from hashdist.store.commit import open_artefact

    store = open_store(root)

    def committed(kind: str) -> list[Any]:
        names = {
            found.name.partition("/")[0] for found in store.child(kind).list() if found.name.endswith("/manifest.json")
        }
        return sorted(
            (open_artefact(f"{root}/{kind}/{name}", kind) for name in names), key=lambda a: a.manifest()["created_at"]
        )

    index = open_index(f"{root}/indexes/photos")
    rows = sorted(row for table in index.tables(["digest", "labels", "size"]) for row in map(_row, table.to_pylist()))
    keys = sorted(index.keys())
    hits = index.search(index.codes_of(keys[::20]), k=10)
    within = index.search_within(index.codes_of(keys[::100]), 6)
    model = committed("models")[-1].manifest()
    return {
        prefix + name: value
        for name, value in {
            "collection": [a.manifest()["content_digest"] for a in committed("collections")],
            "features": [a.manifest()["content_digest"] for a in committed("features")],
            "graph": [
                sorted(file["sha256"] for file in a.manifest()["files"].values() if file) for a in committed("graphs")
            ],
            "model": [model["model_digest"], model["head"]["sha256"]],
            "codes": [[file["sha256"] for file in a.manifest()["files"]] for a in committed("codes")],
            "index": [index.version, index.rows, _digest(rows), _digest(index.codes_of(keys).tobytes())],
            "answers": [
                _digest(hits.ids.tobytes()),
                _digest(hits.distances.tobytes()),
                _digest(within.ids.tobytes()),
            ],
        }.items()
    }


def _row(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def _digest(value: Any) -> str:
    return sha256(value if isinstance(value, bytes) else json.dumps(value).encode()).hexdigest()[:16]


# All runs


def inside(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, in namespaces of its own: the switch is this process's own network."""
    folder = Path(arguments.inside)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    (folder / "own").mkdir()
    cluster = Cluster(folder, arguments.cpus, arguments.ceph)
    try:
        cluster.start(arguments.nodes)
        say(f"{arguments.nodes} worker nodes of {arguments.cpus} CPUs, a head and an S3 server are up")
        plain, runs = Run(cluster, "plain", {}, arguments.limit), []
        plain.go()
        for number, faults in enumerate(rounds(arguments.faults), 1):
            runs.append(run := Run(cluster, f"run{number}", faults, arguments.limit))
            try:
                run.go()
                say(f"{run.name}: {'equal' if run.outcome == plain.outcome else 'NOT EQUAL'}")
            except Wrong as error:
                run.outcome["error"] = str(error)
                say(f"{run.name}: WRONG: {error}")
                cluster.stop_jobs()
        return told([plain, *runs])
    finally:
        if arguments.logs:
            _keep_logs(cluster, Path(arguments.logs))


def rounds(faults: Sequence[str]) -> list[dict[str, str]]:
    """Faults as runs, stage -> fault: one of each stage to a run, the same kind together where that can be."""
    found: list[dict[str, str]] = []
    for fault, _, stage in (text.partition(":") for text in faults):
        free = [run for run in found if stage not in run]
        run = next((run for run in free if fault in run.values()), None)
        if run is None:
            found.append(run := {})
        run[stage] = fault
    return found


def told(runs: Sequence[Run]) -> dict[str, Any]:
    """Each fault beside the run without any."""
    plain = runs[0]
    faults = []
    for run in runs[1:]:
        differ = [name for name in {**plain.outcome, **run.outcome} if run.outcome.get(name) != plain.outcome.get(name)]
        for loss in run.losses:
            faults.append(
                {
                    **vars(loss),
                    "seconds": run.seconds.get(loss.stage, 0.0),
                    "seconds_without": plain.seconds[loss.stage],
                    "differ": differ,
                    "equal": not differ,
                }
            )
    return {
        "seconds_without": plain.seconds,
        "outcome": plain.outcome,
        "faults": faults,
        "equal": all(run.outcome == plain.outcome for run in runs),
    }


def table(result: dict[str, Any]) -> str:
    """The result for a reader, as Markdown."""
    lines = [
        "| fault | in | after records | noticed after | tried again | stage | without | equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in result["faults"]:
        cells = [
            f["fault"],
            f["stage"],
            f"{f['done']} of {f['of']}",
            f"{f['noticed_s']:.1f} s",
            f["retried"],
            f"{f['seconds']:.1f} s",
        ]
        cells += [f"{f['seconds_without']:.1f} s", "yes" if f["equal"] else f"no: {', '.join(f['differ'])}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _keep_logs(cluster: Cluster, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for log in cluster.folder.glob("*.log"):
        shutil.copy(log, folder)
    for machine in [cluster.head, *cluster.workers.values()]:
        for logs in Path(f"/proc/{_first_process(machine)}/root{cluster.folder}/own/ray").glob("session_2*/logs"):
            shutil.copytree(logs, folder / machine.name, dirs_exist_ok=True, ignore_dangling_symlinks=True)


def _first_process(machine: Machine) -> str:
    found = subprocess.run(["pgrep", "-P", str(machine.process.pid)], capture_output=True, text=True, check=False)
    return found.stdout.split()[0] if found.stdout else "0"


def refusal() -> str:
    """Why this machine cannot do it; empty if it can."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need Linux and root"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"not found: {', '.join(missing)} (packages iproute2 and util-linux)"
    words = shlex.split("unshare --net --pid --mount --fork ip link add v0 type veth peer name v1")
    tried = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"no veth pair can be made in a namespace: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens to this process happens to that one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.worlds.machines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = [f"{fault}:{stage}" for fault in FAULTS for stage in STAGES]
    parser.add_argument("--faults", nargs="*", default=every, choices=every, metavar="FAULT:STAGE")
    parser.add_argument("--nodes", type=int, default=3, help="worker nodes")
    parser.add_argument("--cpus", type=int, default=1, help="logical CPUs of a worker node")
    parser.add_argument(
        "--ceph", default="", help="script that starts a Ceph gateway (up FOLDER PORT), instead of moto"
    )
    parser.add_argument(
        "--limit", type=float, default=400, help="seconds after which a job that is not over has failed"
    )
    parser.add_argument("--logs", default="", help="folder for the logs of all machines")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        try:
            result = inside(arguments)
        except Wrong as error:
            say(f"WRONG: {error}")
            return 1
        print(json.dumps(result) if arguments.json else table(result), flush=True)
        return 0 if result["equal"] else 1
    if reason := refusal():
        say(reason)
        return 2
    with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp") as folder:
        apart = shlex.split("setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc")
        program = [sys.executable, "-m", "tests.worlds.machines", *sys.argv[1:], "--inside", folder]
        process = subprocess.Popen([*apart, *program], cwd=REPOSITORY)
        with _ended(process):
            return process.wait()


if __name__ == "__main__":
    sys.exit(main())
