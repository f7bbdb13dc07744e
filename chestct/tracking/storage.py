"""DagsHub as the place where DVC keeps data: the remotes in DVC's configuration.

DVC's own command line writes them, called in this process so that no list of processes shows the token.
"""

import os

from chestct.config.schema import TrackingConfig
from chestct.errors import ChestCTError
from chestct.tracking.server import dagshub_repository, dagshub_token

REMOTES = ("dagshub", "dagshub-http")


def dagshub_remotes(cfg: TrackingConfig) -> None:
    """Writes the S3-compatible remote as DVC's default and the plain HTTP one beside it.

    Addresses go to .dvc/config, the token to .dvc/config.local, which git ignores. Raises ChestCTError where owner,
    repository, token or DVC is missing, or DVC refuses.
    """
    repository, token = dagshub_repository(cfg), dagshub_token()
    s3, http = REMOTES
    _dvc("remote", "add", "--force", "--default", s3, "s3://dvc")
    _dvc("remote", "modify", s3, "endpointurl", f"{repository}.s3")
    _dvc("remote", "add", "--force", http, f"{repository}.dvc")
    _dvc("remote", "modify", http, "auth", "basic")
    for remote, keys in ((s3, ("access_key_id", "secret_access_key")), (http, ("user", "password"))):
        for key in keys:  # DagsHub takes the token for both
            _dvc("remote", "modify", "--local", remote, key, token)
    print(
        f"DVC remotes {s3} (default) and {http} for {repository}: commit .dvc/config; the token is in "
        ".dvc/config.local only."
    )


def _dvc(*arguments: str) -> None:
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    try:
        from dvc.cli import main  # type: ignore[import-untyped]
    except ImportError:
        raise ChestCTError("DVC is not installed: pip install 'chestct[dvc]'.") from None
    if main(["--quiet", *arguments]) != 0:
        raise ChestCTError(f"'dvc {' '.join(arguments[:3])} ...' failed, see above. Are you in the repository's root?")
