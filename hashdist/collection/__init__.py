"""Images and vectors that users bring, listed, read and decoded. Imports store and ground; no torch."""
