"""The version of the package. pyproject.toml reads it from here, records of artefacts and of indexes carry it."""

__version__ = "0.1.0"
