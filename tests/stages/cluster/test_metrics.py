"""What is exported while real stages run: by workers and jobs through Ray, by a driver at its own port, by a push."""

import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from hashdist import cli
from hashdist.ground.telemetry import DECLARED
from hashdist.stages.cluster import metrics, session
from hashdist.stages.pipeline import Pipeline

pytestmark = pytest.mark.cluster

STAGES = ("collection", "features", "graph", "train", "encode", "index")
RAYS_OWN = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}


class Scraped(NamedTuple):
    """Texts: what Ray had before and after, and what the driver served last.

    `seen` are the names that Ray ever had: a gauge goes with its process.
    """

    before: str
    after: str
    seen: set[str]
    driver: str
    config: str


def series(text: str) -> Iterator[tuple[str, Metric, str, dict[str, str], float]]:
    """Declared name, family, suffix of the sample, labels without Ray's own, value."""
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("ray_") + ("_total" if family.type == "counter" else "")
        for sample in family.samples:
            labels = {
                label: value
                for label, value in sample.labels.items()
                if label not in RAYS_OWN and not label.startswith("otel_scope")
            }
            yield name, family, sample.name.removeprefix(family.name), labels, sample.value


def total(text: str, name: str, suffix: str = "", **labels: str) -> float:
    """The sum over all processes."""
    wanted = "_total" if name.endswith("_total") else suffix
    return sum(v for n, _, s, own, v in series(text) if (n, s) == (name, wanted) and labels.items() <= own.items())


def require_declared(text: str) -> None:
    """Every series is of a declared metric, of its kind, with exactly its labels, and with values that it may have."""
    for name, family, suffix, labels, _ in series(text):
        metric = DECLARED[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help), name
        own = dict(labels)
        if suffix == "_bucket":
            bound = own.pop("le")
            assert bound == "+Inf" or float(bound) in metric.buckets, name
        assert set(own) == set(metric.labels), name
        for label, value in own.items():
            values = metric.labels[label]
            assert len(value) < 40, (name, label, value)
            assert isinstance(values, str) or value in values, (name, label, value)


def poll(url: str, until: threading.Event, of_driver: list[str], seen: set[str]) -> None:
    while not until.wait(0.4):
        seen |= {line.split()[2] for line in metrics.exported_metrics().splitlines() if line.startswith("# TYPE")}
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            of_driver.append(answer.read().decode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_images(folder: Path, numbers: range) -> None:
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        path = folder / f"class{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def scraped(ray_session: None, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """All stages on S3 with the driver's metrics at a port, then a re-index as the process of a Ray job."""
    folder = tmp_path_factory.mktemp("metrics")
    images = folder / "images"
    write_images(images, range(60))
    (images / "class0" / "000.png").write_bytes(b"not an image")
    cut = images / "class1" / "001.png"
    cut.write_bytes(cut.read_bytes()[:200])
    config, port = folder / "pipeline.yaml", free_port()
    config.write_text(
        f"root: s3://hashdist/{folder.name}-{time.time_ns()}\n"
        f"collection: {{uri: {images}, part_rows: 60}}\n"
        "features: {backbone: pixels, workers: 1}\n"
        "train: {bits: 16, workers: 1, options: {rounds: 2, epochs: 1, lr: 0.001}}\n"
        "evaluate: {protocol: ''}\n"
    )
    time.sleep(2)  # what tests before this one have counted has come
    before = metrics.exported_metrics()
    of_driver: list[str] = []
    seen: set[str] = set()
    over = threading.Event()
    poller = threading.Thread(target=poll, args=(f"http://127.0.0.1:{port}/metrics", over, of_driver, seen))
    poller.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASHDIST_CACHE", str(folder / "cache"))
        try:
            settings, _ = cli.parse("pipeline", ["--config", str(config), f"--metrics.port={port}"])
            with session.observed_session(settings):
                every = Pipeline(settings)
                for stage in STAGES:
                    every.run(stage)
        finally:
            over.set()
            poller.join()
        write_images(images, range(60, 64))
        patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        assert cli.main(["reindex", "--config", str(config)]) == 0
        yield Scraped(before, _when_all_is_there(), seen, of_driver[-1], str(config))


def _when_all_is_there() -> str:
    """Processes report every second; the driver's newest gauge is the last to come."""
    for _ in range(40):
        text = metrics.exported_metrics()
        if total(text, "hashdist_stage_rows", stage="reindex") and total(text, "hashdist_train_steps_total"):
            return text
        time.sleep(0.5)
    raise TimeoutError(f"not all series have come:\n{text}")


def test_ray_exports_what_is_declared_and_nothing_else(scraped: Scraped) -> None:
    require_declared(scraped.after)
    assert {name.removeprefix("ray_") for name in scraped.seen} <= set(DECLARED)
    assert scraped.after.splitlines()[-1] == "# 1 of 1 metrics agents answered"


def test_workers_and_jobs_count_what_they_do(scraped: Scraped) -> None:
    def since(name: str, suffix: str = "", **labels: str) -> float:
        return total(scraped.after, name, suffix, **labels) - total(scraped.before, name, suffix, **labels)

    assert since("hashdist_stage_images_total", stage="features", status="ok") == 58
    assert since("hashdist_stage_images_total", stage="features", status="failed") == 2
    assert since("hashdist_stage_failures_total", stage="features", reason="truncated") == 1
    assert since("hashdist_stage_failures_total", stage="features", reason="not-an-image") == 1
    assert since("hashdist_stage_images_total", stage="encode", status="ok") == 58
    assert since("hashdist_stage_images_total", stage="reindex", status="ok") == 4
    assert since("hashdist_stage_part_seconds", "_count", stage="features") == 1
    assert since("hashdist_stage_seconds", "_count", stage="reindex") == 1
    assert since("hashdist_stage_seconds", "_count", stage="features") == 0  # that driver had a port of its own
    assert since("hashdist_train_refresh_seconds", "_count") == 1
    assert since("hashdist_train_steps_total", method="dsah") >= 2
    assert since("hashdist_commits_total", outcome="won") > 5
    assert since("hashdist_store_bytes_total", direction="written") > 1000
    assert since("hashdist_cache_bytes_total", outcome="miss") > 0
    assert total(scraped.after, "hashdist_index_rows") == 62
    assert 0 <= time.time() - total(scraped.after, "hashdist_index_committed_timestamp_seconds") < 600
    gauges = ("loss", "epoch", "images_per_second", "threshold", "positive_pairs", "agreement")
    assert {f"ray_hashdist_train_{name}" for name in gauges} <= scraped.seen


def test_a_driver_serves_its_own_while_it_runs(scraped: Scraped) -> None:
    require_declared(scraped.driver)
    assert "ray_" not in scraped.driver
    assert total(scraped.driver, "hashdist_stage_seconds", "_count", stage="features") == 1
    assert total(scraped.driver, "hashdist_stage_failed_rows", stage="features") == 2
    assert total(scraped.driver, "hashdist_stage_parts_total", stage="features", outcome="new") == 1


def test_a_command_pushes_its_own_at_its_end(
    scraped: Scraped, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    pushed: list[tuple[str, str]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            pushed.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        words = ["--config", scraped.config, "--metrics.gateway", f"127.0.0.1:{server.server_address[1]}"]
        assert cli.main(["index", "verify", *words]) == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, text),) = pushed
    assert path == "/metrics/job/hashdist"
    require_declared(text)
    assert total(text, "hashdist_stage_seconds", "_count", stage="verify") == 1
    assert total(text, "hashdist_index_version") == 3
    names = Counter(name for name, *_ in series(text))
    assert names["hashdist_index_faults"] == 1
    assert total(text, "hashdist_index_faults") == 0
    assert "hashdist_train_loss" not in names
