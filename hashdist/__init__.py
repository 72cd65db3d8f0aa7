"""hashdist: a growing image collection as a compact, versioned binary index, with a hash function it learns itself."""

__version__ = "0.1.0"
