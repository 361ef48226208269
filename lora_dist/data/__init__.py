"""Image data sets, from files to batches on the device."""
