"""The version: its own module, so that what stands below the Python API can name it."""

__version__ = "0.1.0"
