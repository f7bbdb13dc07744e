"""Sweeps: grids and searches over settings, behind Hydra's sweeper in hydra_plugins.

The sweep's folder is the record: study.db holds the search, each job has a folder with its number, and finds what it
belongs to (the MLflow parent, the study) in the folder above its own, in whatever process it runs.
"""

from chestct.sweep.run import sweep as sweep
