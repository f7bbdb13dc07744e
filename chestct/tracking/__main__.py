"""python -m chestct.tracking COMMAND: what is done with runs after they ended."""

import sys

from chestct.config.compose import compose
from chestct.errors import ChestCTError

USAGE = """
python -m chestct.tracking COMMAND [settings]

  push            sends finished local runs to a server; again to go on, nothing is sent twice
  dagshub-remote  writes DVC's remotes for a DagsHub repository (make dagshub-remote)

  python -m chestct.tracking push tracking.uri=https://SERVER
  python -m chestct.tracking push tracking=dagshub tracking.owner=OWNER tracking.repo=REPO
  python -m chestct.tracking dagshub-remote tracking.owner=OWNER tracking.repo=REPO

User and token come from the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or DAGSHUB_USER_TOKEN.
"""


def main(argv: list[str]) -> int:
    """Exit status: 0, or 2 after an error that the user can mend."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE.strip())
        return 0
    command, *overrides = argv
    try:
        if command == "push":
            from chestct.tracking.push import push

            push(compose(*overrides))
        elif command == "dagshub-remote":
            from chestct.tracking.storage import dagshub_remotes

            dagshub_remotes(compose(*overrides).tracking)
        else:
            raise ChestCTError(f"no command {command!r}. Commands: push, dagshub-remote")
    except ChestCTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
