"""k8s/: what it renders to is valid, locked down, and names only what exists in the project, in Ray and in KubeRay."""

import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import hashdist
from hashdist import cli
from hashdist.ground.settings import Settings
from hashdist.ground.telemetry import DECLARED
from tests import REPOSITORY
from tests.deploy.kustomize import LOADER, Object, name_of, render
from tests.deploy.manifests import CRDS, SUBSET, check, crd, templates

K8S = REPOSITORY / "k8s"
JOBS = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py"))
OVERLAYS = ["local", "gpu", "aws"]
STANDING = ["base", *(f"overlays/{name}" for name in OVERLAYS), "raycronjob"]
FOLDERS = [
    *STANDING,
    "monitoring",
    "jobs/base",
    *(f"jobs/{job}" for job in JOBS),
    *(f"overlays/{o}/job" for o in OVERLAYS),
]
CONFIG = "/etc/hashdist/pipeline.yaml"
INVALID = (jsonschema.ValidationError, kubernetes_validate.ValidationError)


@cache
def rendered(folder: str) -> tuple[Object, ...]:
    if folder == "raycronjob":  # the component, upon the base
        return tuple(render(K8S / "components" / folder, rendered("base")))
    return tuple(render(K8S / folder))


def everything() -> Iterator[tuple[str, Object]]:
    return ((folder, thing) for folder in FOLDERS for thing in rendered(folder))


def of_kind(kind: str, folders: list[str] = FOLDERS) -> list[tuple[str, Object]]:
    return [(folder, thing) for folder in folders for thing in rendered(folder) if thing["kind"] == kind]


def one(folder: str, kind: str, name: str) -> Object:
    found: Object = next(thing for thing in rendered(folder) if name_of(thing) == (kind, name))
    return found


def pods() -> list[tuple[str, Object]]:
    """All pod templates of everything, with where each comes from."""
    return [
        (f"{folder} {thing['kind']}/{thing['metadata']['name']}{path}", template)
        for folder, thing in everything()
        for path, template in templates(thing)
    ]


def clusters(folders: list[str] = FOLDERS) -> list[tuple[str, Object]]:
    """All specifications of a Ray cluster."""
    found = []
    for folder in folders:
        for thing in rendered(folder):
            spec = thing.get("spec", {})
            for inner in (
                spec,
                spec.get("rayClusterConfig"),
                spec.get("rayClusterSpec"),
                spec.get("jobTemplate", {}).get("rayClusterSpec"),
            ):
                if inner and "headGroupSpec" in inner:
                    found.append((f"{folder} {thing['kind']}/{thing['metadata']['name']}", inner))
    return found


def ray_jobs() -> list[tuple[str, Object]]:
    """All specifications of a RayJob, those of a cron too."""
    plain = [(f"{folder} {thing['metadata']['name']}", thing["spec"]) for folder, thing in of_kind("RayJob")]
    return plain + [(f"{folder} cron", thing["spec"]["jobTemplate"]) for folder, thing in of_kind("RayCronJob")]


def settings_of(folder: str, tmp_path: Path) -> Settings:
    """The settings in the ConfigMap that a rendering's pods mount."""
    file = tmp_path / f"{folder.replace('/', '-')}.yaml"
    file.write_text(one(folder, "ConfigMap", "hashdist")["data"]["pipeline.yaml"])
    return cli.parse("pipeline", ["--config", str(file)])[0]


# What it renders to


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_valid(folder: str) -> None:
    for thing in rendered(folder):
        check(thing)
        check(thing, crds=False)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here")
@pytest.mark.parametrize("folder", [*STANDING, "monitoring", "jobs/reindex", "jobs/pipeline", "overlays/aws/job"])
def test_kustomize_renders_the_same(folder: str, tmp_path: Path) -> None:
    place = K8S / folder
    if folder == "raycronjob":
        place = tmp_path
        up = Path(*[".."] * (len(tmp_path.resolve().parts) - 1)) / K8S.relative_to("/")
        wanted = {"resources": [f"{up}/base"], "components": [f"{up}/components/raycronjob"]}
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    made = subprocess.run(
        ["kubectl", "kustomize", place], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    real = {name_of(thing): thing for thing in yaml.load_all(made, LOADER)}
    assert {name_of(thing): thing for thing in rendered(folder)} == real


def planted() -> dict[str, tuple[Object, str]]:
    """Objects with one thing wrong each, and a word of the complaint."""

    def wrong(folder: str, kind: str, name: str, path: str, value: Any) -> Object:
        thing = deepcopy(one(folder, kind, name))
        place: Any = thing
        *way, last = path.split("/")
        for word in way:
            place = place[int(word)] if isinstance(place, list) else place[word]
        place[last] = value
        return thing

    group = "spec/workerGroupSpecs/0"
    container = f"{group}/template/spec/containers/0"
    return {
        "a field of Ray": (wrong("base", "RayCluster", "hashdist", f"{group}/replica", 1), "replica"),
        "a number as text": (wrong("base", "RayCluster", "hashdist", f"{group}/maxReplicas", "8"), "'8'"),
        "a word of a choice": (wrong("base", "RayCluster", "hashdist", "spec/authOptions/mode", "tokens"), "tokens"),
        "a field of a pod": (wrong("base", "RayCluster", "hashdist", f"{container}/volumeMount", []), "volumeMount"),
        "a field of a job": (wrong("base", "RayJob", "reindex-template", "spec/ttlSecondsAfter", 1), "ttlSecondsAfter"),
        "a field of a service": (wrong("base", "RayService", "search", "spec/serveConfig", ""), "serveConfig"),
        "a field of a cron": (
            wrong("raycronjob", "RayCronJob", "reindex", "spec/concurrencyPolicy", "Forbid"),
            "concurr",
        ),
        "a core field": (wrong("base", "CronJob", "reindex", "spec/startingDeadline", 1), "startingDeadline"),
        "a field of a rule": (
            wrong("monitoring", "PrometheusRule", "hashdist", "spec/groups/0/rules/0/exp", ""),
            "exp",
        ),
    }


@pytest.mark.parametrize("crds", [True, False], ids=["CRDs", "subset"])
@pytest.mark.parametrize("what", planted())
def test_a_planted_mistake_is_refused(what: str, crds: bool) -> None:
    thing, complaint = planted()[what]
    with pytest.raises(INVALID) as refused:
        check(thing, crds)
    assert complaint in refused.value.message  # str() of it would print the whole schema


def test_the_subset_of_kuberays_schemas_agrees_with_its_crds() -> None:
    if not CRDS.is_dir():
        pytest.skip("the CRDs are not here: ../shared/kuberay is absent")
    subset = yaml.load(SUBSET.read_text(), LOADER)

    def compare(mine: Object, theirs: Object, path: str) -> None:
        mine = subset["$defs"][mine["$ref"].rpartition("/")[2]] if "$ref" in mine else mine
        if path.endswith(".metadata"):
            return  # Kubernetes' own
        assert mine["type"] == theirs["type"], path
        assert mine.get("enum") == theirs.get("enum"), path
        assert set(mine.get("required", [])) <= {*theirs.get("required", []), "template"}, path
        for name, inner in mine.get("properties", {}).items():
            assert name in theirs["properties"], f"{path}.{name}"
            compare(inner, theirs["properties"][name], f"{path}.{name}")
        if "items" in mine:
            compare(mine["items"], theirs["items"], f"{path}[]")

    for kind in ("RayCluster", "RayJob", "RayService", "RayCronJob"):
        compare(subset[kind], crd(kind), kind)


def test_applying_what_stands_starts_no_job() -> None:
    for folder, job in of_kind("RayJob", STANDING):
        assert job["metadata"]["name"] == "reindex-template", folder
        assert job["spec"]["suspend"] is True


def test_what_kuberay_demands_beyond_its_schemas() -> None:
    for where, job in ray_jobs():
        assert job.get("shutdownAfterJobFinishes", False) != ("deletionStrategy" in job), f"{where}: one or the other"
        assert job.get("shutdownAfterJobFinishes") or not job.get("suspend"), where
        assert job["activeDeadlineSeconds"] > job["preRunningDeadlineSeconds"] > 0, where
        assert job["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never", where
        ends: dict[str, list[int]] = {}
        for rule in job.get("deletionStrategy", {}).get("deletionRules", []):
            ends.setdefault(str({**rule["condition"], "ttlSeconds": 0}), []).append(rule["condition"]["ttlSeconds"])
        assert all(ttls == sorted(ttls) for ttls in ends.values()), f"{where}: a cluster goes before its job"
    for where, cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token"}, where
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert "restartPolicy" not in group["template"]["spec"], f"{where}: the autoscaler decides"
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], where
    for folder, thing in everything():
        if thing["apiVersion"].startswith("ray.io"):
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", thing["metadata"]["name"]), folder


# What it may do


@pytest.mark.parametrize("pod", [pytest.param(pod, id=where) for where, pod in pods()])
def test_every_pod_is_locked_down(pod: Object) -> None:
    spec = pod["spec"]
    outer = spec["securityContext"]
    assert outer["runAsNonRoot"] is True
    assert outer["seccompProfile"] == {"type": "RuntimeDefault"}
    user = re.search(r"^USER (\d+):(\d+)$", dockerfile(), re.MULTILINE)
    assert user is not None
    assert (outer["runAsUser"], outer["runAsGroup"]) == tuple(map(int, user.groups()))
    for container in spec["containers"]:
        locked_down(container["securityContext"])
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] or not ray(
            container
        )
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container["resources"]["limits"].keys()
    allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    assert all(volume.keys() - {"name"} <= allowed for volume in spec.get("volumes", []))
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()


def ray(container: Object) -> bool:
    return container["name"] in ("ray-head", "ray-worker")


def locked_down(context: Object) -> None:
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_autoscalers_are_locked_down_and_can_write_to_tmp() -> None:
    for where, cluster in clusters():
        if cluster.get("enableInTreeAutoscaling"):
            options = cluster["autoscalerOptions"]
            locked_down(options["securityContext"])
            assert options["version"] == "v2", where
            volumes = {volume["name"] for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
            assert {mount["name"] for mount in options["volumeMounts"]} <= volumes


@pytest.mark.parametrize("folder", STANDING)
def test_accounts_may_do_what_they_must_and_no_more(folder: str) -> None:
    accounts = {thing["metadata"]["name"] for _, thing in of_kind("ServiceAccount", [folder])}
    assert {"hashdist", "hashdist-head"} <= accounts
    assert all(thing["automountServiceAccountToken"] is False for _, thing in of_kind("ServiceAccount", [folder]))
    for _, role in of_kind("Role", [folder]):
        assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}]
    for _, binding in of_kind("RoleBinding", [folder]):
        assert {subject["name"] for subject in binding["subjects"]} == {"reindex"} <= accounts
    assert not of_kind("ClusterRole") + of_kind("ClusterRoleBinding")


def test_only_pods_that_ask_the_kubernetes_api_get_a_token_and_a_way_to_it() -> None:
    for where, pod in pods():
        spec, labels = pod["spec"], pod["metadata"]["labels"]
        scales = "/headGroupSpec/" in where and "RayService/" not in where
        account = "hashdist-head" if scales else "reindex" if " CronJob/" in where else "hashdist"
        assert spec["serviceAccountName"] == account, where
        assert spec["automountServiceAccountToken"] is (account != "hashdist"), where
        assert (labels.get("hashdist/kubernetes-api") == "yes") is (account != "hashdist"), where


def test_no_secret_is_kept_here_and_those_that_are_named_are_explained() -> None:
    explained = (K8S / "README.md").read_text()
    assert not of_kind("Secret")
    for where, pod in pods():
        text = json.dumps(pod)
        for name in re.findall(r'"(?:secretRef|secretKeyRef)": \{[^}]*"name": "([^"]+)"', text):
            assert f"`{name}`" in explained, f"{where}: k8s/README.md must say what {name} holds"


LABELS_OF_KUBERAY = {"ray.io/is-ray-node", "ray.io/node-type", "ray.io/cluster"}
OTHERS = {"kubernetes.io/metadata.name", "app.kubernetes.io/name", "hashdist/search"}


@pytest.mark.parametrize("folder", STANDING)
def test_selectors_select_pods_that_there_are(folder: str) -> None:
    mine = [
        pod["metadata"]["labels"]
        for name in (folder, "jobs/pipeline")
        for thing in rendered(name)
        for _, pod in templates(thing)
    ]
    kinds = ("NetworkPolicy", "PodDisruptionBudget")
    for thing in (thing for thing in rendered(folder) if thing["kind"] in kinds):
        for selector in re.findall(r'"matchLabels": (\{[^}]*\})', json.dumps(thing)):
            wanted = {
                key: value for key, value in json.loads(selector).items() if key not in LABELS_OF_KUBERAY | OTHERS
            }
            assert any(wanted.items() <= labels.items() for labels in mine), f"{thing['metadata']['name']}: {wanted}"
    denied = one(folder, "NetworkPolicy", "default-deny")["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("folder", STANDING)
def test_a_drain_leaves_the_search_up_and_can_go_on(folder: str) -> None:
    kept = one(folder, "PodDisruptionBudget", "search")["spec"]["minAvailable"]
    group = one(folder, "RayService", "search")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert isinstance(kept, int)
    assert kept < group["minReplicas"]


# What it names


@cache
def dockerfile() -> str:
    return (REPOSITORY / "cluster" / "Dockerfile").read_text()


def test_every_job_has_its_folder() -> None:
    folders = {path.name for path in (K8S / "jobs").iterdir() if path.is_dir()}
    assert folders == {*JOBS, "base"}
    assert {path.name for path in (K8S / "overlays").iterdir()} == set(OVERLAYS)
    assert {path.name for path in (K8S / "components").iterdir()} == {*OVERLAYS, "raycronjob"}


@pytest.mark.parametrize("job", JOBS)
def test_a_folder_runs_its_job(job: str) -> None:
    (thing,) = rendered(f"jobs/{job}")
    assert thing["metadata"]["name"] == job.replace("_", "-")
    assert thing["spec"]["entrypoint"] == f"python /app/jobs/{job}.py --config {CONFIG}"


def test_entry_points_are_files_whose_arguments_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\nWORKDIR /app\nCOPY jobs ./jobs\nCOPY k8s/submit_rayjob.py ./k8s/\n" in dockerfile()
    config = tmp_path / "pipeline.yaml"
    config.write_text(one("base", "ConfigMap", "hashdist")["data"]["pipeline.yaml"])
    called = []
    monkeypatch.setattr(cli, "main", lambda words: called.append(cli._split(list(words))))
    for entrypoint in sorted({job["entrypoint"] for _, job in ray_jobs() if "JOB" not in job["entrypoint"]}):
        python, script, *words = entrypoint.split()
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [script, *(word.replace(CONFIG, str(config)) for word in words)])
        with pytest.raises(SystemExit):
            runpy.run_path(str(REPOSITORY / Path(script).relative_to("/app")), run_name="__main__")
    assert len(called) == len(JOBS)
    for command, rest in called:
        assert cli.parse(command, rest)[0].root.startswith("s3://")


def test_the_cron_starts_the_suspended_job_under_a_name_of_its_own() -> None:
    for folder, cron in of_kind("CronJob"):
        job = cron["spec"]["jobTemplate"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        script = container["command"][1]
        values = {variable["name"]: f"reindex-{2**31}" for variable in container["env"]}
        words = [Template(word.replace("$(", "${").replace(")", "}")).substitute(values) for word in container["args"]]
        program = runpy.run_path(str(REPOSITORY / Path(script).relative_to("/app")))
        given = program["parser"]().parse_args(words)
        template = one(folder, "RayJob", given.template)["spec"]
        assert template["suspend"] is True
        assert len(given.name) <= program["LONGEST_NAME"]
        assert given.name != values["JOB_NAME"], "KubeRay names the submitter's Job like the RayJob"
        assert given.owner == f"{values['JOB_NAME']}/{values['JOB_UID']}"
        assert job["activeDeadlineSeconds"] > template["activeDeadlineSeconds"] + template["ttlSecondsAfterFinished"]
        assert cron["spec"]["concurrencyPolicy"] == "Forbid"
        codes = next(rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule)
        assert codes["containerName"] == container["name"]
        assert program["UNKNOWN"] not in codes["values"]
        assert program["STOPPED"] not in codes["values"]
        assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_images_are_those_that_the_dockerfile_says_how_to_build() -> None:
    for where, pod in pods():
        for container in pod["spec"]["containers"]:
            name, tag = container["image"].rpartition("/")[2].split(":")
            assert name == "hashdist", where
            gpus = "nvidia.com/gpu" in container["resources"]["limits"]
            assert tag == f"{hashdist.__version__}-{'gpu' if gpus else 'cpu'}", where
            assert f"-t hashdist:{tag} " in dockerfile()
    assert f'org.opencontainers.image.version="{hashdist.__version__}"' in dockerfile()


def test_ray_is_the_one_that_is_locked() -> None:
    locked = re.search(r"^ray==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert {cluster["rayVersion"] for _, cluster in clusters()} == {locked[1]}


@pytest.mark.parametrize("folder", [*STANDING])
def test_the_settings_parse_and_fit_the_pods(folder: str, tmp_path: Path) -> None:
    settings = settings_of(folder, tmp_path)
    assert settings.root
    assert settings.collection.uri
    service = settings.service
    spec = one(folder, "RayService", "search")["spec"]
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    config = yaml.safe_load(spec["serveConfigV2"])
    assert config["http_options"] == {"host": service.host, "port": service.port}
    assert config["applications"][0]["args"] == {"config": CONFIG}
    assert group["minReplicas"] >= service.replicas
    assert service.replicas * service.cpus + service.encoders <= group["minReplicas"] * int(limits["cpu"])
    assert (service.encoder_gpu == "yes") == ("nvidia.com/gpu" in limits)
    if service.encoder_gpu == "yes":
        assert service.encoders <= group["minReplicas"] * int(limits["nvidia.com/gpu"])
    stops = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert service.drain_s < stops < group["template"]["spec"]["terminationGracePeriodSeconds"] - service.drain_s
    tokens = [variable for variable in container["env"] if variable["name"] == service.token_env]
    assert tokens[0]["valueFrom"]["secretKeyRef"]["name"] == "hashdist-token"
    job = rendered(f"{folder}/job" if folder.startswith("overlays") else "jobs/pipeline")[0]["spec"]["rayClusterSpec"]
    kind, resource = ("gpu", "nvidia.com/gpu") if settings.train.gpu == "yes" else ("cpu", "cpu")
    group = next(group for group in job["workerGroupSpecs"] if group["groupName"] == kind)
    each = int(group["template"]["spec"]["containers"][0]["resources"]["limits"][resource])
    asked = max(settings.features.workers, settings.encode.workers, settings.train.workers)
    assert asked <= group["maxReplicas"] * each, "a stage would wait for ever for workers that cannot come"


def test_the_search_is_what_serve_can_import_and_understand() -> None:
    from ray.serve.schema import ServeDeploySchema

    for folder, service in of_kind("RayService"):
        given = yaml.safe_load(service["spec"]["serveConfigV2"])
        known = ServeDeploySchema.model_validate(given).model_dump(exclude_unset=True, mode="json")
        assert known == given, f"{folder}: Serve drops what it does not know"
        (application,) = given["applications"]
        module, function = application["import_path"].split(":")
        source = (REPOSITORY / Path(*module.split(".")).with_suffix(".py")).read_text()
        assert f"\ndef {function}(" in source
        assert f'\nNAME = "{application["name"]}"\n' in source


ELSEWHERE = {
    "TORCH_HOME": ("torch", "hub.py"),
    "MPLCONFIGDIR": ("matplotlib", "__init__.py"),
    "RAY_USAGE_STATS_ENABLED": ("ray", "_common/usage/usage_lib.py"),
    "NUMBA_CACHE_DIR": ("numba", "core/config.py"),
}
"""Variables that another package reads, and where."""


def test_every_variable_is_read_by_someone() -> None:
    ours = "".join(path.read_text() for path in (REPOSITORY / "hashdist").rglob("*.py"))
    for where, pod in pods():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                name = variable["name"]
                used = f"$({name})" in " ".join(container.get("args", []))
                assert name == "HOME" or name in ELSEWHERE or f'"{name}"' in ours or used, f"{where}: {name}"
    for name, (package, file) in ELSEWHERE.items():
        found = importlib.util.find_spec(package)
        assert found is not None
        assert found.submodule_search_locations is not None
        text = (Path(found.submodule_search_locations[0]) / file).read_text()
        assert name.removeprefix("NUMBA_") in text
    for folder in STANDING:
        for name in one(folder, "ConfigMap", "hashdist-store")["data"]:
            assert f'"{name}"' in ours


CACHE = "/cache"


def test_caches_and_temporary_files_lie_where_a_pod_may_write_and_fit() -> None:
    image = dict(re.findall(rf"\b(\w+)=({CACHE}\S*)", dockerfile()))
    assert {"HASHDIST_CACHE", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"} <= image.keys()
    for where, pod in pods():
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            if not ray(container):
                continue
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert not mounts["/tmp"].get("readOnly"), where
            assert not mounts[CACHE].get("readOnly"), where
            variables = {variable["name"]: variable.get("value", "") for variable in container["env"]}
            for name in ("HOME", "HASHDIST_CACHE", "NUMBA_CACHE_DIR", "TORCH_HOME", "MPLCONFIGDIR"):
                assert variables[name].startswith(CACHE), f"{where}: {name}"
                assert name == "HOME" or image.get(name, variables[name]) == variables[name], f"{where}: {name}"
            cache = volumes[mounts[CACHE]["name"]]
            claim = cache.get("ephemeral", {}).get("volumeClaimTemplate", {}).get("spec", {})
            room = cache["emptyDir"]["sizeLimit"] if "emptyDir" in cache else claim["resources"]["requests"]["storage"]
            assert int(variables["HASHDIST_CACHE_GB"]) < int(room.removesuffix("Gi")), where
            config = mounts[str(Path(CONFIG).parent)]
            assert volumes[config["name"]]["configMap"] == {"name": "hashdist"}


def test_ports_are_those_of_ray_and_of_the_service() -> None:
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.submodule_search_locations is not None
    constants = (Path(found.submodule_search_locations[0]) / "_private" / "ray_constants.py").read_text()

    def constant(name: str) -> int:
        value = re.search(rf"^{name} = (?:.*\D)?(\d+)\)?$", constants, re.MULTILINE)
        assert value is not None, name
        return int(value[1])

    ports = {
        "gcs-server": constant("DEFAULT_PORT"),
        "dashboard": constant("DEFAULT_DASHBOARD_PORT"),
        "client": 10001,
        "metrics": 8080,  # KubeRay's
        "serve": Settings().service.port,
    }
    for where, pod in pods():
        for container in pod["spec"]["containers"]:
            assert {
                port["name"]: port["containerPort"] for port in container.get("ports", [])
            }.items() <= ports.items(), where
            for probe in ("startupProbe", "readinessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] == "serve"
    served = routes()
    for where, pod in pods():
        for path in re.findall(r'"path": "(/\w+)"', json.dumps(pod["spec"]["containers"])):
            assert path in served, where
    known = {*ports.values(), 53, 443, 6443}
    for _, policy in of_kind("NetworkPolicy"):
        assert set(map(int, re.findall(r'"port": (\d+)', json.dumps(policy)))) <= known
    for _, service in of_kind("RayService"):
        for key, value in service["spec"].get("serveService", {}).get("metadata", {}).get("annotations", {}).items():
            assert not key.endswith("healthcheck-port") or int(value) == ports["serve"]
            assert not key.endswith("healthcheck-path") or value in served
    for _, monitor in of_kind("PodMonitor"):
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == {"metrics"}


def routes() -> set[str]:
    """The paths that the service answers."""
    source = (REPOSITORY / "hashdist" / "service" / "api.py").read_text()
    return set(re.findall(r'@\w+\.(?:get|post)\(\s*"(/[^"]*)"', source))


# Metrics

SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SERIES = {f"ray_{m.name}{suffix}": m for m in DECLARED.values() for suffix in SUFFIXES[m.kind]}
FROM_PROMETHEUS = {"namespace", "pod", "le"}


def queries() -> Iterator[tuple[str, str]]:
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def alerts() -> list[Object]:
    groups = one("monitoring", "PrometheusRule", "hashdist")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> Object:
    found: Object = json.loads(one("monitoring", "ConfigMap", "hashdist-dashboard")["data"]["dashboard.json"])
    return found


def unknown(query: str) -> list[str]:
    """What a query names that no metric has: names, labels, values of labels."""
    wrong, known = [], set(FROM_PROMETHEUS)
    for name, matchers in re.findall(r"\b(\w*hashdist_\w+)(?:\{([^}]*)\})?", query):
        if name not in SERIES:
            wrong.append(name)
            continue
        labels = SERIES[name].labels
        known |= labels.keys()
        for label, values in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', matchers):
            if label not in labels.keys() | FROM_PROMETHEUS:
                wrong.append(f"{name}{{{label}}}")
            elif isinstance(labels.get(label), tuple):
                wrong += [f"{label}={value}" for value in values.split("|") if value not in labels[label]]
    for grouped in re.findall(r"\bby \(([^)]*)\)", query):
        wrong += [label for label in re.split(r",\s*", grouped) if label not in known]
    return wrong


@pytest.mark.parametrize("query", [pytest.param(query, id=name) for name, query in queries()])
def test_queries_name_metrics_that_the_code_exports(query: str) -> None:
    assert "hashdist_" in query
    assert unknown(query) == []


def test_a_query_of_nothing_is_found() -> None:
    assert unknown("ray_hashdist_index_row") == ["ray_hashdist_index_row"]
    assert unknown('ray_hashdist_index_gates_total{outcome="refuse"}') == ["outcome=refuse"]
    assert unknown('ray_hashdist_index_gates_total{outcomes="refused"}') == ["ray_hashdist_index_gates_total{outcomes}"]
    assert unknown("sum by (stages) (ray_hashdist_stage_rows)") == ["stages"]
    assert unknown("ray_hashdist_search_seconds") == ["ray_hashdist_search_seconds"], "a histogram has no such series"


def test_alerts_say_what_is_wrong_and_where_it_says_what_to_do() -> None:
    rules = alerts()
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names) >= 10
    guide = REPOSITORY / "docs" / "operate.md"
    text = guide.read_text() if guide.exists() else ""
    anchors = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        document, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (document, anchor) == ("docs/operate.md", rule["alert"].lower())
        assert not text or anchor in anchors, f"docs/operate.md must have a heading {rule['alert']}"


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not here")
def test_alerts_fire_when_they_should_and_not_else(tmp_path: Path) -> None:
    rules, cases = tmp_path / "rules.yaml", tmp_path / "cases.yaml"
    rules.write_text(yaml.safe_dump(one("monitoring", "PrometheusRule", "hashdist")["spec"]))
    cases.write_text((REPOSITORY / "tests" / "deploy" / "alerts.yaml").read_text().replace("@RULES@", str(rules)))
    for words in (["check", "rules", rules], ["test", "rules", cases]):
        done = subprocess.run(["promtool", *words], timeout=200, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one_that_grafana_can_lay_out() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] >= 0
        assert at["w"] > 0
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies upon another"
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert used <= {*variables, "__rate_interval", "__all"}
