"""One run of the toy problem by TRL 1.12's experimental PPOTrainer. bench_ppo.py starts it in the venv made for it.

    VENV/bin/python benchmarks/trl_ppo_1_12.py FOLDER SEED RESULT.json
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from benchmarks.ppo_toy import Recorder, Toy, prompts


class TokenIds(nn.Module):
    """A trunk whose last hidden state (B, S, 1) is the token ids themselves."""

    def forward(self, input_ids, **unused):
        return SimpleNamespace(hidden_states=[input_ids.unsqueeze(-1)])


class RuleAsModel(nn.Module):
    """A rule with the interface of a reward model, which is all that this trainer takes: trunk, then `score`."""

    base_model_prefix = "trunk"

    def __init__(self, toy, recorder):
        super().__init__()
        self.toy, self.recorder, self.trunk = toy, recorder, TokenIds()

    def score(self, hidden):
        """(B, S, 1) ids -> (B, S, 1) the completion's reward at every position."""
        ids = hidden.squeeze(-1)
        rewards = self.recorder(ids[:, : self.toy.prompt_length], ids[:, self.toy.prompt_length :])
        return rewards[:, None, None].expand(hidden.shape)


def main(folder, seed, result):
    toy, seed, folder = Toy.read(folder), int(seed), Path(folder)
    args = PPOConfig(
        output_dir=str(folder / "trl"), seed=seed, total_episodes=toy.updates * toy.batch, response_length=toy.length,
        # Not split by accumulation: with gradient_accumulation_steps=G this trainer steps only at every G-th minibatch.
        per_device_train_batch_size=toy.batch, num_mini_batches=toy.minibatches, num_ppo_epochs=toy.epochs,
        local_rollout_forward_batch_size=toy.batch, learning_rate=toy.learning_rate, lr_scheduler_type="constant",
        temperature=toy.temperature, kl_coef=toy.kl_coef, gamma=toy.gamma, lam=toy.lam, vf_coef=toy.vf_coef,
        cliprange=toy.cliprange, cliprange_value=toy.cliprange_value, num_sample_generations=0,
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    recorder = Recorder(toy)
    rows = Dataset.from_dict({"input_ids": prompts(toy, seed).tolist()})
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=None, reward_model=RuleAsModel(toy, recorder), train_dataset=rows, eval_dataset=rows.select([0]),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder / "value", num_labels=1),
    )  # fmt: skip
    Path(result).write_text(json.dumps(recorder.train(trainer)))


if __name__ == "__main__":
    main(*sys.argv[1:])
