"""chestct tells cancer from normal on chest CT slices, and tells how far that answer can be trusted."""

__version__ = "0.1.0"
