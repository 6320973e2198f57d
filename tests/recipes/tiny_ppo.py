"""A policy of one-word tokens and a run of PPO small enough for tests."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from recipes.ppo_trainer import PPOConfig, PPOTrainer
from tests.recipes.tiny_run import SIZES

WORDS = [f"t{place}" for place in range(29)]
LENGTH = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small to share out: where cores are busy, threads that wait for each other take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def word_tokenizer():
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{word: place + 3 for place, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def policy(seed=0, **changes):
    set_seed(seed)
    sizes = SIZES | {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes
    config = CONFIG_MAPPING["deepseek_r1"](**sizes)
    config.auto_map = {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(3)  # else every token is as likely as any other
    return model


def words(rows=32, seed=0):
    """Prompts of two to five words."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, size: torch.randint(low, high, (size,), generator=generator).tolist()
    return Dataset.from_dict({"prompt": [" ".join(WORDS[i] for i in draw(0, 29, n)) for n in draw(2, 6, rows)]})


def share_of_t5(completions, **_):
    return [completion.split().count("t5") / LENGTH for completion in completions]


def build(output_dir, reward=share_of_t5, model=None, train_dataset=None, arguments=None, **changes):
    settings = {
        "output_dir": str(output_dir), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "per_device_train_batch_size": 8, "max_completion_length": LENGTH, "num_ppo_epochs": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return PPOTrainer(
        policy() if model is None else model, reward, PPOConfig(**(settings | changes)),
        train_dataset=words() if train_dataset is None else train_dataset, processing_class=word_tokenizer(),
        **(arguments or {}),
    )  # fmt: skip


def rollout_of(trainer, rows=8):
    """The first rollout, scored, as one batch."""
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[place] for place in range(rows)])


def logged(trainer, name):
    """All logged values of a metric, in order."""
    return [row[name] for row in trainer.state.log_history if name in row]
