"""Hangs have names: time-outs of collectives, signs of life, and which rank waits for what.

`ProcessWatch` is a thread beside the training loop. Every few seconds it writes into the run's key-value store what
its process does (set by `at`), since when, and which collective it waits in, read from torch's flight recorder. When
nothing moved for most of the time-out, every rank says where it is and rank 0 prints all of them. A rank whose
signs stop is named, and the others end. The backend itself ends collectives that exceed the time-out: gloo with an
error, NCCL by its watchdog, which also dumps the flight recorder.
"""

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

DEAD_RANK_EXIT = 75  # EX_TEMPFAIL: resume it
REPORT_AFTER = 0.8  # of the time-out: before the backend ends the process
RECORDED = 2000  # collectives that the flight recorder keeps


def record_collectives(folder=None):
    """Switches torch's flight recorder on, with a dump at NCCL's time-out. Before the process group is made.

    The dump is `folder`/rank_N (default: torch's place, named in its log), read by torch.distributed.flight_recorder.
    """
    wanted = {"TORCH_FR_BUFFER_SIZE": str(RECORDED), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12):
        wanted["TORCH_NCCL_TRACE_BUFFER_SIZE"] = str(RECORDED)  # the name of then; later versions warn of it
    if folder is not None:
        wanted["TORCH_FR_DUMP_TEMP_FILE"] = os.path.join(folder, "rank_")
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def set_timeout(seconds):
    """The time-out of the default process group, on whatever backend; the library passes its own to NCCL only."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    timeout = timedelta(seconds=seconds)
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:  # before torch 2.14
        dist.distributed_c10d._set_pg_timeout(timeout)


def pending_collective():
    """What this process's flight recorder says: "gloo:all_reduce number 7 of [[1000]] Float, unfinished", or None.

    The oldest unfinished collective, else the newest one that ended.
    """
    entries = []
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # of gloo, of NCCL
        read = getattr(torch._C._distributed_c10d, dump, None)
        entries += json.loads(read()).get("entries", []) if read is not None else []
    entries.sort(key=lambda entry: entry["time_created_ns"])
    open_ones = [e for e in entries if not e.get("retired") and e.get("state") != "completed"]
    if not entries:
        return None
    entry, state = (open_ones[0], "unfinished") if open_ones else (entries[-1], "ended")
    number = entry.get("collective_seq_id") or entry.get("p2p_seq_id")
    kinds = " ".join(entry.get("input_dtypes", []))
    return f"{entry['profiling_name']} number {number} of {entry.get('input_sizes')} {kinds}, {state}"


class ProcessWatch:
    """Signs of life and places of all ranks, through the process group's store; see the head of this file.

    `with watch:` around training: starts the thread, tells the others of an error that ends this rank, and turns a
    failed collective into a ConnectionError that names the ranks. `at` is called where the program gets to (cheap).
    timeout_s: that of the process group, as `set_timeout` was given. dead_rank_s: 0 never ends this process.
    A process that holds Python's lock for longer than dead_rank_s, or is stopped, counts as dead.
    """

    def __init__(self, timeout_s=600, dead_rank_s=45.0):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.timeout_s, self.dead_rank_s = timeout_s, dead_rank_s
        self.beat_s = min(5.0, timeout_s / 10, dead_rank_s / 5 if dead_rank_s else 5.0)
        # A client of its own: a call of the training thread that blocks would hold the other's lock.
        self.store = dist.PrefixStore("process_watch", dist.distributed_c10d._get_default_store().clone())
        self._place, self._beats, self._told = ("start", time.monotonic()), 0, None
        self._seen = {}  # rank -> (its beats, when they last changed here)
        self._stop, self._thread, self._ending, self._began = threading.Event(), None, None, time.monotonic()

    def at(self, place):
        """This process got to `place`; the time without progress starts anew."""
        self._place = (place, time.monotonic())

    # -- around training

    def __enter__(self):
        self._main, self._began = threading.get_ident(), time.monotonic()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="process watch", daemon=True)
        self._thread.start()
        atexit.register(self.stop)
        return self

    def __exit__(self, kind, error, trace):
        if error is None or isinstance(error, SystemExit) and not error.code:
            self.stop()
            return
        lost = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and _is_lost(str(error))
        text = f"{kind.__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        found = self.describe() if lost else None
        self.stop(failed=text)
        if lost:
            raise ConnectionError(f"rank {self.rank}: a collective failed ({text}). The ranks:\n{found}") from error

    def stop(self, failed=None):
        """Ends the thread; the others know whether this rank is through or `failed`."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(timeout=5)
        self._thread = None
        with contextlib.suppress(RuntimeError):  # the store may be gone: there is nobody to tell
            self._publish(over=failed is None, failed=failed)
        atexit.unregister(self.stop)

    # -- what is in the store

    def _publish(self, over=False, failed=None):
        place, since = self._place
        idle = time.monotonic() - since
        self._beats += 1
        state = {"beats": self._beats, "place": place, "idle": round(idle, 1), "over": over, "failed": failed}
        if idle > 2 * self.beat_s:
            state["collective"] = pending_collective()
        self.store.set(str(self.rank), json.dumps(state))

    def _read(self, ranks):
        """{rank: state} of those that have written one."""
        there = [rank for rank in ranks if self.store.check([str(rank)])]
        texts = self.store.multi_get([str(rank) for rank in there]) if there else []
        return {rank: json.loads(text) for rank, text in zip(there, texts)}

    def _dead(self, ranks):
        """{rank: reason} of the `ranks` that failed or gave no sign for dead_rank_s."""
        states, now, dead = self._read(ranks), time.monotonic(), {}
        for rank in ranks:
            state = states.get(rank)
            beats = state["beats"] if state else 0
            if rank not in self._seen or self._seen[rank][0] != beats:
                self._seen[rank] = (beats, now)
            silent = now - self._seen[rank][1]
            limit = self.dead_rank_s if state else max(self.dead_rank_s, self.timeout_s)
            if state and state["failed"]:
                dead[rank] = f"failed ({state['failed']})"
            elif self.dead_rank_s and silent > limit and not (state and state["over"]):
                dead[rank] = f"has given no sign of life for {silent:.0f} s; last {_where(state)}"
        return dead

    def describe(self):
        """One line a rank; takes a few seconds, so that a rank that is gone shows."""
        try:
            before = self._read(range(self.world))
            time.sleep(2.5 * self.beat_s)
            after = self._read(range(self.world))
        except RuntimeError as error:
            return f"  unknown, their store is gone: {str(error).splitlines()[0]}"
        lines = []
        for rank in range(self.world):
            state = after.get(rank)
            gone = state and state["beats"] == before.get(rank, {}).get("beats") and not state["over"]
            sign = "gives no sign of life, last " if gone and rank != self.rank and not state["failed"] else ""
            lines.append(f"  rank {rank}: {sign}{_where(state)}")
        return "\n".join(lines)

    # -- the thread

    def _run(self):
        gone_since = None
        while not self._stop.wait(self.beat_s):
            try:
                self._beat()
                gone_since = None
            except RuntimeError as error:  # the store's server ended, perhaps because the run is over
                gone_since = gone_since or time.monotonic()
                if self.dead_rank_s and time.monotonic() - gone_since > self.dead_rank_s:
                    self._end(f"the process that keeps the run's store is gone: {str(error).splitlines()[0]}")

    def _beat(self):
        self._publish()
        dead = self._dead([rank for rank in range(self.world) if rank != self.rank] if self.rank == 0 else [0])
        if self.rank == 0 and dead and not self.store.check(["verdict"]):
            self.store.set("verdict", "; ".join(f"rank {rank} {reason}" for rank, reason in dead.items()))
        verdict = f"rank 0 {dead[0]}" if 0 in dead else None
        if self.dead_rank_s and (verdict or self.store.check(["verdict"])):
            verdict = verdict or self.store.get("verdict").decode()
            self._ending = self._ending or time.monotonic()  # a moment for an error of one's own to come up
            if time.monotonic() - self._ending >= 2 * self.beat_s:
                self._end(verdict)
        self._report()

    def _report(self):
        """Once for each place that takes most of the time-out: where this rank is; on rank 0 where all are."""
        place, since = self._place
        idle = time.monotonic() - since
        if idle < REPORT_AFTER * self.timeout_s or self._told == since:
            return
        self._told = since
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)[-5:]) if frame is not None else ""
        _say(f"rank {self.rank}: no progress for {idle:.0f} s at {place}; {pending_collective() or 'no collective'}\n"
             f"{stack}")  # fmt: skip
        if self.rank == 0:
            time.sleep(self.beat_s)  # the others write their collectives
            states = self._read(range(self.world)).items()
            lines = "\n".join(f"  rank {rank}: {_where(state)}" for rank, state in states)
            _say(f"no progress for {idle:.0f} s, collective_timeout_s={self.timeout_s}. The ranks:\n{lines}")

    def _end(self, reason):
        _say(f"rank {self.rank} ends: {reason}. Resume with --resume_from_checkpoint true")
        sys.stdout.flush()
        os._exit(DEAD_RANK_EXIT)  # the training thread waits inside a collective and hears no exception


def _where(state):
    if state is None:
        return "has not started"
    if state["over"] or state["failed"]:
        return f"failed ({state['failed']})" if state["failed"] else "is through"
    collective = f"; {state['collective']}" if state.get("collective") else ""
    return f"at {state['place']} for {state['idle']:.0f} s{collective}"


def _is_lost(text):
    return any(word in text for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe"))


def _say(text):
    print(text, file=sys.stderr, flush=True)


class WatchCallback(TrainerCallback):
    """Tells a `ProcessWatch` where a Trainer is."""

    def __init__(self, watch):
        self.watch = watch

    def on_step_begin(self, args, state, control, **kwargs):
        self.watch.at(f"step {state.global_step + 1}, forward and backward")

    def on_substep_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.watch.at(f"step {state.global_step + 1}, after the update")

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.at(f"step {state.global_step}, its end: log, evaluate, save, next batch")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.watch.at(f"step {state.global_step}, evaluation")

    def on_evaluate(self, args, state, control, **kwargs):
        self.watch.at(f"step {state.global_step}, after evaluation")

    def on_save(self, args, state, control, **kwargs):
        self.watch.at(f"step {state.global_step}, after saving")

    def on_train_end(self, args, state, control, **kwargs):
        self.watch.at("after training")
