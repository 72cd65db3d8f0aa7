"""How a version is searched: filters, engines (one file each), two-stage ranking. Imports `view`, never `Index`."""
