"""Where hosts can be had, and what it means if they cannot."""

import os

import pytest

from tests.distributed import hosts


@pytest.fixture(scope="session")
def needs_hosts() -> None:
    """Skip a test for which there are no hosts on this machine; where they were promised, fail."""
    reason = hosts.reason_without()
    if reason is None:
        return
    if os.environ.get("TEST_HOSTS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)
