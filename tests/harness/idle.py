"""Many idle connections to a server, within the files that a process may open. Of the tests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

SPARE = 500  # files that a process has open besides


def more_files(connections: int) -> None:
    """Let this process, and those that it starts from now on, open so many connections; else skip the test."""
    resource = pytest.importorskip("resource", reason="no limit of open files to raise")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE
    if hard not in (-1, resource.RLIM_INFINITY) and hard < wanted:
        pytest.skip(f"a process may open {hard} files here, and {connections} connections need {wanted}")
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def idle(port: int, connections: int = 1000) -> Iterator[list[socket.socket]]:
    """So many connections to a port of loopback that say nothing."""
    more_files(connections)
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(connections)]
