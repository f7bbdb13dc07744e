"""Measurements run by hand (`make bench`), never by the tests: a machine's speed is no property of the code."""
