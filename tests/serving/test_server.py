"""The process's own parts; tests/e2e/test_serve.py starts it."""

import pytest

from chestct.errors import ConfigError
from chestct.serving.server import bind


def test_a_taken_port_is_an_error_that_tells_the_way() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"serve\.port"):
            bind("127.0.0.1", taken.getsockname()[1])
