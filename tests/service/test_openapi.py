"""What the service's OpenAPI document says, held against the service: generated requests, right and wrong ones.

No request may end in a 5xx; every answer must have a documented status, content type and body; wrong requests must be
refused. The short form asks the service's whole application over HTTP, without Ray; the long one `hashdist serve`.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from schemathesis.engine import events, from_schema

from hashdist.collection.decode import BadImage, decode
from hashdist.ground.errors import InvalidInput
from hashdist.ground.settings import ServiceSettings
from hashdist.service.api import Backend, EncodedImage, make_app
from hashdist.service.batching import Batches
from hashdist.service.serving import Serving
from tests.worlds.service import ODD_KEY, ServiceWorld, free_port, serving

pytestmark = pytest.mark.cluster

_SETTINGS: dict[str, Any] = {"images_per_s": 10_000.0}


def problems(url: str, world: ServiceWorld, examples: int, most_s: float) -> tuple[Counter[str], list[str]]:
    """Statuses of generated requests, by operation; and what was not as the document of the service says."""
    codes = [code.tobytes().hex() for code in world.index.codes_of(world.keys()[:5])]
    config = schemathesis.Config.from_dict(
        {
            "seed": 1,
            "max-time": most_s,
            "continue-on-failure": True,
            "cache": {"enabled": False},
            "generation": {"max-examples": examples, "deterministic": True, "database": "none", "no-shrink": True},
            "dictionaries": {"keys": {"values": world.keys()[:5]}, "codes": {"values": codes}},
            "parameters": {
                "key": {"dictionary": "keys", "probability": 0.5},
                "code": {"dictionary": "codes", "probability": 0.2},
            },
            "phases": {"stateful": {"enabled": False}},
            # a document cannot say that exactly one field must be given, nor which keys there are
            "checks": {"positive_data_acceptance": {"enabled": False}},
        }
    )
    found: list[str] = []
    statuses: Counter[str] = Counter()
    document = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    for key in (*world.keys()[:2], ODD_KEY):  # generated ones name no picture
        document["/pictures/{key}"]["GET"].Case(path_parameters={"key": key}, query={"size": 99}).call_and_validate()
    for event in from_schema(document).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            found.append(repr(event))
        if isinstance(event, events.ScenarioFinished | events.FuzzScenarioFinished):
            statuses.update(_statuses(event.recorder))
            found += _failures(event.recorder)
    return statuses, found


def _statuses(recorder: Any) -> Iterator[str]:
    for interaction in recorder.interactions.values():
        if interaction.response is not None:
            yield f"{recorder.label} {interaction.response.status_code}"


def _failures(recorder: Any) -> Iterator[str]:
    for case, checks in recorder.checks.items():
        for check in checks:
            asked = recorder.cases[case].value
            # a form's fields are texts, so none is of a wrong type
            of_form = check.name == "negative_data_rejection" and asked.media_type == "multipart/form-data"
            if check.failure_info is not None and not of_form:
                yield f"{recorder.label}: {check.name}: {check.failure_info.failure}: {asked.as_curl_command()[:600]}"


def test_the_application_answers_as_its_document_says(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path)
    with alone(world) as url:
        statuses, found = problems(url, world, examples=25, most_s=15)
    print(dict(statuses))
    assert found == []


@pytest.mark.full
def test_the_service_answers_as_its_document_says(tmp_path: Path) -> None:
    world = ServiceWorld(tmp_path)
    with serving(world, tmp_path, **_SETTINGS) as service:
        statuses, found = problems(service.url, world, examples=300, most_s=600)
    print(dict(statuses))
    assert found == []


@contextmanager
def alone(world: ServiceWorld) -> Iterator[str]:
    """The URL of the application over the world, in a thread of this process."""

    async def encode(uri: str, data: bytes) -> EncodedImage:
        try:
            pixels = decode(data, limits.max_pixels)
        except BadImage as error:
            raise InvalidInput(f"the picture cannot be read: {error.reason}") from error
        return EncodedImage(world.current.encode([pixels])[0], pixels.shape[1], pixels.shape[0])

    limits = ServiceSettings(**_SETTINGS)
    following = Serving(
        world.uri, refresh_s=60, held_versions=2, prepare=lambda uri: {"reads_images": True, "reason": ""}
    )
    backend = Backend(following, Batches(2, time.perf_counter), encode, lambda: "# no metrics\n", limits)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(make_app(backend), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    following.start()
    thread.start()
    while following.state()[0] == "not ready" or not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
    following.close()
