"""Data sets of images, and the way of their pixels to the device."""
