"""How an index is looked after: compaction, retention, verification, erasure, lineage. Imports the index and below."""
