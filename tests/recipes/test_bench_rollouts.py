"""The benchmark of rollouts at toy size: what it compares is what it says."""

import json

import pytest
from transformers.generation.utils import GenerationMixin

from benchmarks import bench_rollouts
from tests.recipes.tiny_ppo import one_thread  # noqa: F401

SMALL = ["--size", "toy", "--device", "cpu", "--prompts", "2", "--generations", "2", "--micro_batch", "2",
         "--prompt_tokens", "8", "--new_tokens", "12", "--steps", "2"]  # fmt: skip


@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_both_loops_in_one_trainer(trainer, tmp_path, monkeypatch):
    lengths, sample = [], GenerationMixin._sample
    library = lambda self, ids, *args, **kwargs: lengths.append(len(ids)) or sample(self, ids, *args, **kwargs)
    monkeypatch.setattr(GenerationMixin, "_sample", library)
    path = tmp_path / "out.json"
    result = bench_rollouts.main([*SMALL, "--trainer", trainer, "--out", str(path)])
    assert lengths == [4] and json.loads(path.read_text()) == result  # one step of the four by the library's loop
    assert [step["mode"] for step in result["each_step"]] == ["warm-up", "ours", "ours", "library"]
    for step in result["each_step"]:
        assert 4 <= step["tokens"] <= 4 * 12 and 0 < step["generation_s"] < step["step_s"]
    ours = result["each_step"][1:3]
    speeds = sorted(step["tokens"] / step["generation_s"] for step in ours)
    assert speeds[0] <= result["ours"]["generation_tokens_per_second"] <= speeds[1]
    assert result["library_over_ours"]["generation_s"] == pytest.approx(
        result["library"]["generation_s"] / result["ours"]["generation_s"]
    )


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="micro_batch=3 must divide the 4"):
        bench_rollouts.main([*SMALL, "--micro_batch", "3"])
