"""How good codes, an increment or a version are. Imports models, index, methods and below; no ray."""
