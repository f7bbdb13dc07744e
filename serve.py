"""`chestct serve`, for whoever works in a clone: `python serve.py --help` explains every setting."""

from chestct.cli import serve

if __name__ == "__main__":
    serve()
