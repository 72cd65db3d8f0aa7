"""The search service: an index over HTTP, with a page. `app` and `encoder` put it on Ray Serve, the rest needs no Ray.

Imports everything below; no command.
"""
