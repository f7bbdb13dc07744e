"""The page of chestct, as a Space: `python app.py` opens it here, too."""

import os
import sys

from chestct.cli import main

port = os.environ.get("PORT", "7860")
sys.argv = ["chestct", "serve", "bundle=bundle", "serve.host=0.0.0.0", f"serve.port={port}", "serve.hosts=['*']"]
main()
