"""Metrics, intervals over groups, calibration and drift: numbers about numbers, without files or models."""
