"""The command lines and the servers on loopback, for every end-to-end test."""

from tests.e2e.loopback import hub as hub
from tests.e2e.loopback import plain_http as plain_http
from tests.e2e.loopback import s3 as s3
from tests.e2e.loopback import server as server
from tests.e2e.test_commands import call as call
