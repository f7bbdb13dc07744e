"""`chestct evaluate`, for whoever works in a clone: `python evaluate.py --help` explains every setting."""

from chestct.experiment import evaluate

if __name__ == "__main__":
    evaluate()
