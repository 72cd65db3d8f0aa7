"""Formats of collections, one a file. Imports store and ground; no torch."""
