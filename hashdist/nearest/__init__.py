"""Exact neighbours, arrays in and arrays out; the home of numba. Imports the ground."""
