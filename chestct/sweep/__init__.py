"""Sweeps: grids and searches over settings, behind Hydra's sweeper in hydra_plugins.

The sweep's folder is the record: study.db holds Optuna's study, each job has a folder with its number, and finds what
it belongs to (the MLflow parent, the study) in the folder above its own, in whatever process it runs.

Not hydra-optuna-sweeper: its release needs Optuna 2, cannot go on with a sweep that was killed, and does not prune.
"""

from chestct.sweep.sweeper import sweep as sweep
