"""The border to Ray: session, tasks, workers, metrics, peers, and Ray's private parts. Imports no stage."""
