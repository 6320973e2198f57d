"""Processes that differ, stop, wait or die: named on every rank, in bounded time. Two gloo processes, one start."""

import json
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from recipes.process_checks import (
    ProcessMismatchError,
    _calls,
    _verdict,
    check_processes,
    differences,
    process_facts,
    same_batches,
)
from recipes.process_watch import DEAD_RANK_EXIT, ProcessWatch, record_collectives, set_timeout

WAIT_S, DEAD_S = 3, 1.5  # time-out of a collective, and of a silent rank, in these tests


def outcome(function):
    """(message of the error or None, seconds)."""
    start = time.monotonic()
    try:
        function()
        message = None
    except (ValueError, OSError) as error:
        message = f"{type(error).__name__}: {error}"
    return message, time.monotonic() - start


def compare(rank):
    facts = process_facts(model=nn.Linear(3, 2), data={"train": "abc"}, batches=7)
    found = {"alike": outcome(lambda: check_processes(facts, 20.0))}
    other = dict(facts)
    if rank == 1:
        other |= {"learning_rate": 0.1, "code recipes/grpo.py": "0", "batches per epoch": 6}
        del other["parameter bias"]
    else:
        other |= {"learning_rate": 0.2}
    found["different"] = outcome(lambda: check_processes(other, 20.0))
    if rank == 0:
        found["absent"] = outcome(lambda: check_processes(facts, 0.3))
    else:
        next(_calls)
        time.sleep(0.6)
    for name, lengths in (("equal batches", (3, 3)), ("unequal batches", (3, 5))):
        seen = []
        message, seconds = outcome(lambda: seen.extend(same_batches(range(lengths[rank]), 20.0)))
        found[name] = (message, seconds, seen)
    return found


def stall_and_die(rank, save):
    """Rank 0 waits for rank 1, which reads data too long; then rank 1 is killed while rank 0 waits."""
    short = dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_S))
    watch = ProcessWatch(timeout_s=WAIT_S, dead_rank_s=0.0)

    def stall():
        with watch:
            watch.at("step 12, forward and backward" if rank == 0 else "step 11, its end")
            if rank == 0:
                dist.all_reduce(torch.ones(10), group=short)
            else:
                time.sleep(WAIT_S + 1.5)

    save("stall", outcome(stall))
    dist.barrier()  # of the other group: it is whole

    def die():
        with ProcessWatch(timeout_s=60, dead_rank_s=DEAD_S) as again:
            again.at("step 13")
            time.sleep(0.5)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(10))

    save("lost", outcome(die))
    with ProcessWatch(timeout_s=60, dead_rank_s=DEAD_S):  # as under NCCL: nothing tells the one that waits
        save("waiting since", time.time())
        time.sleep(60)


def worker(folder):
    record_collectives()
    dist.init_process_group("gloo")
    set_timeout(30)
    rank, found = dist.get_rank(), {}

    def save(name, value):
        found[name] = value
        (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))

    for name, value in compare(rank).items():
        save(name, value)
    stall_and_die(rank, save)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    from tests.recipes.test_gradient_compression import start_two

    folder = tmp_path_factory.mktemp("two")
    processes = start_two("tests.recipes.test_process_checks", str(folder))
    texts = [process.communicate(timeout=90)[0] for process in processes]
    ended = time.time()
    results = [folder / f"found-{rank}.json" for rank in (0, 1)]
    assert all(path.is_file() for path in results), "\n".join(texts)
    codes = [process.returncode for process in processes]
    return [json.loads(path.read_text()) for path in results], texts, codes, ended


@pytest.mark.slow
def test_ranks_that_agree_go_on(found):
    assert [results["alike"][0] for results in found[0]] == [None, None]
    assert [results["equal batches"][::2] for results in found[0]] == [[None, [0, 1, 2]]] * 2


@pytest.mark.slow
def test_every_rank_hears_what_differs(found):
    messages = [results["different"][0] for results in found[0]]
    assert messages[0] == messages[1] and messages[0].startswith("ProcessMismatchError: the processes of this run")
    for line in (
        "rank 1 from rank 0", "learning_rate: 0.1 on rank 1, 0.2 on rank 0", 'code recipes/grpo.py: "0" on rank 1',
        "batches per epoch: 6 on rank 1, 7 on rank 0", "parameter bias: \"(not there)\" on rank 1, \"(2,) torch",
    ):  # fmt: skip
        assert line in messages[0]
    assert max(results["different"][1] for results in found[0]) < 10


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(found):
    message, seconds = found[0][0]["absent"]
    assert "rank 1 of 2 did not come to the start of the run within 0.3 s" in message
    assert seconds < 5


@pytest.mark.slow
def test_unequal_numbers_of_batches_are_found_before_the_step(found):
    for results in found[0]:
        message, seconds, seen = results["unequal batches"]
        assert seen == [0, 1, 2] and "batch 4: rank 0 has no further batch, the other ranks have" in message
        assert seconds < 10


@pytest.mark.slow
def test_a_wait_says_which_rank_waits_for_what(found):
    (first, second), texts, _, _ = found
    message, seconds = first["stall"]
    assert message.startswith("ConnectionError: rank 0: a collective failed") and seconds < WAIT_S + 4
    assert "rank 1: at step 11, its end for" in message
    assert second["stall"][0] is None
    assert re.search(r"rank 0: no progress for \d s at step 12, forward and backward; gloo:all_reduce number", texts[0])
    assert "of [[10]] Float, unfinished" in texts[0] and "dist.all_reduce(torch.ones(10), group=short)" in texts[0]
    assert "The ranks:\n  rank 0: at step 12, forward and backward for" in texts[0]
    assert re.search(r"rank 1: no progress for \d s at step 11, its end", texts[1])
    assert "time.sleep(WAIT_S + 1.5)" in texts[1]


@pytest.mark.slow
def test_a_killed_rank_is_named_and_ends_the_other(found):
    (first, _), texts, codes, ended = found
    assert codes == [DEAD_RANK_EXIT, -signal.SIGKILL]
    message, seconds = first["lost"]
    assert "rank 1: gives no sign of life, last at step 13 for" in message and seconds < 10
    assert "rank 0 ends: rank 1 has given no sign of life for" in texts[0]
    assert ended - first["waiting since"] < 10 * DEAD_S


def test_facts_hold_config_code_model_and_versions(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=0.25, hub_token="secret")
    facts = process_facts(args, nn.Linear(3, 2), "abc", 4)
    assert facts["learning_rate"] == 0.25 and facts["data checksum"] == "abc" and facts["batches per epoch"] == 4
    assert facts["parameter weight"] == "(2, 3) torch.float32 trained"
    assert facts["version torch"].startswith(torch.__version__.split("+")[0])
    assert len(facts["code modeling_deepseek_r1/routing.py"]) == 16 and "secret" not in json.dumps(facts)
    assert differences(facts, json.loads(json.dumps(facts))) == []


def test_a_message_joins_ranks_and_ends():
    same, many = ("lr", 1, 2), [(f"field {number}", 1, 2) for number in range(8)]
    assert _verdict({1: (0, []), 2: (0, [])}) is None
    message = _verdict({1: (1, [same]), 2: (0, []), 3: (1, [same])})
    assert "rank 1, 3 from rank 0:\n  lr: 1 on rank 1, 3, 2 on rank 0\n" in message
    assert "further ones, up to 30 on a rank" in _verdict({1: (30, many)})
    with pytest.raises(ProcessMismatchError, match="rank 0 did not come to the start of the run within 0.1 s"):
        check_processes({}, 0.1, store=dist.HashStore(), rank=1, world=2)


if __name__ == "__main__":
    worker(sys.argv[1])
