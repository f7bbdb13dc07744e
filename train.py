"""`chestct train`, for whoever works in a clone: `python train.py --help` explains every setting."""

from chestct.experiment import train

if __name__ == "__main__":
    train()
