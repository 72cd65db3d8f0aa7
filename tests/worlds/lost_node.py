"""A Ray of three nodes, one of which is lost while features are extracted; a program, since a process has one Ray.

    python -m tests.worlds.lost_node FOLDER   # prints what came out, once without the loss and once with it, as
    JSON

FOLDER/images holds the images. All nodes are on this machine, with one CPU each.
"""

import faulthandler
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from hashdist.ground.settings import ClusterSettings, CollectionSettings, GraphSettings, Settings
from hashdist.stages import collection, features, graph
from hashdist.stages.cluster import session
from hashdist.store.commit import Artefact, open_artefact

PART_ROWS = 2


def work(settings: Settings, watch: Callable[[Artefact], None] | None = None) -> dict[str, Any]:
    """Collection, features and graph; `watch` is called with the features' artefact before they are extracted."""
    listed = open_artefact(collection.run(settings)["snapshot"], "collections")
    if watch:
        watch(features.snapshot(settings, listed))
    made = open_artefact(features.run(settings, listed)["snapshot"], "features")
    joined = open_artefact(graph.run(settings, made)["snapshot"], "graphs")
    return {
        "features": [file["sha256"] for file in made.manifest()["files"]],
        "graph": sorted(file["sha256"] for file in joined.manifest()["files"].values() if file),
    }


def lose_a_node(cluster: Cluster, made: Artefact) -> int:
    """Kill, without a word, a node that has begun to extract; returns how many parts were committed then."""
    while len(made.parts()) < 3:
        time.sleep(0.01)
    busy = {
        actor["Address"]["NodeID"]
        for actor in ray._private.state.actors().values()
        if "MapWorker" in actor["ActorClassName"] and actor["State"] == "ALIVE"
    }
    victim = next(node for node in cluster.worker_nodes if node.node_id in busy)
    done = len(made.parts())
    cluster.remove_node(victim, allow_graceful=False)
    while session.nodes() > len(cluster.worker_nodes) + 1:
        time.sleep(0.1)
    return done


def main(folder: Path) -> dict[str, Any]:
    """Both runs."""
    faulthandler.dump_traceback_later(500)
    # a loopback that Ray does not replace by the machine's address, as it does with 127.0.0.1
    size = {"num_cpus": 1, "object_store_memory": 100 << 20, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**size)
    cluster.wait_for_nodes()
    settings = Settings(
        root=(folder / "whole").as_uri(),
        collection=CollectionSettings(uri=(folder / "images").as_uri(), part_rows=PART_ROWS),
        graph=GraphSettings(neighbours=5, threads=2),
    )
    lossy = replace(settings, root=(folder / "lossy").as_uri())
    try:
        with session.session(ClusterSettings(address=cluster.address)), ThreadPoolExecutor(1) as pool:
            without = work(settings)
            losing: list[Future[int]] = []
            with_loss = work(lossy, lambda made: losing.append(pool.submit(lose_a_node, cluster, made)))
            return {"without": without, "with": with_loss, "done": losing[0].result(60)}
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
