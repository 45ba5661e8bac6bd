"""The guards by which an instance stops itself, against the fake API.

The worker's own part by itself and in the real worker, the on-start command's as it is ordered, and
both as `start` rents them.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_vast import FakeVast, Instance


@pytest.fixture
def vast(tmp_path: Path) -> Iterator[FakeVast]:
    with FakeVast(tmp_path / "vast", {}) as fake:
        yield fake


# The fake


def status_of(vast: FakeVast, method: str, path: str, key: str, body: object = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(vast.url + path, data, {"Authorization": f"Bearer {key}"},
                                     method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_containers_key_may_start_stop_and_destroy_its_own_instance_alone(
        vast: FakeVast) -> None:
    one, other = (vast.add_instance(fate="silent") for _ in range(2))
    stop = {"state": "stopped"}

    def status(instance: Instance, method: str, body: object = None) -> int:
        return status_of(vast, method, f"/api/v0/instances/{instance.id}/", one.api_key, body)
    assert status(other, "PUT", stop) == status(other, "DELETE") == 403
    assert status(one, "PUT", {"label": "x"}) == status(one, "GET") == 403
    assert status_of(vast, "GET", "/api/v1/instances/", one.api_key) == 403
    assert status_of(vast, "PUT", f"/api/v0/instances/{one.id}/", "nobody's", stop) == 401
    assert (one.touched, other.touched) == ([], [])
    assert status(one, "PUT", stop) == status(one, "DELETE") == 200
    assert (one.touched, vast.destroyed) == (["stopped", "destroy"], [one.id])
