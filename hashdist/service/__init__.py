"""The search service: an index over HTTP, with a page. `app.py` puts it on Ray Serve; the rest needs no Ray."""
