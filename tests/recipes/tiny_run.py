"""A run small enough for tests: two layers, four experts, random packed documents."""

import numpy
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from recipes.callbacks import ExpertBalanceCallback
from recipes.ema import EMACallback
from recipes.logging_callbacks import RunLogCallback, read_metrics
from recipes.packed_rows import PackedRows, PackingCollator
from recipes.pretrain_config import PretrainConfig
from recipes.pretrain_trainer import PretrainTrainer

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 64,
}  # fmt: skip
LENGTH = 32


class RandomRows(PackedRows):
    """Documents of random length and tokens, from two sources in turn."""

    def __init__(self, rows, seed=0, stride=None):
        generator = numpy.random.default_rng(seed)
        sizes = generator.integers(5, 40, rows)
        self._ids = generator.integers(0, SIZES["vocab_size"], sizes.sum())
        starts = numpy.concatenate([[0], sizes.cumsum()[:-1]])
        sources = (numpy.arange(rows) % 2).astype(numpy.int16)
        super().__init__(len(self._ids), starts, sizes * 3, sources, ["even", "odd"], LENGTH, stride)

    def tokens(self, begin, end):
        return self._ids[begin:end]


def tiny_config(output_dir, **changes):
    defaults = {
        "output_dir": str(output_dir), "model_config": dict(SIZES), "sequence_length": LENGTH, "max_steps": 6,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True,
        "seed": 1, "device_peak_tflops": 0.1,
    }  # fmt: skip
    return PretrainConfig(**(defaults | changes))


def tiny_model(args, **changes):
    set_seed(args.seed)
    config = CONFIG_MAPPING["deepseek_r1"](**(args.model_config | changes))
    config.auto_map = {}
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tiny_trainer(output_dir, model=None, train_dataset=None, eval_dataset=None, **changes):
    """A trainer as recipes/pretrain.py builds it, without tokenizer and samples."""
    args = tiny_config(output_dir, **changes)
    trainer = PretrainTrainer(
        model=tiny_model(args) if model is None else model,
        args=args,
        train_dataset=RandomRows(40) if train_dataset is None else train_dataset,
        eval_dataset=RandomRows(9, seed=1, stride=LENGTH - 1) if eval_dataset is None else eval_dataset,
        data_collator=PackingCollator(),
        callbacks=[ExpertBalanceCallback()],
    )
    trainer.add_callback(RunLogCallback(args.output_dir, show_bar=False))
    if args.ema_decay:
        trainer.add_callback(EMACallback(args.ema_decay))
    return trainer


def losses(output_dir):
    records = read_metrics(f"{output_dir}/metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
