"""The methods, one paper a file; hashdist/methods/contract.py says what a file must offer."""
