"""The API over its unix socket: what it answers, what it refuses, and in which words."""

from __future__ import annotations

import stat
import threading
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from mirror.api.client import Client
from mirror.api.schemas import JobView
from mirror.domain.errors import (
    AlreadyProtected,
    Corrupt,
    DaemonUnreachable,
    MirrorInconsistent,
    NotProtected,
    SourceMayBeAlive,
    UnknownVm,
    UsageError,
    VmirrorError,
)
from mirror.services.events import UNREAD_MAX, EventLog
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_source import VmState
from tests.fakes.served import Served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[Served, None, None]:
    """One server for the questions and refusals; what changes much has its own."""
    with Served(tmp_path_factory.mktemp("api"), VmState(), VmState(name="db", pid=4712)) as served:
        with Client(served.socket) as client:
            done = client.wait_job(client.protect("db", "/mnt/mirror", None).uuid)
            assert done.state == "done", done
        yield served


@pytest.fixture
def http(served: Served) -> Generator[httpx.Client, None, None]:
    transport = httpx.HTTPTransport(uds=str(served.socket))
    with httpx.Client(transport=transport, base_url="http://vmirror", timeout=10) as http:
        yield http


@pytest.fixture
def client(served: Served) -> Generator[Client, None, None]:
    with Client(served.socket) as client:
        yield client


def test_socket_is_for_owner_and_group_only(served: Served) -> None:
    assert stat.S_IMODE(served.socket.stat().st_mode) == 0o660


def test_health_says_who_it_is(client: Client) -> None:
    health = client.health()
    assert health.ok
    assert health.version == "0.test"
    assert health.protections == 1
    assert health.troubled == []


def test_vms_are_listed_with_what_is_protected(client: Client) -> None:
    assert {vm.name: vm.protected for vm in client.vms()} == {"web": False, "db": True}


def test_protection_is_found_by_name_socket_and_uuid(client: Client) -> None:
    view = client.protection("db")
    assert client.protection(view.uuid).vm == "db"
    assert client.protection(view.source.qmp_socket).uuid == view.uuid
    assert view.state == "MIRRORING"
    assert view.consistent
    assert view.why
    assert view.disks[0].client_connected


@pytest.mark.parametrize("vm", ["web", "../etc/passwd", "a b/ü?#%2F", "failover", "x" * 600])
def test_what_is_not_protected_is_404_and_lists_what_is(client: Client, vm: str) -> None:
    with pytest.raises(NotProtected, match="Protected VMs: db"):
        client.protection(vm)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error_class"),
    [
        ("POST", "/v1/protections", b"{", 422, "UsageError"),
        ("POST", "/v1/protections", b"[]", 422, "UsageError"),
        ("POST", "/v1/protections", b'{"vm": "web"}', 422, "UsageError"),
        ("POST", "/v1/protections", b'{"vm": 1, "to_dir": "/mnt"}', 422, "UsageError"),
        ("POST", "/v1/protections", b'{"vm": "web", "to_dir": "/mnt", "surprise": 1}', 422, "UsageError"),
        ("POST", "/v1/protections", b'{"vm": "web", "to_dir": "/mnt", "disks": []}', 422, "UsageError"),
        ("POST", "/v1/protections", b'{"vm": "web", "to_dir": "mnt"}', 400, "UsageError"),
        ("POST", "/v1/protections", b'{"vm": "nobody", "to_dir": "/mnt"}', 404, "UnknownVm"),
        ("POST", "/v1/protections", b'{"vm": "db", "to_dir": "/mnt"}', 409, "AlreadyProtected"),
        ("POST", "/v1/protections/db/failover", b'{"force": "yes"}', 422, "UsageError"),
        ("POST", "/v1/protections/web/failover", b"{}", 404, "NotProtected"),
        ("DELETE", "/v1/protections/web", b"", 404, "NotProtected"),
        ("DELETE", "/v1/protections/db?delete_mirror=perhaps", b"", 422, "UsageError"),
        ("POST", "/v1/adopt", b'{"mirror_dirs": ["relative"]}', 400, "UsageError"),
        ("POST", "/v1/adopt", b'{"mirror_dirs": "x"}', 422, "UsageError"),
        ("GET", "/v1/jobs/no-uuid", b"", 422, "UsageError"),
        ("GET", "/v1/jobs/00000000-0000-0000-0000-000000000000", b"", 404, "UsageError"),
        ("GET", "/v1/jobs?limit=0", b"", 422, "UsageError"),
        ("GET", "/v1/nonsense", b"", 404, "UsageError"),
        ("PUT", "/v1/protections", b"{}", 405, "UsageError"),
        ("GET", "/v1/events?after=-1", b"", 422, "UsageError"),
    ],
)
def test_wrong_call_is_a_4xx_in_our_words_and_changes_nothing(
    served: Served,
    http: httpx.Client,
    *,
    method: str,
    path: str,
    body: bytes,
    status: int,
    error_class: str,
) -> None:
    before = (len(served.appliance.registry.all()), len(served.world.vm.calls), http.get("/v1/jobs").content)
    answer = http.request(method, path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert set(error) == {"class", "message", "exit_status"}
    assert error["class"] == error_class
    assert error["exit_status"] == 2
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 1_000
    after = (len(served.appliance.registry.all()), len(served.world.vm.calls), http.get("/v1/jobs").content)
    assert after[0] == before[0]
    assert after[2] == before[2]


def test_metrics_are_prometheus_text_with_bounded_labels(client: Client) -> None:
    text = client.metrics()
    assert 'vmirror_state{state="MIRRORING",vm="db"} 1.0' in text
    assert 'vmirror_state{state="DEGRADED",vm="db"} 0.0' in text
    assert 'vmirror_disk_dirty_bytes{disk="disk0",vm="db"} 0.0' in text
    assert "vmirror_filter_writes_total" in text
    assert "python_info" not in text


def test_openapi_names_the_operations(http: httpx.Client) -> None:
    paths = http.get("/v1/openapi.json").json()["paths"]
    assert "/v1/protections/{vm}/failover" in paths


def test_kept_events_are_lines_of_json(client: Client) -> None:
    events = list(client.events(follow=False))
    assert [event.sequence for event in events] == sorted(event.sequence for event in events)
    assert any(event.vm == "db" and "MIRRORING" in event.text for event in events)
    assert list(client.events(after=events[-1].sequence, follow=False)) == []


def test_events_are_followed_live(served: Served, client: Client) -> None:
    last = list(client.events(follow=False))[-1].sequence
    threading.Timer(
        0.1, lambda: served.do(lambda: served.appliance.events.add("db", "state", "hello"))
    ).start()
    for event in client.events(after=last):
        if event.text == "hello":
            return


def test_fault_of_the_daemon_is_500_with_its_name_and_no_more(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> object:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(served.appliance, "snapshots", broken)
    answer = http.get("/v1/protections")
    assert answer.status_code == 500
    assert answer.json()["class"] == "VmirrorError"
    assert "ZeroDivisionError: a bug" in answer.json()["message"]


def test_whole_life_over_the_api(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(served.socket) as client:
        seen: list[JobView] = []
        job = client.wait_job(client.protect("web", "/mnt/mirror", ["disk0"]).uuid, seen=seen.append)
        assert job.state == "done", job
        assert job.steps[0] == "rehearse"
        with pytest.raises(AlreadyProtected):
            client.protect("web", "/mnt/mirror", None)
        served.do(lambda: served.world.host.hang(served.world.vm))
        with pytest.raises(SourceMayBeAlive, match="--source-is-dead"):
            client.failover("web", source_is_dead=False, force=False)
        job = client.wait_job(client.failover("web", source_is_dead=True, force=False).uuid)
        assert job.state == "done", job
        assert job.result["fence"] == "kill"
        assert client.protection("web").state == "FAILED_OVER"
        job = client.wait_job(client.unprotect("web", delete_mirror=False).uuid)
        assert job.state == "done", job
        assert client.protections() == []
        assert [job.kind for job in client.jobs()] == ["unprotect", "failover", "protect"]
        adopted = client.adopt([])
        assert adopted.adopted == []


def test_failed_job_tells_its_errors_class(tmp_path: Path) -> None:
    with Served(tmp_path) as served, Client(served.socket) as client:
        served.world.host.faults["rehearse"] = MirrorInconsistent("planted")
        job = client.wait_job(client.protect("web", "/mnt/mirror", None).uuid)
        assert job.state == "failed"
        assert job.error is not None
        assert (job.error.error_class, job.error.exit_status) == ("MirrorInconsistent", 3)


def test_unreachable_daemon_says_how_to_start_it(tmp_path: Path) -> None:
    with (
        Client(tmp_path / "nothing.sock") as client,
        pytest.raises(DaemonUnreachable, match="systemctl start"),
    ):
        client.health()
    with Client(tmp_path / "nothing.sock") as client, pytest.raises(DaemonUnreachable):
        list(client.events())


@pytest.mark.parametrize(
    ("status", "body", "wanted"),
    [
        (404, b'{"class": "UnknownVm", "message": "no", "exit_status": 2}', UnknownVm),
        (400, b'{"class": "Path", "message": "no", "exit_status": 2}', VmirrorError),
        (400, b'{"class": "UsageError", "message": "no", "exit_status": 2, "new": 1}', UsageError),
        (502, b"<html>", Corrupt),
        (200, b'{"ok": 1}', Corrupt),
        (200, b"\xff\xfe", Corrupt),
    ],
)
def test_client_believes_no_answer_that_is_not_ours(
    status: int, body: bytes, wanted: type[VmirrorError]
) -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(status, content=body))
    with Client(transport=transport) as client, pytest.raises(VmirrorError) as caught:
        client.health()
    assert type(caught.value) is wanted


async def test_subscriber_that_does_not_read_is_dropped_and_nobody_waits() -> None:
    events = EventLog(FakeClock())
    with events.subscribed() as lazy, events.subscribed() as keen:
        for number in range(UNREAD_MAX + 1):
            events.add("web", "state", f"{number}")
            assert keen.get_nowait() is not None
        assert lazy.get_nowait() is None, "the end of its stream"
