"""The command lines, for every end-to-end test."""

from tests.e2e.test_doors import call as call
