"""The stages of the pipeline, one a file: the only place, with hashdist/stages/cluster/session.py, that knows Ray."""
