"""The image cache: decoded training images in files that are mapped into memory."""
