"""Metrics without Ray: what is declared, what is observed, how texts of many machines become one."""

import ast
import runpy
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hashdist.ground import exporting, telemetry
from hashdist.ground.errors import InvalidInput, NotFound
from hashdist.ground.exporting import PrometheusSink, exported
from hashdist.ground.settings import MetricsSettings
from hashdist.ground.telemetry import DECLARED, Metric, NoSink
from hashdist.stages.cluster import metrics
from tests import REPOSITORY

BY_VARIABLE = {name: value for name, value in vars(telemetry).items() if isinstance(value, Metric)}

# What is declared, and observed


def observations(source: Path) -> Iterator[tuple[Metric, str, dict[str, ast.expr], str]]:
    """Every observation in a module: metric, verb, labels, and the function that it is in."""
    for function in ast.walk(ast.parse(source.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                    of = call.func.value
                    variable = of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")
                    if variable in BY_VARIABLE:
                        labels = {str(word.arg): word.value for word in call.keywords}
                        yield BY_VARIABLE[variable], call.func.attr, labels, function.name


def calls(source: Path) -> set[str]:
    """What a module calls of the telemetry module."""
    found = (node.func for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call))
    return {f.attr for f in found if isinstance(f, ast.Attribute) and getattr(f.value, "id", "") == "telemetry"}


def sources() -> list[Path]:
    return [path for path in (REPOSITORY / "hashdist").rglob("*.py") if path.name != "telemetry.py"]


def test_every_metric_is_observed_outside_the_module_that_declares_it() -> None:
    called = set(chain.from_iterable(calls(path) for path in sources()))
    helpers = {metric.name for metric, *_, by in observations(Path(telemetry.__file__)) if by in called}
    direct = {metric.name for path in sources() for metric, *_ in observations(path)}
    assert direct | helpers == set(DECLARED)


def test_observations_are_of_the_kind_and_with_the_labels_that_are_declared() -> None:
    for path in [*sources(), Path(telemetry.__file__)]:
        for metric, verb, labels, by in observations(path):
            where = f"{path.name}, {by}: {metric.name}"
            assert verb == telemetry.VERB[metric.kind], where
            assert set(labels) == set(metric.labels), where
            for label, value in labels.items():
                values = metric.labels[label]
                if isinstance(value, ast.Constant) and not isinstance(values, str):
                    assert value.value in values, where


def test_names_follow_the_convention() -> None:
    for name, metric in DECLARED.items():
        assert name.startswith("hashdist_")
        assert (metric.kind == "counter") == name.endswith("_total")
        assert metric.help.endswith(".")
        assert metric.unit != "1" or metric.kind != "histogram"
    units = {m.name: m.unit for m in (telemetry.IMAGES, telemetry.TRAIN_IMAGES_PER_S, telemetry.THRESHOLD)}
    assert list(units.values()) == ["images", "images/second", "1"]


def test_every_metric_has_one_row_of_the_table() -> None:
    table = exporting.table()
    assert [table.count(f"| `{name}` | `ray_{name}` |") for name in DECLARED] == [1] * len(DECLARED)


def test_the_table_in_the_document_is_the_present_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (REPOSITORY / "docs/metrics.md").read_text()
    assert document == exporting.replaced(document), "run `python -m hashdist.ground.exporting docs/metrics.md`"
    old = tmp_path / "old.md"
    old.write_text(document.replace("| `hashdist_index_rows` |", "| `hashdist_index_lines` |"))
    monkeypatch.setattr(sys, "argv", ["telemetry", str(old)])
    monkeypatch.delitem(sys.modules, "hashdist.ground.exporting")
    runpy.run_module("hashdist.ground.exporting", run_name="__main__")
    assert old.read_text() == document


# Sinks


class Recorded:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, dict[str, str]]] = []

    def observe(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        self.seen.append((metric.name, value, labels))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_metrics_reach_prometheus() -> None:
    with exported(MetricsSettings(gateway="127.0.0.1:1")) as sink:
        telemetry.count_images("features", 3, {"truncated": 2})
        telemetry.THRESHOLD.set(0.5)
        telemetry.STAGE_SECONDS.observe(2.0, stage="graph")
        assert isinstance(sink, PrometheusSink)
        value = sink.registry.get_sample_value
        sink._gateway = ""
    assert value("hashdist_stage_images_total", {"stage": "features", "status": "ok"}) == 3
    assert value("hashdist_stage_failures_total", {"stage": "features", "reason": "truncated"}) == 2
    assert value("hashdist_train_threshold") == 0.5
    assert value("hashdist_stage_seconds_count", {"stage": "graph"}) == 1


def test_metrics_are_served_over_http_while_the_block_runs() -> None:
    port = free_port()
    with exported(MetricsSettings(port=port)):
        telemetry.INDEX_ROWS.set(7)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    assert "hashdist_index_rows 7.0" in text
    assert "hashdist_index_version" not in text  # 0 would be a lie
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_port_that_is_taken_is_refused_in_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidInput, match=r"free port of 127\.0\.0\.1, found"):
            exported(MetricsSettings(port=taken.getsockname()[1]))


def test_metrics_are_pushed_at_the_end() -> None:
    with served({}) as url:
        with exported(MetricsSettings(gateway=url.removeprefix("http://"))):
            telemetry.COMMITS.inc(outcome="lost")
            assert not pushed
        (path, body), *more = pushed
        pushed.clear()
    assert (path, more) == ("/metrics/job/hashdist", [])
    assert 'hashdist_commits_total{outcome="lost"} 1.0' in body
    assert "hashdist_index_rows" not in body  # what an earlier job has pushed of it stays


def test_a_gateway_that_is_away_fails_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    with exported(MetricsSettings(gateway="127.0.0.1:1")):
        telemetry.COMMITS.inc(outcome="won")
    assert "did not reach the push gateway 127.0.0.1:1" in capsys.readouterr().err


def test_who_calls_first_decides_where_observations_go() -> None:
    own, other = Recorded(), Recorded()
    with exported(MetricsSettings(), own):
        with exported(MetricsSettings(gateway="127.0.0.1:1"), other):
            telemetry.INDEX_ROWS.set(1)
        telemetry.INDEX_ROWS.set(2)
    with exported(MetricsSettings()):
        telemetry.INDEX_ROWS.set(3)
    assert [value for _, value, _ in own.seen] == [1, 2]
    assert not other.seen
    assert isinstance(telemetry._sink, NoSink)


def test_a_metric_may_be_observed_first_by_many_threads_at_once() -> None:
    sink = PrometheusSink()
    with exporting.Exported(sink), ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: telemetry.count_request("get"), range(400)))
    assert sink.registry.get_sample_value("hashdist_store_requests_total", {"operation": "get"}) == 400


def test_a_run_counts_how_it_ended() -> None:
    recorded = Recorded()
    with exporting.Exported(recorded):
        with telemetry.run_of("graph"):
            pass
        with pytest.raises(NotFound), telemetry.run_of("train"):
            raise NotFound("nothing there")
    assert [(name, labels) for name, _, labels in recorded.seen] == [
        ("hashdist_stage_seconds", {"stage": "graph"}),
        ("hashdist_stage_ended_timestamp_seconds", {"stage": "graph"}),
        ("hashdist_stage_errors_total", {"stage": "train", "error": "NotFound"}),
    ]


# One text of all machines


NODE_1 = """# HELP ray_tasks Current number of tasks.
# TYPE ray_tasks gauge
ray_tasks{WorkerId="a"} 1.0
# HELP ray_hashdist_commits_total Commits by outcome: "won", C:\\\\lost.
# TYPE ray_hashdist_commits_total counter
ray_hashdist_commits_total{WorkerId="a",outcome="won"} 2.0
# HELP ray_hashdist_search_seconds Time.
# TYPE ray_hashdist_search_seconds histogram
ray_hashdist_search_seconds_bucket{WorkerId="a",le="1.0",phase="scan"} 3.0
ray_hashdist_search_seconds_bucket{WorkerId="a",le="+Inf",phase="scan"} 4.0
ray_hashdist_search_seconds_count{WorkerId="a",phase="scan"} 4.0
ray_hashdist_search_seconds_sum{WorkerId="a",phase="scan"} 9.5
"""
NODE_2 = """# HELP ray_hashdist_index_rows Live rows.
# TYPE ray_hashdist_index_rows gauge
ray_hashdist_index_rows{WorkerId="b"} 7.0
# HELP ray_hashdist_commits_total Commits by outcome.
# TYPE ray_hashdist_commits_total counter
ray_hashdist_commits_total{WorkerId="b",outcome="a \\"quoted\\" word"} 5.0
"""


pushed: list[tuple[str, str]] = []


@contextmanager
def served(answers: dict[str, bytes | None]) -> Iterator[str]:
    """A server on the loopback; None = it takes the request and says nothing until the block ends."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path)
            if self.path not in answers:
                self.send_error(500)
            elif answer is None:
                over.wait(10)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

        def do_POST(self) -> None:
            pushed.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def test_texts_of_all_nodes_become_one_valid_text() -> None:
    with served({"/1": NODE_1.encode(), "/2": NODE_2.encode()}) as url:
        text = metrics._merge([f"{url}/1", f"{url}/2"], 2)
    lines = text.splitlines()
    assert [line.split()[2] for line in lines if line.startswith("# TYPE")] == [
        "ray_hashdist_commits_total",
        "ray_hashdist_index_rows",
        "ray_hashdist_search_seconds",
    ]
    assert lines[-1] == "# 2 of 2 metrics agents answered"
    series = [line for node in (NODE_1, NODE_2) for line in node.splitlines() if line.startswith("ray_hashdist")]
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(series)
    (commits,) = (f for f in text_string_to_metric_families(text) if f.name == "ray_hashdist_commits")
    assert commits.documentation == 'Commits by outcome: "won", C:\\lost.'
    assert [(s.labels["outcome"], s.value) for s in commits.samples] == [("won", 2), ('a "quoted" word', 5)]


@pytest.mark.parametrize("wrong", [b"ray_hashdist_index_rows{ 1", b"ray_hashdist_index_rows \xff"])
def test_agents_that_do_not_answer_are_counted_and_left_out(wrong: bytes) -> None:
    with served({"/2": NODE_2.encode(), "/slow": None, "/wrong": wrong}) as url:
        urls = [f"{url}/2", f"{url}/slow", f"{url}/wrong", f"{url}/error", "http://127.0.0.1:1/metrics"]
        text = metrics._merge(urls, 0.3)
    assert text.splitlines()[-1] == "# 1 of 5 metrics agents answered"
    assert text.count("ray_hashdist_index_rows{") == 1
    assert metrics._merge([], 1) == "# 0 of 0 metrics agents answered\n"


def test_an_agent_may_have_an_address_of_version_6() -> None:
    node = {"NodeManagerAddress": "fd00::7", "MetricsExportPort": 8080}
    assert metrics._agent(node) == "http://[fd00::7]:8080/metrics"
