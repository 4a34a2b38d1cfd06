"""The embedded pictures of the package and how they are built."""
