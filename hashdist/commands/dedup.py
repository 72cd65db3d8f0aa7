"""`hashdist dedup`: clusters of near-duplicates."""

from typing import Any

from hashdist.commands.index import index_of
from hashdist.ground.options import DedupOptions
from hashdist.ground.settings import Settings


def dedup(settings: Settings, options: DedupOptions) -> dict[str, Any]:
    """Write the clusters of near-duplicates of an index to a file."""
    from hashdist.stages import dedup as stage  # brings Ray along

    return stage.run(index_of(settings), options, settings.cluster)
