"""Sources of samples: folders, tables and shards."""
