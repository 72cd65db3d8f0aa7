"""A Ray of three nodes, one of which is lost while features are extracted; a program, since a process has one Ray.

    python tests/lost_node.py FOLDER        # prints what came out, once without the loss and once with it, as JSON

FOLDER/images holds the images. All nodes are on this machine, with one CPU each.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from hashdist import distributed
from hashdist.settings import ClusterSettings, CollectionSettings, GraphSettings, Settings
from hashdist.stages import collection, features, graph
from hashdist.store.commit import Artefact, open_artefact

PART_ROWS = 4


def work(settings: Settings, watch: Any = None) -> dict[str, Any]:
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


def lose_a_node(cluster: Cluster, made: Artefact, about: dict[str, Any]) -> None:
    """Kill, without a word, a node that has begun to extract."""
    while len(made.parts()) < 3:
        time.sleep(0.01)
    head = cluster.head_node.node_id
    busy = {
        actor["Address"]["NodeID"]
        for actor in ray._private.state.actors().values()
        if "MapWorker" in actor["ActorClassName"] and actor["State"] == "ALIVE"
    }
    victim = next(node for node in cluster.worker_nodes if node.node_id in busy - {head})
    about["done"] = len(made.parts())
    cluster.remove_node(victim, allow_graceful=False)
    about["nodes_after"] = distributed.nodes()


def main(folder: Path) -> dict[str, Any]:
    """Both runs."""
    size = {"num_cpus": 1, "object_store_memory": 100 << 20, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**size)
    cluster.wait_for_nodes()
    settings = Settings(
        root=(folder / "whole").as_uri(),
        collection=CollectionSettings(uri=(folder / "images").as_uri(), part_rows=PART_ROWS),
        graph=GraphSettings(neighbours=5, threads=2),
    )
    about: dict[str, Any] = {}
    killers = []

    def watch(made: Artefact) -> None:
        killers.append(threading.Thread(target=lose_a_node, args=(cluster, made, about), daemon=True))
        killers[0].start()

    try:
        with distributed.session(ClusterSettings(address=cluster.address)):
            without = work(settings)
            lossy = Settings((folder / "lossy").as_uri(), collection=settings.collection, graph=settings.graph)
            with_loss = work(lossy, watch)
            killers[0].join(30)
            restarts = [int(actor.get("NumRestarts", 0)) for actor in ray._private.state.actors().values()]
    finally:
        cluster.shutdown()
    return {"without": without, "with": with_loss, "restarts": sum(restarts), **about}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
