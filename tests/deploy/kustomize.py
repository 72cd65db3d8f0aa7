"""What kustomize makes of k8s/, for the part of kustomize that k8s/ uses; anything else is refused: it stays small.

tests/deploy/test_manifests.py holds it against the real one where `kubectl` is installed.
"""

import json
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FIELDS = {
    *("apiVersion", "kind", "resources", "configMapGenerator", "components", "patches", "namespace", "labels"),
    *("images", "replacements"),
}
CLUSTER_WIDE = {"Namespace"}


def render(folder: Path, upon: Sequence[Object] = ()) -> list[Object]:
    """The objects of a kustomization, in any order; those of a component come with the ones that it is laid `upon`."""
    wanted = read(folder)
    assert wanted["kind"] == ("Component" if upon else "Kustomization"), f"{folder} is a {wanted['kind']}"
    objects = deepcopy(list(upon))
    for entry in wanted.get("resources", []):
        path = folder / entry
        new = render(path) if path.is_dir() else _parsed(path.read_text())
        taken = {name_of(thing) for thing in objects} & {name_of(thing) for thing in new}
        assert not taken, f"{path}: there are two of {taken}"
        objects += new
    for entry in wanted.get("configMapGenerator", []):
        _generate(objects, folder, entry)
    for entry in wanted.get("components", []):
        objects = render(folder / entry, objects)
    for entry in wanted.get("patches", []):
        objects = _patched(objects, folder, entry)
    for thing in objects:
        if "namespace" in wanted and thing["kind"] not in CLUSTER_WIDE:
            thing["metadata"]["namespace"] = wanted["namespace"]
        for label in wanted.get("labels", []):
            assert label.keys() == {"pairs"}, "labels of the objects themselves only"
            thing["metadata"].setdefault("labels", {}).update(label["pairs"])
        for image in wanted.get("images", []):
            _rename(thing, image)
    for entry in wanted.get("replacements", []):
        _copy(objects, entry)
    return objects


def read(folder: Path) -> Object:
    """A kustomization; fields that are not known here are refused."""
    found: Object = yaml.load((folder / "kustomization.yaml").read_text(), LOADER)
    assert found.keys() <= FIELDS, f"{folder}: this renderer knows no {sorted(found.keys() - FIELDS)}"
    return found


def name_of(thing: Object) -> tuple[str, str]:
    """Kind and name."""
    return thing["kind"], thing["metadata"]["name"]


def _parsed(text: str) -> list[Object]:
    """The documents of a file; what it names with an anchor is copied to every place, not shared between them."""
    return [json.loads(json.dumps(thing)) for thing in yaml.load_all(text, LOADER) if thing]


def _generate(objects: list[Object], folder: Path, entry: Object) -> None:
    options = entry.get("options", {})
    assert options.get("disableNameSuffixHash"), "custom resources would not follow a name with a hash"
    assert entry.keys() <= {"name", "namespace", "behavior", "files", "literals", "options"}
    data = {Path(file).name: (folder / file).read_text() for file in entry.get("files", [])}
    data |= dict(literal.split("=", 1) for literal in entry.get("literals", []))
    if entry.get("behavior") == "replace":
        next(thing for thing in objects if name_of(thing) == ("ConfigMap", entry["name"]))["data"] = data
        return
    metadata = {key: value for key, value in entry.items() if key in ("name", "namespace")}
    if "labels" in options:
        metadata["labels"] = dict(options["labels"])
    objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _patched(objects: list[Object], folder: Path, entry: Object) -> list[Object]:
    patch = yaml.load((folder / entry["path"]).read_text() if "path" in entry else entry["patch"], LOADER)
    if isinstance(patch, dict):
        assert patch["$patch"] == "delete", "of merged patches, deletions only"
        left = [thing for thing in objects if name_of(thing) != name_of(patch)]
        assert len(left) == len(objects) - 1, f"{name_of(patch)} is not there to be deleted"
        return left
    for thing in objects:
        kind, name = name_of(thing)
        if entry["target"]["kind"] == kind and re.fullmatch(entry["target"].get("name", ".*"), name):
            for step in patch:
                _step(thing, step)
    return objects


def _step(thing: Object, step: Object) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    *path, last = [word.replace("~1", "/").replace("~0", "~") for word in step["path"].split("/")[1:]]
    place: Any = thing
    for word in path:
        place = place[int(word)] if isinstance(place, list) else place[word]
    key: Any = int(last) if isinstance(place, list) and last != "-" else last
    if step["op"] == "add" and last == "-":
        place.append(deepcopy(step["value"]))
    elif step["op"] == "add" and isinstance(place, dict):
        place[key] = deepcopy(step["value"])
    elif step["op"] == "replace":
        assert key in place or isinstance(place, list), f"{name_of(thing)} has no {step['path']} to replace"
        place[key] = deepcopy(step["value"])
    elif step["op"] == "remove":
        del place[key]
    elif step["op"] == "test":
        assert place[key] == step["value"], f"{name_of(thing)} {step['path']}: {place[key]}, not {step['value']}"
    else:
        raise AssertionError(f"this renderer knows no {step}")


def _rename(thing: Object, wanted: Object) -> None:
    for container in containers(thing):
        name, _, tag = container["image"].partition(":")
        if name == wanted["name"]:
            container["image"] = f"{wanted.get('newName', name)}:{wanted.get('newTag', tag)}"


def _copy(objects: list[Object], entry: Object) -> None:
    source = next(t for t in objects if name_of(t) == (entry["source"]["kind"], entry["source"]["name"]))
    value: Any = source
    for word in entry["source"]["fieldPath"].split("."):
        value = value[word]
    for target in entry["targets"]:
        for thing in objects:
            if thing["kind"] != target["select"]["kind"]:
                continue
            for field in target["fieldPaths"]:
                *path, last = field.split(".")
                place = thing
                for word in path:
                    place = place[word]
                assert last in place or target.get("options", {}).get("create"), f"no {field} to replace"
                place[last] = deepcopy(value)


def containers(value: Any) -> Iterator[Object]:
    """All containers of an object, wherever its pods are described."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("containers", "initContainers"):
                yield from inner
            else:
                yield from containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)
