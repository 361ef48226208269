"""Files on disk: atomic writing, free space, permission."""
