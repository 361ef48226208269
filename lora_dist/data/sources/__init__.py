"""Where samples come from: folders, tables, label files, shards."""
