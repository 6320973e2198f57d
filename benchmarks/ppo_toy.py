"""The toy problem of bench_ppo.py, for both sides: no TRL in it, so that it runs under either version.

A prompt is a few random tokens; a completion should go on counting from its last one: token t + 1 (mod `cycle`) after
token t. The reward is the share of completion tokens that do, given once, at the end. A token decides two of these
links, its own and the next one, so the value function has something to learn. Chance is 1 / cycle.
"""

import gc
import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast


@dataclass
class Toy:
    """Sizes and PPO settings, the same on both sides (a completion has always `length` tokens: there is no end)."""

    policy: str = "llama"  # or deepseek_r1
    vocabulary: int = 32
    cycle: int = 8
    prompt_length: int = 4
    length: int = 16
    updates: int = 60
    batch: int = 64  # episodes of one rollout
    minibatches: int = 2
    epochs: int = 4
    learning_rate: float = 1e-3
    temperature: float = 1.0
    kl_coef: float = 0.005
    gamma: float = 1.0
    lam: float = 0.95
    vf_coef: float = 0.1
    cliprange: float = 0.2
    cliprange_value: float = 0.2

    @classmethod
    def read(cls, folder):
        return cls(**json.loads((Path(folder) / "toy.json").read_text()))


def add_toy_arguments(parser):
    """Every field of Toy as an option."""
    for field in fields(Toy):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)


def build_folders(folder, toy, seed):
    """Writes settings, tokenizer, policy and a one-label classifier with the policy's trunk (TRL's value model)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.json").write_text(json.dumps(asdict(toy)))
    torch.manual_seed(seed)
    policy = AutoModelForCausalLM.from_config(policy_config(toy), dtype=torch.float32)
    policy.save_pretrained(folder / "policy")
    tokenizer(toy).save_pretrained(folder / "policy")
    value = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    torch.nn.init.zeros_(value.score.weight)  # as the head that ours starts with
    value.save_pretrained(folder / "value")
    tokenizer(toy).save_pretrained(folder / "value")


def policy_config(toy):
    sizes = {
        "vocab_size": toy.vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if toy.policy == "llama":
        return LlamaConfig(**sizes, num_key_value_heads=4)
    if toy.policy != "deepseek_r1":
        raise ValueError(f"policy={toy.policy!r} is not known; use llama or deepseek_r1")
    from modeling_deepseek_r1 import DeepSeekR1Config

    return DeepSeekR1Config(
        **sizes, moe_intermediate_size=32, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, num_nextn_predict_layers=0,
    )  # fmt: skip


def tokenizer(toy):
    """One word a token; padding and end lie outside of the policy's vocabulary: it can sample neither."""
    words = {f"t{number}": number for number in range(toy.vocabulary)}
    words |= {"<pad>": toy.vocabulary, "<end>": toy.vocabulary + 1, "<unknown>": toy.vocabulary + 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", padding_side="left"
    )


def prompts(toy, seed):
    """(updates * batch, prompt_length) token ids, one row an episode."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(toy.vocabulary, (toy.updates * toy.batch, toy.prompt_length), generator=generator)


def rule(toy, prompt_ids, completion_ids):
    """(B, P) and (B, T) token ids -> (B,) share of completion tokens that count on from the token before."""
    before = torch.cat([prompt_ids[:, -1:], completion_ids[:, :-1]], dim=1)
    return (completion_ids % toy.cycle == (before + 1) % toy.cycle).float().mean(1)


class Recorder:
    """Mean reward of every rollout, and the seconds of the whole training loop, measured alike on both sides.

    On the wall, of this process's CPU time (which other work on the machine changes less), and of the latter those in
    Python's garbage collector.
    """

    def __init__(self, toy):
        self.toy, self.rewards, self.gc_seconds, self._gc_start = toy, [], 0.0, 0.0

    def __call__(self, prompt_ids, completion_ids):
        rewards = rule(self.toy, prompt_ids, completion_ids)
        self.rewards.append(rewards.mean().item())
        return rewards

    def _time_gc(self, phase, info):
        now = time.process_time()
        if phase == "stop":
            self.gc_seconds += now - self._gc_start
        self._gc_start = now

    def train(self, trainer):
        gc.callbacks.append(self._time_gc)
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train()
        return {
            "rewards": self.rewards, "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start, "gc_seconds": self.gc_seconds,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
