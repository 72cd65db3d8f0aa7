"""The border to Ray: session, tasks, workers, metrics, peers. Imports what stages import."""
