"""Bundles on the Hugging Face hub: `hf://USER/NAME` as a bundle's name, and how one gets there.

Only a bundle's own files are fetched, which are safetensors, JSON, text and graphs, and `load_bundle` checks them like
any others: a stranger's repository runs no code. HF_TOKEN and HF_ENDPOINT in the environment say who asks, and whom.
"""

import os
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from chestct.config.schema_serving import CARD, FACTS, FILES, TENSORS
from chestct.errors import ConfigError
from chestct.tracking.stores import TrackingError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

SCHEME = "hf://"
NAMES = [CARD, FACTS, TENSORS, *chain(*FILES.values())]
"""What a bundle may consist of; the card goes there as README.md, too, which is where the hub looks for one."""


def fetch(source: str) -> str:
    """The folder of the bundle `hf://USER/NAME` or `hf://USER/NAME@REVISION`, in huggingface_hub's own cache.

    A branch is resolved anew on every call; where the hub cannot be reached, what was fetched before is taken. Raises
    ConfigError where there is none, or no huggingface_hub.
    """
    name, _, revision = source.removeprefix(SCHEME).partition("@")
    try:
        return str(_api().snapshot_download(_checked(name), revision=revision or None, allow_patterns=NAMES))
    except (OSError, ValueError) as error:  # the hub's errors are both
        raise ConfigError(
            f"{source}: {_reason(error)}. Give {SCHEME}USER/NAME or {SCHEME}USER/NAME@REVISION; a private one takes "
            "a token in HF_TOKEN."
        ) from None


def push(bundle: Path, name: str, private: bool = False) -> str:
    """Puts the bundle in a folder into the repository USER/NAME, made where there is none, as one commit; its address.

    Raises ConfigError for another form of name and without huggingface_hub, TrackingError where the hub refuses.
    """
    api = _api()
    from huggingface_hub import CommitOperationAdd

    files = {file: bundle / file for file in NAMES if (bundle / file).exists()} | {"README.md": bundle / CARD}
    additions = [CommitOperationAdd(there, path) for there, path in files.items()]
    try:
        address = api.create_repo(_checked(name), private=private, exist_ok=True)
        api.create_commit(name, additions, commit_message="Bundle of chestct")
    except (OSError, ValueError) as error:
        raise TrackingError(
            f"Not pushed to {name}: {_reason(error)}. It takes a token that may write, in HF_TOKEN."
        ) from None
    return str(address)


def _api() -> "HfApi":
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        raise ConfigError(
            "The hub needs huggingface_hub, which is not installed: pip install 'chestct[hub]'."
        ) from None
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _reason(error: Exception) -> str:
    """The first two lines: the hub's errors begin with a number, and say what it means in the second."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[:2]) or type(error).__name__


def _checked(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"'{name}' is no name on the hub: give USER/NAME.")
    return name
