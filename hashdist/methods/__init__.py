"""The methods, one paper a file; hashdist/methods/contract.py says what a file must offer.

Imports nearest and ground; torch; never another paper's file.
"""
