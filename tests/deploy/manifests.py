"""Kubernetes objects held against the schemas of their kinds, strictly: a field that no schema names is an error."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import yaml

from tests import REPOSITORY
from tests.deploy.kustomize import LOADER, Object

KUBERNETES = "1.35"
CRDS = REPOSITORY.parent / "shared" / "kuberay"
SUBSET = REPOSITORY / "tests" / "deploy" / "kuberay_subset.yaml"

# else it reads and parses megabytes for every object
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)


def check(thing: Object, crds: bool = True) -> None:
    """Raise jsonschema.ValidationError for an object that is not what its kind's schema says.

    Args:
        thing: the object; pods that it describes are checked as pods.
        crds: hold Ray's kinds against KubeRay's CRDs where they are at hand, not against the subset of them in tests/.
    """
    _check(json.dumps(thing, sort_keys=True), crds)


@cache
def _check(text: str, crds: bool) -> None:
    thing = json.loads(text)
    group = thing["apiVersion"].partition("/")[0]
    if group in ("ray.io", "monitoring.coreos.com"):
        schema = ray_schema(thing["kind"], crds) if group == "ray.io" else _own("prometheus_subset.yaml", thing["kind"])
        jsonschema.Draft202012Validator(schema).validate(thing)
    else:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    for _, template in templates(thing):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@cache
def ray_schema(kind: str, crds: bool = True) -> Object:
    """The strict schema of one of Ray's kinds."""
    if crds and CRDS.is_dir():
        return _strict(crd(kind))
    return _own(SUBSET.name, kind)


@cache
def crd(kind: str) -> Object:
    """The schema that KubeRay's CRD gives for version v1 of a kind."""
    definition = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), LOADER)
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
    found: Object = version["schema"]["openAPIV3Schema"]
    return found


@cache
def _own(file: str, kind: str) -> Object:
    schemas = yaml.load((REPOSITORY / "tests" / "deploy" / file).read_text(), LOADER)
    return _strict({"$defs": schemas["$defs"], **schemas[kind]})


def _strict(schema: Any) -> Any:
    """The schema with every field refused that it does not name, save where it says that any may stand."""
    if isinstance(schema, list):
        return [_strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(inner) for key, inner in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def templates(value: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """All pod templates in an object, with the path of each."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("template", "submitterPodTemplate") and "containers" in inner.get("spec", {}):
                yield f"{path}/{key}", inner
            else:
                yield from templates(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from templates(inner, f"{path}/{number}")
