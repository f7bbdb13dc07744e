"""Synthetic thorax slices with known lesions and, on request, known faults: what the tests and the first run use."""
