"""Image to feature to code: networks built, trained and kept.

Imports methods, collection, store and what is below; torch, no ray.
"""
