"""When Python's garbage is collected in a run."""

import gc
import os

import pytest

from recipes import garbage
from recipes.run_settings import RunSettings


class Cycle:
    """Garbage that only a collection frees, and which says so."""

    freed = 0

    def __init__(self):
        self.itself = self

    def __del__(self):
        Cycle.freed += 1


@pytest.fixture(autouse=True)
def count():
    gc.collect()
    Cycle.freed = 0
    assert gc.isenabled()
    yield
    assert gc.isenabled()


def test_only_at_its_steps():
    with garbage.collecting_at_steps():
        assert not gc.isenabled()
        for step in range(1, 8):
            Cycle()
            objects = [[] for _ in range(5000)]  # more than what starts a collection
            garbage.collect_at_step(step, 3)
            assert Cycle.freed == step // 3 * 3
        assert objects


def test_old_garbage_too_now_and_then():
    with garbage.collecting_at_steps():
        old = Cycle()
        gc.collect()  # among the old ones
        del old
        for step in range(1, 2 * garbage.FULL + 1):
            garbage.collect_at_step(step, 2)
            assert Cycle.freed == (step == 2 * garbage.FULL)


def test_as_it_was_after_a_failure_and_where_it_is_off():
    with pytest.raises(KeyError), garbage.collecting_at_steps():
        raise KeyError
    assert gc.isenabled()
    with garbage.collecting_at_steps(enabled=False):
        assert gc.isenabled()
    gc.disable()
    try:
        with garbage.collecting_at_steps():
            Cycle()
            garbage.collect_at_step(1, 1)
            assert Cycle.freed == 0
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_forks_collect_as_usual():
    with garbage.collecting_at_steps():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(child, 0)[1] == 0 and not gc.isenabled()


def test_negative_steps_are_refused():
    settings = RunSettings.__new__(RunSettings)
    settings.weights_dtype, settings.gc_steps = "float32", -1
    with pytest.raises(ValueError, match="gc_steps=-1 must be 0"):
        settings.__post_init__()


def test_a_trainer_holds_and_lets_go(monkeypatch):
    from recipes.recipe_trainer import RecipeTrainerMixin

    seen = []

    def train(self, *args, **kwargs):
        seen.append((gc.isenabled(), args, kwargs))
        return "done"

    monkeypatch.setattr("recipes.checkpoints.CheckpointMixin.train", train)
    trainer = RecipeTrainerMixin.__new__(RecipeTrainerMixin)
    for every in (50, 0):
        trainer.args = type("Args", (), {"gc_steps": every})
        assert trainer.train(True, trial=None) == "done"
    assert seen == [(False, (True,), {"trial": None}), (True, (True,), {"trial": None})]
