"""An index follows its collection: list, compare, encode the difference, commit.

Imports everything below; light when imported, ray only through stages.
"""
