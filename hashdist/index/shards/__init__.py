"""Files of an index: shards, keys, merged shards. Imports store, nearest and ground."""
