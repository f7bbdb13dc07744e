"""How good a model is: predictions of a checkpoint, metrics from predictions, plots from metrics."""
