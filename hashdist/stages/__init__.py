"""The stages of the pipeline, one a file: the only place, with hashdist/distributed.py, that knows Ray."""
