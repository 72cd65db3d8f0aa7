"""Suspended RayJob -> a run of it, waited for: what the CronJob in k8s/ does every night.

python k8s/submit_rayjob.py --template reindex-template --name reindex-29384720-run --owner reindex-29384720/UID

Asks the Kubernetes API with the account of its pod. A run has the name that it is given, so starting it twice starts
it once: the second call finds it and waits for it too. Exit codes: 0 done, 1 the run failed, 2 it cannot be started,
75 the API has been away for too long to know, 143 stopped. After the last two the run goes on, and the same call finds
it again.
"""

import argparse
import http.client
import json
import os
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hashdist.ground.progress import say

UNKNOWN, STOPPED = 75, 143
LONGEST_NAME = 47
"""KubeRay adds to the name of a RayJob to name its cluster, and refuses longer ones."""

_ENDED = {"Complete", "Failed", "ValidationFailed"}
_ASKED_AGAIN = {408, 429, 500, 502, 503, 504}


class Refused(Exception):
    """The API's answer is no. `status` is that of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Away(Exception):
    """The API does not answer, or not now."""


class Api:
    """The RayJobs of a namespace.

    Args:
        server: URL of the Kubernetes API.
        namespace: theirs.
        account: folder with `token`, read again for every request since it is renewed, and `ca.crt`.
        timeout: seconds of one request.
    """

    def __init__(self, server: str, namespace: str, account: Path, timeout: float = 30.0) -> None:
        self._url = f"{server.rstrip('/')}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account, self._timeout = account, timeout
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if server.startswith("https:"):
            context = ssl.create_default_context(cafile=str(account / "ca.crt"))
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, name: str) -> dict[str, Any]:
        """A RayJob."""
        return self._request("GET", f"/{name}")

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        """A new RayJob."""
        return self._request("POST", "", job)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        token = self._account / "token"
        if token.exists():
            request.add_unredirected_header("Authorization", f"Bearer {token.read_text().strip()}")
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            message = f"{method} {self._url}{path}: {error.code} {_message(error)}"
            raise (Away(message) if error.code in _ASKED_AGAIN else Refused(error.code, message)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Away(f"{method} {self._url}{path}: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return error.reason


def run_of(template: dict[str, Any], name: str, owner: str) -> dict[str, Any]:
    """The RayJob of a run.

    Args:
        template: the suspended RayJob.
        name: of the run.
        owner: NAME/UID of the Job that it belongs to: Kubernetes deletes the run with it, so that the CronJob's history
            limits hold for both; empty = none.
    """
    job, _, uid = owner.partition("/")
    metadata = {"name": name, "labels": template["metadata"].get("labels", {})}
    if owner:
        metadata["ownerReferences"] = [{"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid}]
    spec = {key: value for key, value in template["spec"].items() if key != "suspend"}
    return {"apiVersion": template["apiVersion"], "kind": template["kind"], "metadata": metadata, "spec": spec}


def patiently(ask: Callable[[], dict[str, Any]], patience: float, pause: float) -> dict[str, Any]:
    """The answer, asked for until there is one; Away after `patience` seconds without."""
    begun = time.monotonic()
    while True:
        try:
            return ask()
        except Away as error:
            if time.monotonic() - begun > patience:
                raise
            say(f"the Kubernetes API does not answer, asking again: {error}")
            time.sleep(pause)


def start(api: Api, template: str, name: str, owner: str, patience: float, pause: float) -> None:
    """Start the run, unless it has been. Raises Refused and Away."""
    run = run_of(patiently(lambda: api.get(template), patience, pause), name, owner)
    try:
        patiently(lambda: api.create(run), patience, pause)
    except Refused as error:
        if error.status != 409:
            raise
        say(f"{name}: has been started already; waiting for it")
    else:
        say(f"{name}: started; its log: kubectl logs job/{name} --follow")


def wait(api: Api, name: str, patience: float, pause: float) -> int:
    """Say what the run does until it ends; returns the exit code. Raises Refused and Away."""
    shown = ""
    while True:
        try:
            status = patiently(lambda: api.get(name), patience, pause).get("status", {})
        except Refused as error:
            if error.status != 404:
                raise
            say(f"{name}: has been deleted")
            return 1
        deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        line = " ".join(filter(None, [deployment, job, status.get("reason"), status.get("message")]))
        if line != shown:
            say(f"{name}: {line}")
            shown = line
        if deployment in _ENDED:
            return 0 if (deployment, job) == ("Complete", "SUCCEEDED") else 1
        time.sleep(pause)


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    made = argparse.ArgumentParser(description="start a copy of a suspended RayJob, and wait for it")
    made.add_argument("--template", required=True, help="the suspended RayJob")
    made.add_argument("--name", required=True, help="of the run; the same name is the same run")
    made.add_argument("--owner", default="", help="NAME/UID of the Job with which the run is deleted")
    made.add_argument("--server", default=_server(), help="URL of the Kubernetes API; default: the pod's own cluster")
    made.add_argument("--namespace", default="", help="default: the pod's own")
    made.add_argument("--account", type=Path, default=Path("/var/run/secrets/kubernetes.io/serviceaccount"))
    made.add_argument("--patience", type=float, default=900.0, help="seconds that the API may be away")
    made.add_argument("--pause", type=float, default=10.0, help="seconds between two questions")
    return made


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = parser()
    given = words.parse_args(argv)
    if len(given.name) > LONGEST_NAME:
        words.error(f"--name must have at most {LONGEST_NAME} characters for KubeRay, found {len(given.name)}")
    namespace = given.namespace or _read(given.account / "namespace")
    if not (given.server and namespace):
        words.error("outside of a pod, --server and --namespace are required (see `kubectl proxy`)")
    signal.signal(signal.SIGTERM, lambda *_: _stop(given.name))
    try:
        api = Api(given.server, namespace, given.account)
        start(api, given.template, given.name, given.owner, given.patience, given.pause)
        return wait(api, given.name, given.patience, given.pause)
    except Refused as error:
        allowed = error.status not in (401, 403)
        hint = "" if allowed else "; the account needs get and create on rayjobs (k8s/base/accounts.yaml)"
        say(f"{given.name}: {error}{hint}")
        return 2
    except Away as error:
        say(f"{given.name}: gave up after {given.patience:.0f} s, the run may go on: {error}")
        return UNKNOWN


def _server() -> str:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    return f"https://{f'[{host}]' if ':' in host else host}:{port}" if host else ""


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _stop(name: str) -> NoReturn:
    say(f"{name}: stopped waiting; the run goes on, and the same call finds it again")
    sys.exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
