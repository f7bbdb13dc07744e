"""The model in use: predictor, web page, batch command line, drift report."""
