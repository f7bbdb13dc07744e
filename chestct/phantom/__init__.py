"""Synthetic thorax slices with known lesions, which tests and the first run use; and lesions drawn into real ones."""
