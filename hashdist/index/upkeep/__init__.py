"""How an index is looked after: compaction, clean-up, verification, erasure. Changes go through `Index.transact`."""
