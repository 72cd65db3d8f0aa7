"""The stages of the pipeline, one a file, and their order; no stage imports another.

Imports evaluation and everything below; ray, which only this folder and the service may import.
"""
