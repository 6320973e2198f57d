"""Pushes over a network that fails, beside other pushes, and killed at every request."""

import os

import httpx2
import pytest

from recipes import hub_commit
from recipes.hub_commit import UploadError, commit_files, hub_api
from recipes.hub_files import select_files
from tests.hub.conftest import NEW, OLD, content


@pytest.fixture(scope="module")
def requests(hub):
    """How many requests the push of NEW over OLD makes."""
    commit_files(hub_api(), "user/count", OLD, "old")
    hub.requests.clear()
    commit_files(hub_api(), "user/count", NEW, "new")
    assert content(hub, "user/count") == NEW
    return len(hub.requests)


@pytest.mark.parametrize("fault", ["drop", "lose", 500, 503])
def test_network_failures_are_retried(hub, requests, fault):
    for number in range(requests):
        name, said = f"user/fails-{fault}-{number}", []
        commit_files(hub_api(), name, OLD, "old")
        hub.requests.clear()
        hub.faults[number] = fault
        commit_files(hub_api(), name, NEW, "new", say=said.append)
        assert content(hub, name) == NEW and not hub.faults
        assert [c["message"] for c in hub.repos[name].commits.values()] == ["initial commit", "old", "new"]


def test_a_network_that_stays_away(hub, requests):
    commit_files(hub_api(), "user/away", OLD, "old")
    hub.requests.clear()
    hub.faults.update(dict.fromkeys(range(3, 200), "drop"))
    try:
        with pytest.raises(UploadError, match="cannot be reached, after 5 attempts"):
            commit_files(hub_api(), "user/away", NEW, "new", say=lambda text: None)
    finally:
        hub.faults.clear()
    assert content(hub, "user/away") == OLD


def test_a_push_beside_another_one(hub, monkeypatch):
    """Somebody's commit between our look at the branch and ours is not lost."""
    commit_files(hub_api(), "user/both", OLD, "old")
    stale = hub_commit._stale
    monkeypatch.setattr(hub_commit, "_stale", lambda *a: hub.repos["user/both"].add(
        "main", "theirs", {"notes.txt": (b"x", False)}) and stale(*a))  # fmt: skip
    with pytest.raises(UploadError, match="somebody else has pushed"):
        commit_files(hub_api(), "user/both", NEW, "new")
    assert content(hub, "user/both") == {"notes.txt": b"x"}


def killed_push(name, number, when):
    """Pushes NEW in a process that ends at once before or after its `number`-th request; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        send, count = httpx2.Client.send, [0]

        def counted(self, *args, **kwargs):
            mine, count[0] = count[0], count[0] + 1
            if mine == number and when == "before":
                os._exit(9)
            response = send(self, *args, **kwargs)
            if mine == number:
                os._exit(9)
            return response

        httpx2.Client.send = counted
        commit_files(hub_api(), name, NEW, "new")
    finally:
        os._exit(0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_request(hub, requests, when):
    killed = 0
    for number in range(requests):
        name = f"user/killed-{when}-{number}"
        commit_files(hub_api(), name, OLD, "old")
        hub.sent.clear()
        killed += killed_push(name, number, when) == 9
        assert content(hub, name) in (OLD, NEW), number
        commit_files(hub_api(), name, NEW, "new")
        assert content(hub, name) == NEW
        assert [c["message"] for c in hub.repos[name].commits.values()] == ["initial commit", "old", "new"]
        assert len(hub.sent) == 2 and set(hub.sent.values()) == {1}, (number, dict(hub.sent))
    assert killed >= requests - 1


def test_select_files_leaves_training_state(stages):
    kept, left = select_files(stages / "pretrain")
    assert left["checkpoint-4/"] == "training state" and "pickle" in left["training_args.bin"]
    assert "model.safetensors.index.json" in kept and not any(name.endswith((".bin", ".pt")) for name in kept)
