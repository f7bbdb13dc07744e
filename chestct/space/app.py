"""The page of chestct, as a Space: `python app.py` opens it here, too, for this machine alone."""

import os
import sys

from chestct.cli import main

port = os.environ.get("PORT", "7860")
sys.argv = ["chestct", "serve", "bundle=bundle", f"serve.port={port}"]
if "SPACE_ID" in os.environ:  # the hub's proxy comes from outside, under names of its own
    sys.argv += ["serve.host=0.0.0.0", "serve.hosts=['*']"]
main()
