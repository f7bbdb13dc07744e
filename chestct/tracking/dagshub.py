"""DagsHub: the token from the environment, and the remotes that make it the place where DVC keeps data.

DVC's own command line writes the remotes, called in this process so that no list of processes shows the token.
"""

import os
import re

from chestct.config.schema import TrackingConfig
from chestct.errors import ChestCTError, ConfigError

HOST = "dagshub.com"
REMOTES = ("dagshub", "dagshub-http")


def dagshub_token() -> str:
    """The DagsHub token in the environment. Raises ConfigError where there is none."""
    token = os.environ.get("DAGSHUB_USER_TOKEN") or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not token:
        raise ConfigError(
            f"No DagsHub token in the environment. Make one at {HOST} (User Settings, Tokens), then: "
            "export DAGSHUB_USER_TOKEN=..., or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    return token


def log_in() -> None:
    """Hands the token to MLflow's client where it reads users; DagsHub takes it for the user name, too."""
    token = dagshub_token()
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        os.environ.setdefault(name, token)


def dagshub_repository(cfg: TrackingConfig) -> str:
    """Address of the repository on DagsHub. Raises ConfigError where owner or repository are missing or no names."""
    for key, value in (("tracking.owner", cfg.owner), ("tracking.repo", cfg.repo)):
        if not value or not re.fullmatch(r"[\w.-]+", value):
            raise ConfigError(
                f"tracking=dagshub: {key}={value or 'null'} is not a name on DagsHub. Give both as in "
                f"{HOST}/OWNER/REPO: tracking.owner=OWNER tracking.repo=REPO."
            )
    return f"https://{HOST}/{cfg.owner}/{cfg.repo}"


def dagshub_remotes(cfg: TrackingConfig) -> None:
    """Writes the S3-compatible remote as DVC's default, and the plain HTTP one.

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
