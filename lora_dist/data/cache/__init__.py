"""The image cache: decoded images of a data set in one file, read in place of the originals."""
