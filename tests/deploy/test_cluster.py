"""cluster/: image, `ray up`, systemd units and scripts name what exists, and pass the checks of what reads them."""

import configparser
import functools
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

import botocore.session
import pytest
import ray
import yaml
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hashdist import __version__, cli
from hashdist.ground.errors import HashdistError
from tests import REPOSITORY
from tests.worlds.processes import listening

CLUSTER = REPOSITORY / "cluster"
BIN = Path(sys.executable).parent
UNITS = sorted((CLUSTER / "systemd").glob("*.service"))
UP = sorted(CLUSTER.glob("*.yaml"))


def script_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CLUSTER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The image


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str, str]]:
    return list(script_of("check_install").instructions((CLUSTER / "Dockerfile").read_text()))


def test_the_dockerfile_is_as_hadolint_wants_it() -> None:
    hadolint = BIN / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_without_root_from_a_pinned_base(dockerfile: list[tuple[str, str, str]]) -> None:
    users = [rest for _, word, rest in dockerfile if word == "USER"]
    assert users == ["1000:1000"]
    names = {stage for stage, _, _ in dockerfile if stage} | {"${BASE}", "${VARIANT}"}
    bases = [rest.partition(" AS ")[0] for _, word, rest in dockerfile if word == "FROM"]
    assert set(bases) <= names
    arguments = dict(rest.split("=") for stage, word, rest in dockerfile if word == "ARG" and not stage)
    assert set(arguments) == {"BASE", "VARIANT"}
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+\.\d+-slim-\w+", arguments["BASE"])
    assert {"cpu", "gpu"} <= names
    assert not [rest for _, word, rest in dockerfile if word in ("ADD", "ENTRYPOINT")]
    labels = " ".join(rest for _, word, rest in dockerfile if word == "LABEL")
    assert f'image.version="{__version__}"' in labels
    assert 'driver.minimum="580"' in labels


def test_the_build_sees_what_it_copies_and_nothing_else(dockerfile: list[tuple[str, str, str]]) -> None:
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for _, word, rest in dockerfile
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((REPOSITORY / name).exists() for name in copied)


def closure(requirements: list[str]) -> set[str]:
    """Names that the installed packages' metadata lead to from these requirements, on this platform."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        known = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if known in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found.add(known)
        for text in importlib.metadata.requires(wanted.name) or []:
            needed = Requirement(text)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                needed.marker = None
                waiting.append(needed)
    return {name for name, _ in found}


def entries(lock: str) -> dict[str, set[str]]:
    """Hashes by the pinned name of every entry of a lock."""
    parts = [part for part in re.split(r"(?m)^(?=\w)", lock) if part]
    return {part.split()[0]: set(re.findall(r"sha256:\w{64}", part)) for part in parts}


@pytest.mark.skipif(sys.platform != "linux", reason="the image is of Linux")
def test_the_image_has_what_the_project_depends_on_and_no_tool() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    everything, chosen = entries(lock), script_of("lock").chosen
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = closure(project["dependencies"])
    for variant in ("cpu", "gpu"):
        torch, packages = (entries(chosen(lock, variant, part)) for part in ("torch", "packages"))
        assert not torch.keys() & packages.keys()
        assert all(hashes and everything[name] == hashes for name, hashes in (torch | packages).items())
        names = {name.partition("==")[0] for name in torch | packages}
        elsewhere = {"faiss-cpu", "faiss-gpu", "pywin32", "tzdata"}
        left_out = set(script_of("lock").GPU_ONLY.split()) if variant == "cpu" else set()
        assert names - elsewhere == needed - elsewhere - left_out
        assert "faiss-cpu" in names
        assert ("faiss-gpu" in names) == (variant == "gpu")
    assert re.search(r"(?m)^faiss-cpu==\S+ \\$", chosen(lock, "cpu", "packages"))


# `ray up`


@pytest.mark.parametrize("path", UP, ids=lambda path: path.stem)
def test_ray_up_takes_the_configuration(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    images = re.findall(r"image: (\S+)", path.read_text())
    assert images
    assert {image.rpartition("/")[2] for image in images} <= {
        f"hashdist:{__version__}-{kind}" for kind in ("cpu", "gpu")
    }
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert config[commands][0] == "ray stop"
        started = starts(shlex.split(config[commands][1].replace("$RAY_HEAD_IP", "192.0.2.10")))
        assert started["head"] == commands.startswith("head")
        assert {name: started[name] for name in PORTS} == PORTS


def test_machines_on_ec2_are_as_ec2_wants_them() -> None:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    assert config["provider"]["use_internal_ips"]
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in config["available_node_types"].items():
        machine = dict(kind["node_config"])
        assert machine.pop("SubnetIds")  # Ray's own: it picks one of them
        assert machine["SecurityGroupIds"]  # else Ray makes a group that lets the world in to port 22
        assert machine["IamInstanceProfile"]["Arn"].endswith("hashdist-head" if name == "head" else "hashdist-worker")
        assert machine["MetadataOptions"] == {"HttpTokens": "required"}
        assert shape
        report = ParamValidator().validate({**machine, "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()


# systemd, and what starts Ray

PORTS = {"node_manager_port": 6380, "object_manager_port": 6381, "metrics_export_port": 8080}


def starts(words: list[str]) -> dict[str, Any]:
    """What Ray's own command line makes of `ray start ...`; it refuses what it does not know."""
    from ray.scripts.scripts import start

    assert words[:2] == ["ray", "start"]
    found: dict[str, Any] = start.make_context("ray start", words[2:]).params
    return found


def environment() -> dict[str, str]:
    """The variables of systemd/environment, those that are commented out with an empty value."""
    lines = (CLUSTER / "systemd" / "environment").read_text().splitlines()
    matches = [re.fullmatch(r"#?([A-Z_]+)=(\S*)", line) for line in lines]
    return {match[1]: match[2] for match in matches if match}


def unit(path: Path) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parsed.optionxform = str  # type: ignore[assignment]
    parsed.read_string(path.read_text().replace("\\\n", " "))
    return parsed


def command(path: Path) -> list[str]:
    """The words of a unit's ExecStart with the variables of the environment file, the program by its name."""
    words = [Template(word).substitute(environment()) for word in shlex.split(unit(path)["Service"]["ExecStart"])]
    program = Path(words[0])
    assert program.parent == Path("/opt/hashdist/.venv/bin")
    assert (BIN / program.name).exists()
    return [program.name, *words[1:]]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_what_there_is(path: Path, tmp_path: Path) -> None:
    service = unit(path)["Service"]
    assert (service["User"], service["NoNewPrivileges"], service["ProtectSystem"]) == ("hashdist", "yes", "strict")
    assert service["EnvironmentFile"] == "/etc/hashdist/environment"
    name, *words = command(path)
    config = tmp_path / "pipeline.yaml"
    config.write_text("root: /data\n")
    words = [str(config) if word == "/etc/hashdist/pipeline.yaml" else word for word in words]
    if name == "ray":
        started = starts([name, *words])
        assert {port: started[port] for port in PORTS} == PORTS
        assert started["block"]
        assert started["object_store_memory"] == 2 << 30
        if started["head"]:
            assert (started["port"], started["dashboard_host"]) == (6379, "127.0.0.1")
        else:
            assert started["address"] == "127.0.0.1:6379"
        return
    if name == "python":
        job = REPOSITORY / words.pop(0)
        job_name = re.search(r'main\(\["(.+?)", \*sys', job.read_text())
        assert job_name
        words.insert(0, job_name[1])
    settings, _ = cli.parse(words[0], words[1:])
    assert (settings.root, settings.cluster.address) == ("/data", "127.0.0.1:6379")
    with pytest.raises(HashdistError):
        cli.parse(words[0], [*words[1:], "--nosuch", "1"])


def test_every_variable_of_the_environment_is_read_by_somebody() -> None:
    source = "".join(path.read_text() for path in (REPOSITORY / "hashdist").rglob("*.py"))
    units = "".join(path.read_text() for path in UNITS)
    used = set(re.findall(r"\$\{([A-Z_]+)\}", units))
    known = environment()
    assert used == {"RAY_HEAD", "OBJECT_STORE"}
    for name in known.keys() - used:
        if name.startswith("HASHDIST_"):
            assert name in source, name
        elif name.startswith("RAY_"):
            assert name.encode() in ray_itself(), name
        else:
            assert name.startswith("AWS_") or name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR"), name


@functools.cache
def ray_itself() -> bytes:
    """What of Ray reads environment variables."""
    folder = Path(ray.__file__).parent
    places = [folder / "_private" / "ray_constants.py", folder / "_raylet.so", *(folder / "_common").rglob("*.py")]
    return b"".join(place.read_bytes() for place in places)


def test_the_timer_is_persistent_and_starts_the_service() -> None:
    timer = unit(CLUSTER / "systemd" / "hashdist-reindex.timer")["Timer"]
    assert (timer["Persistent"], timer["RandomizedDelaySec"]) == ("true", "5min")
    assert unit(CLUSTER / "systemd" / "hashdist-reindex.service")["Service"]["Type"] == "oneshot"


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("there is no systemd-analyze")
    for path in (CLUSTER / "systemd").glob("hashdist-*"):
        text = path.read_text().replace("/opt/hashdist/.venv/bin/", f"{BIN}/")
        (tmp_path / path.name).write_text(text)
    files = sorted(tmp_path.iterdir())
    done = subprocess.run([analyze, "verify", "--man=no", *files], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_for_one_machine_starts_ray_on_the_loopback() -> None:
    text = (CLUSTER / "one_machine.sh").read_text()
    subprocess.run(["bash", "-n", CLUSTER / "one_machine.sh"], check=True, timeout=10)
    match = re.search(r"setsid (ray start .*?)>", text.replace("\\\n", " "))
    assert match
    number = re.sub(r'"\$\(\(.*?\)\)"|"\$\w+"', "4096", match[1])
    started = starts(shlex.split(number.replace("$folder", "/tmp/folder")))
    assert (started["head"], started["block"]) == (True, True)
    assert (started["node_ip_address"], started["dashboard_host"]) == ("127.0.0.1", "127.0.0.1")
    assert "RAY_AUTH_MODE=token" in text


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
def test_ray_on_one_machine_is_reached_from_here_only_with_the_token_and_ends_whole() -> None:
    folder = Path(tempfile.mkdtemp(prefix="hdo", dir="/tmp"))  # sockets need short paths
    names = ("PORT", "DASHBOARD_PORT", "AGENT_PORT", "METRICS_PORT")
    ports = {f"HASHDIST_RAY_{name}": str(20000 + os.getpid() % 10000 + place) for place, name in enumerate(names)}
    own = {"HASHDIST_RAY_FOLDER": str(folder), "HASHDIST_RAY_OBJECT_STORE_MB": "200", **ports}
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_raylet_start_wait_time_s": "120"}

    def call(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**base, **own, **path, **more}
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)

    script = str(CLUSTER / "one_machine.sh")
    try:
        started = call(script, "start")
        assert started.returncode == 0, started.stderr
        given = dict(line.removeprefix("export ").split("=", 1) for line in started.stdout.splitlines())
        session = (folder / "pid").read_text().strip()
        assert given["RAY_AUTH_TOKEN_PATH"] == str(folder / "token")
        assert (folder / "token").stat().st_mode & 0o777 == 0o600
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{given['RAY_API_SERVER_ADDRESS']}/api/jobs/", timeout=30)
        job = "import ray; ray.init(); print(ray.get(ray.put(7)))"
        done = call("ray", "job", "submit", "--", "python", "-c", job, **given)
        assert (done.returncode, "\n7\n" in done.stdout) == (0, True), done.stdout + done.stderr
        assert call(script, "start").returncode == 1
        processes = [int(pid) for pid in call("pgrep", "--session", session).stdout.split()]
        assert {address for address, _ in listening(processes)} == {"127.0.0.1", "::ffff:127.0.0.1"}
    finally:
        stopped = call(script, "stop")
        shutil.rmtree(folder, ignore_errors=True)
    assert stopped.returncode == 0
    assert call("pgrep", "--session", session).stdout == ""
