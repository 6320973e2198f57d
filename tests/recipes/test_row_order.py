import collections
import json
import tracemalloc

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader

from recipes.packed_rows import PackingCollator
from recipes.row_order import PART, RowOrder, set_sampler_epoch
from tests.recipes.processes import run_ranks
from tests.recipes.tiny_run import LENGTH, RandomRows, tiny_trainer


def rows_by_step(sampler, batch, processes, skipped_steps=0, rows_per_step=16):
    """[sorted rows of each optimizer step], through what accelerate deals out to each process."""
    accumulation = rows_per_step // (batch * processes)
    shards = []
    for process in range(processes):
        shard = BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, process)
        loader = DataLoader(range(sampler.rows if hasattr(sampler, "rows") else 100), batch_sampler=shard,
                            collate_fn=list)
        shards.append(list(skip_first_batches(loader, skipped_steps * accumulation)))
    assert len({len(batches) for batches in shards}) == 1
    steps = range(0, len(shards[0]), accumulation)
    return [sorted(row for batches in shards for batch in batches[step:step + accumulation] for row in batch)
            for step in steps]


SPLITS = [(16, 1), (4, 1), (1, 1), (8, 2), (2, 2), (4, 4), (1, 4), (2, 8)]


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("rows", [16, 100, 107, 112])
def test_each_step_has_the_same_rows_on_any_number_of_processes(rows, seed):
    for epoch in (0, 3):
        found = []
        for batch, processes in SPLITS:
            order = RowOrder(rows, 16, seed)
            order.set_epoch(epoch)
            found.append(rows_by_step(order, batch, processes))
        assert all(steps == found[0] for steps in found)
        assert len(found[0]) == rows // 16 and all(len(step) == 16 for step in found[0])
        assert max(collections.Counter(row for step in found[0] for row in step).values()) == 1


def test_the_usual_sampler_differs_at_the_end_of_an_epoch():
    """What RowOrder is for: with 100 rows the last step of 16 is filled up from the start, or is short."""
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    found = [rows_by_step(shuffled, batch, processes) for batch, processes in SPLITS]
    assert all(steps[:6] == found[0][:6] for steps in found)
    assert any(steps != found[0] for steps in found)


def test_resume_in_the_middle_on_another_number_of_processes():
    for epoch in (0, 1):
        order = RowOrder(107, 16, 5)
        order.set_epoch(epoch)
        whole = rows_by_step(order, 16, 1)
        for batch, processes in SPLITS:
            assert rows_by_step(order, batch, processes, skipped_steps=3) == whole[3:]


@pytest.mark.parametrize("world", [1, 2])
def test_a_process_that_skips_batches_knows_the_epoch(world):
    """As Trainer resumes within an epoch: accelerate alone does not tell the sampler of several processes."""
    order = RowOrder(40, 8, 3)
    order.set_epoch(2)
    expected = rows_by_step(order, 8, 1, rows_per_step=8)[2:]
    loader = DataLoader(range(40), batch_sampler=BatchSampler(RowOrder(40, 8, 3), 8 // world, False), collate_fn=list)
    found = []
    for process in range(world):
        share = prepare_data_loader(loader, num_processes=world, process_index=process, put_on_device=False)
        for helped in (False, True):
            if helped:
                set_sampler_epoch(share, 2)
            rest = skip_first_batches(share, 2)
            rest.set_epoch(2)
            batches = list(rest)
            if not helped and world > 1:
                assert batches[0] != list(expected[0]) and not set(batches[0]) <= set(expected[0])
            set_sampler_epoch(share, 0)
        found.append(batches)
    assert [sorted(row for batch in step for row in batch) for step in zip(*found)] == expected


def test_epochs_differ_and_file_order_is_kept():
    order = RowOrder(50, 8, 1)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first and len(order) == len(first) == 48
    assert list(RowOrder(50, 8, None)) == list(range(48))
    with pytest.raises(ValueError, match="7 training rows do not fill an optimizer step of 8 rows"):
        RowOrder(7, 8)


def test_python_ints_are_made_a_part_at_a_time():
    rows = 5 * PART + 3
    tracemalloc.start()
    order = RowOrder(rows, 8, seed=2)
    iterator = iter(order)
    first = next(iterator)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 40 * PART
    whole = torch.randperm(rows, generator=torch.Generator().manual_seed(2 * 1_000_003)).tolist()
    assert [first, *iterator] == whole[:rows // 8 * 8]


class Recorded(RandomRows):
    """Rows that remember, and a curriculum."""

    def __init__(self, curriculum, **options):
        super().__init__(40, **options)
        self.asked, self.curriculum = [], curriculum

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)

    def __getitems__(self, indices):
        self.asked += indices
        return super().__getitems__(indices)


@pytest.mark.parametrize("stride", [None, LENGTH - 1])
def test_rows_made_together_equal_rows_made_singly(stride):
    rows = RandomRows(30, stride=stride)
    for indices in ([0, 5, 3], [len(rows) - 1, 2], list(range(len(rows)))):
        together, singly = rows.__getitems__(indices), [rows[index] for index in indices]
        assert len(together) == len(singly)
        for collator in (PackingCollator(), PackingCollator(same_keys=True)):
            one, two = collator(together), collator(singly)
            assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(together, singly) for name in b)


def steps_of(rows, size=4):
    return [sorted(rows[i:i + size]) for i in range(0, len(rows), size)]


@pytest.mark.parametrize("curriculum, setting, ordered", [(False, "auto", False), (True, "auto", True)])
def test_trainer_resumes_with_the_same_rows_and_keeps_a_curriculum(tmp_path, curriculum, setting, ordered):
    options = dict(max_steps=9, eval_strategy="no", save_steps=4, shuffle_rows=setting)  # 27 rows: six steps an epoch
    whole = Recorded(curriculum)
    tiny_trainer(tmp_path / "whole", train_dataset=whole, **options).train()
    steps = steps_of(whole.asked)[:9]
    length = len(whole) // 4
    assert 4 < length < 9 and steps[0] != steps[length] or ordered
    assert (steps == [list(range(i % length * 4, i % length * 4 + 4)) for i in range(9)]) == ordered

    for batch, accumulation in ((4, 1), (1, 4)):
        out = tmp_path / f"part{batch}"
        first = Recorded(curriculum)
        trainer = tiny_trainer(out, train_dataset=first, **options)
        stop_after(trainer, 4)
        trainer.train()
        rest = Recorded(curriculum)
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        tiny_trainer(out, train_dataset=rest, resume_from_checkpoint="true", **options, **split).train()
        assert steps_of(rest.asked)[:5] == steps[4:]


@pytest.mark.slow
def test_two_processes_take_the_rows_of_one(tmp_path):
    """Real processes over gloo: four steps by two and the rest by one, and the other way about; two epochs."""
    options = dict(max_steps=9, eval_strategy="no", save_steps=4)
    split = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    whole, first, rest = (Recorded(False) for _ in range(3))
    tiny_trainer(tmp_path / "whole", train_dataset=whole, **options, **split).train()
    trainer = tiny_trainer(tmp_path / "theirs", train_dataset=first, **options, **split)
    stop_after(trainer, 4)
    trainer.train()

    def work(rank):
        for name, resume in (("ours", "false"), ("theirs", "true")):
            rows = Recorded(False)
            trainer = tiny_trainer(tmp_path / name, train_dataset=rows, resume_from_checkpoint=resume,
                                   per_device_train_batch_size=1, gradient_accumulation_steps=2, **options)
            if name == "ours":
                stop_after(trainer, 4)
            trainer.train()
            (tmp_path / f"{name}-{rank}.json").write_text(json.dumps(rows.asked))

    run_ranks(2, work, tmp_path / "logs", {"ACCELERATE_USE_CPU": "true"})
    tiny_trainer(tmp_path / "ours", train_dataset=rest, resume_from_checkpoint="true", **options, **split).train()

    def by_two(name, steps):
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        return [sorted(row for rows in ranks for row in rows[2 * step:2 * step + 2]) for step in range(steps)]

    steps = steps_of(whole.asked)[:9]
    assert len(whole) // 4 < 9 and len(set(map(tuple, steps))) == 9
    assert by_two("ours", 4) + steps_of(rest.asked)[:5] == steps
    assert steps_of(first.asked)[:4] + by_two("theirs", 5) == steps


def stop_after(trainer, step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= step

    trainer.add_callback(Stop())
