"""How a version is searched: filters, engines one a file, ranking. Imports the view and below."""
