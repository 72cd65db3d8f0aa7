"""The files of rows: written, opened by mapping, merged. Imports store and ground, nothing else of the index."""
