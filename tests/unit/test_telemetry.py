"""Metrics without Ray: what is declared, what is observed, how texts of many machines become one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hashdist import distributed

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
        text = distributed._merged([f"{url}/1", f"{url}/2"], 2)
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
        text = distributed._merged(urls, 0.3)
    assert text.splitlines()[-1] == "# 1 of 5 metrics agents answered"
    assert text.count("ray_hashdist_index_rows{") == 1
    assert distributed._merged([], 1) == "# 0 of 0 metrics agents answered\n"


def test_an_agent_may_have_an_address_of_version_6() -> None:
    node = {"NodeManagerAddress": "fd00::7", "MetricsExportPort": 8080}
    assert distributed._agent(node) == "http://[fd00::7]:8080/metrics"
