"""Two nodes, as network namespaces of this machine, launched as recipes/launch/several_nodes.yaml says; on CPUs.

Each has its own network: the launchers and the processes talk over a cable (veth) as between machines. Both bear this
machine's name, which usually is a loopback address: gloo has to be told the interface, as on many real nodes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from recipes.process_group import address_towards, choose_interface, interface_of
from tests.recipes.tiny_run import losses

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
TRAIN = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from transformers import TrainerCallback
from recipes.process_start import watched
from tests.recipes.tiny_run import tiny_trainer

class Pause(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep({pause})

world = int(os.environ.get("WORLD_SIZE", 1))
trainer = tiny_trainer({folder!r}, per_device_train_batch_size=4 // world, gradient_accumulation_steps=1,
                       max_steps={steps}, eval_strategy="no", save_steps=2, async_save=True, dead_rank_s=20)
trainer.add_callback(Pause())
with watched(trainer):
    trainer.train()
    trainer.save_model()
with open({folder!r} + f".rank_{{trainer.args.process_index}}", "w") as file:
    json.dump([world, os.environ.get("LOCAL_RANK"), trainer.shards_model()], file)
"""


def script(folder, steps=4, pause=0):
    path = folder.with_suffix(".py")
    path.write_text(TRAIN.format(root=str(ROOT), folder=str(folder), steps=steps, pause=pause))
    return str(path)


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """The names of two connected namespaces."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (iproute2) on this machine")
    names = [f"r1_{os.getpid()}_{rank}" for rank in (0, 1)]
    cable = [f"v{os.getpid()}_{rank}"[:15] for rank in (0, 1)]
    try:
        steps = [("netns", "add", name) for name in names]
        steps.append(("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1],
                      "netns", names[1]))  # fmt: skip
        for name, device, address in zip(names, cable, ADDRESSES):
            steps += [("-n", name, "addr", "add", f"{address}/24", "dev", device),
                      ("-n", name, "link", "set", "lo", "up"), ("-n", name, "link", "set", device, "up")]  # fmt: skip
        for words in steps:
            if (run := ip(*words)).returncode:
                pytest.skip(f"no network namespaces on this machine: ip {' '.join(words)}: {run.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def launch(names, rank, processes, path, *options):
    """The command of the launch file's head, on node `rank`."""
    command = ["accelerate.commands.launch", "--config_file", str(ROOT / "recipes/launch/several_nodes.yaml"),
               "--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0], "--num_processes", str(processes)]
    log = open(f"{path}.node_{rank}.log", "w")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    return subprocess.Popen(
        ["ip", "netns", "exec", names[rank], sys.executable, "-m", *command, *options, path], stdout=log,
        stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
    )  # fmt: skip


def log_of(path, rank):
    return Path(f"{path}.node_{rank}.log").read_text()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    subprocess.run([sys.executable, script(folder)], check=True, cwd=ROOT, timeout=120,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_two_nodes_equal_one_process(nodes, one, tmp_path, processes):
    """One or two processes a node, sharded by FSDP2 over all."""
    folder = tmp_path / "run"
    path = script(folder)
    launchers = [launch(nodes, rank, processes, path) for rank in (0, 1)]
    codes = [launcher.wait(timeout=200) for launcher in launchers]
    assert codes == [0, 0], log_of(path, 0)[-3000:] + log_of(path, 1)[-3000:]
    facts = [json.loads(Path(f"{folder}.rank_{rank}").read_text()) for rank in range(processes)]
    assert facts == [[processes, str(rank % (processes // 2)), True] for rank in range(processes)]
    assert list(losses(folder).values()) == pytest.approx(list(losses(one).values()), rel=1e-6)
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, one))
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in weights) < 5e-5
    written = {path.name for path in (folder / "checkpoint-4" / "shards").glob("*.distcp")}
    assert written == {f"__{rank}_0.distcp" for rank in range(processes)}


@pytest.mark.slow
@pytest.mark.parametrize("present", [0, 1])
def test_a_missing_node_is_an_error_in_bounded_time(nodes, tmp_path, present):
    path, start = script(tmp_path / "run"), time.monotonic()
    launcher = launch(nodes, present, 2, path, "--rdzv_conf", "timeout=10")
    assert launcher.wait(timeout=120) == 1
    assert time.monotonic() - start < 100
    of_first, of_second = "waiting for clients. 1/2 clients joined", f"timed out .* connect to .{ADDRESSES[0]}, 29500"
    assert re.search((of_first, of_second)[present], log_of(path, present))


@pytest.mark.slow
def test_a_killed_rank_ends_both_nodes_with_the_reason(nodes, tmp_path):
    folder = tmp_path / "run"
    path = script(folder, steps=400, pause=0.3)
    launchers = [launch(nodes, rank, 2, path) for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-2" / "COMPLETE.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [child for child in psutil.Process(launchers[1].pid).children(recursive=True)
             if child.is_running() and child.environ().get("RANK") == "1"]  # fmt: skip
    ranks[-1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    codes = [launcher.wait(timeout=120) for launcher in launchers]
    assert time.monotonic() - start < 60 and codes == [1, 1]
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", log_of(path, 1)), log_of(path, 1)[-2000:]
    assert re.search("rank 0: a collective failed|rank 1 has given no sign of life", log_of(path, 0)), log_of(path, 0)


# ---------------------------------------------------------------- which interface


def test_gloo_is_told_an_interface_only_where_the_own_name_is_loopback(monkeypatch):
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None
    assert address_towards("127.0.0.1", 29500) == "127.0.0.1"
    run = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
    for name, value in run.items():
        monkeypatch.setenv(name, value)
    choose_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "eth0"
    found = {}
    loopback = "127.0.1.1"
    for name, address, local in (("own", "198.51.100.7", "2"), ("one node", loopback, "4"), ("two", loopback, "2")):
        monkeypatch.setattr("socket.gethostbyname", lambda _: address)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        choose_interface()
        found[name] = os.environ.get("GLOO_SOCKET_IFNAME")
    assert found == {"own": None, "one node": None, "two": "lo"}
