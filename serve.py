"""Serves the model as a web page with an API. `python serve.py --help` explains every setting."""

import sys
from pathlib import Path

from chestct.cli import door
from chestct.config.schema import Config
from chestct.errors import ConfigError

USAGE = """
Opens a web page that reads chest CT slices, at http://127.0.0.1:7860, with an API beside it.

  python serve.py                                   the model in the package
  python serve.py bundle=FOLDER                     another bundle
  python serve.py bundle=models:/NAME@champion      one that is registered in MLflow
  python serve.py serve.host=0.0.0.0 serve.port=80  reachable from other machines
  python serve.py --hash-password                   makes the hash of a password or token (see docs/api.md)

CHESTCT_USERS='name:HASH' or CHESTCT_TOKENS='HASH' in the environment ask visitors for a password or token. SIGHUP
takes the bundle anew, and asks MLflow where its name points by now; SIGTERM ends the service when requests under way
are answered.
"""


@door("serve", USAGE)
def main(cfg: Config, out: Path) -> None:
    from chestct.serving.monitor import Monitor
    from chestct.serving.service import serve

    def locate() -> str:
        source = cfg.bundle or "packaged"
        if not source.startswith(("models:/", "runs:/")):
            return source
        try:
            from chestct.tracking.bundle import fetch_bundle  # MLflow takes seconds to import

            return fetch_bundle(source, cfg)
        except ModuleNotFoundError as error:  # as in the image
            raise ConfigError(f"bundle={source} needs {error.name}, which is not installed. Give a folder.") from None

    monitor = Monitor(cfg.monitor.path, cfg.monitor.keep_days) if cfg.monitor.enabled else None
    try:
        serve(cfg, locate, monitor.record if monitor else None)
    finally:
        if monitor:
            monitor.close()


if __name__ == "__main__":
    if "--hash-password" in sys.argv[1:]:
        from chestct.serving.auth import ask_and_hash

        ask_and_hash()
    else:
        main()
