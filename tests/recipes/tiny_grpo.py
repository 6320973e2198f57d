"""A run of GRPO small enough for tests, on the policy of tiny_ppo.py."""

from recipes.grpo_trainer import R1GRPOConfig, R1GRPOTrainer
from tests.recipes.tiny_ppo import LENGTH, policy, share_of_t5, word_tokenizer, words


def build(output_dir, reward=share_of_t5, model=None, train_dataset=None, arguments=None, **changes):
    settings = {
        "output_dir": str(output_dir), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": LENGTH, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return R1GRPOTrainer(
        policy() if model is None else model, reward, R1GRPOConfig(**(settings | changes)),
        train_dataset=words() if train_dataset is None else train_dataset, processing_class=word_tokenizer(),
        **(arguments or {}),
    )  # fmt: skip
