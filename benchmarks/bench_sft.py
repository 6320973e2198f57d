"""A fine-tuning step three ways, in turn in one process: by TRL's own SFTTrainer, by ours, and ours on every token.

    python benchmarks/bench_sft.py --model_name_or_path runs/quickstart/pretrain --dataset_name runs/quickstart/data_sft

Forward and backward of the same packed rows (sft_tiny.yaml's sizes); medians over the steps. TRL's step trains no MTP
and knows no label smoothing; ours has MTP. "every token": what the head costs where ignored tokens are not left out.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from trl import SFTTrainer

import modeling_deepseek_r1.losses as losses
from recipes import sft
from recipes.model_loading import load_chat_tokenizer
from recipes.pretrain_config import parse_config
from recipes.sft_config import SFTRecipeConfig


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    own, rest = parser.parse_known_args(argv)
    args = parse_config(SFTRecipeConfig, ["--config", str(ROOT / "recipes" / "configs" / "sft_tiny.yaml"),
                                          "--output_dir", "runs/bench_sft", "--disable_tqdm", "true", *rest])
    tokenizer = load_chat_tokenizer(args)
    trainer = sft.build_trainer(args, sft.build_model(args, tokenizer), tokenizer)
    model, batches = trainer.model.train(), iter(trainer.get_train_dataloader())
    items = torch.tensor(1000)
    share = losses.KEPT_SHARE

    def step(kind, batch):
        losses.KEPT_SHARE = 0.0 if kind == "ours, every token" else share
        compute = SFTTrainer.compute_loss if kind == "TRL's fused head" else type(trainer).compute_loss
        compute(trainer, model, dict(batch), num_items_in_batch=items).backward()
        model.zero_grad()

    seconds = {kind: [] for kind in ("TRL's fused head", "ours, every token", "ours")}
    for number in range(own.steps + 2):
        batch = trainer._prepare_inputs(next(batches))
        for kind, found in seconds.items():
            start = time.perf_counter()
            step(kind, batch)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:  # the first two warm up
                found.append(time.perf_counter() - start)
    slowest = statistics.median(seconds["TRL's fused head"])
    print(f"{tuple(batch['input_ids'].shape)} tokens a step on {model.device.type}, median of {own.steps}:")
    for kind, found in seconds.items():
        print(f"{kind:18}  {1000 * statistics.median(found):6.0f} ms   {statistics.median(found) / slowest:.2f}")


if __name__ == "__main__":
    main()
