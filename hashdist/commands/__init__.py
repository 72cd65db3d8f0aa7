"""Commands that a user types, one file a family. Imports everything below; no ray but through stages."""
