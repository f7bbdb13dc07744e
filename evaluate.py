"""`chestct evaluate`, for whoever works in a clone: `python evaluate.py --help` explains every setting."""

from chestct.cli import evaluate

if __name__ == "__main__":
    evaluate()
