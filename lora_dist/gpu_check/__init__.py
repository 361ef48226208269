"""Checks that this package works on the machine and its GPUs, with the packaged base and without network."""
