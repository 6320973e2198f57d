"""Expert load with and without the routing bias, on a learnable stream.

    python benchmarks/bench_balance.py [--seeds 3] [--steps 600] [--speeds 0 0.001 0.01]

Prints, per speed and seed: largest over mean load of both mixture layers summed over the last 50 steps, the worst
single batch of those steps, and the mean loss of the last 20 steps. Runs on a CPU, about 20 s a run of 600 steps.
"""

import argparse
import json
import statistics

import torch

from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM

VOCAB_SIZE = 256


def zipf_markov_stream(steps, batch_size=8, length=64, seed=0):
    """Yields `steps` batches (batch_size, length) int64: every token has four successors, drawn with equal chance; with
    probability 0.1 a Zipf-distributed token comes instead. The language is fixed, `seed` draws the text."""
    language = torch.Generator().manual_seed(1234)
    successors = torch.randint(VOCAB_SIZE, (VOCAB_SIZE, 4), generator=language)
    zipf = 1.0 / torch.arange(1, VOCAB_SIZE + 1.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.multinomial(zipf, batch_size, replacement=True, generator=generator)
        columns = [tokens]
        for _ in range(length - 1):
            choice = torch.randint(4, (batch_size,), generator=generator)
            noise = torch.multinomial(zipf, batch_size, replacement=True, generator=generator)
            is_noise = torch.rand(batch_size, generator=generator) < 0.1
            tokens = torch.where(is_noise, noise, successors[tokens, choice])
            columns.append(tokens)
        yield torch.stack(columns, dim=1)


def balance_config(speed):
    """Three layers, two of them mixtures of 16 experts, top-4; the sequence-wise loss at its default."""
    return DeepSeekR1Config(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, n_shared_experts=1, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, max_position_embeddings=64, num_nextn_predict_layers=0, bias_update_speed=speed,
    )


def run(speed, seed, steps, lr=3e-3):
    """-> {"layers": [{"summed": max / mean over the last 50 steps, "worst": of single batches}], "loss": nats}."""
    torch.manual_seed(seed)
    model = DeepSeekR1ForCausalLM(balance_config(speed)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loads, losses = [], []
    for tokens in zipf_markov_stream(steps, seed=seed):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(torch.stack(list(model.update_expert_bias().values())))
        losses.append(loss.item())
    last = torch.stack(loads[-50:]).float()                                # (50, layers, E)
    summed = last.sum(0)
    return {
        "speed": speed, "seed": seed, "steps": steps, "loss": statistics.mean(losses[-20:]),
        "layers": [
            {"summed": float(summed[i].max() / summed[i].mean()),
             "worst": float((last[:, i].max(-1).values / last[:, i].mean(-1)).max())}
            for i in range(summed.shape[0])
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--speeds", type=float, nargs="+", default=[0.0, 0.001, 0.01])
    args = parser.parse_args()
    for speed in args.speeds:
        for seed in range(args.seeds):
            print(json.dumps(run(speed, seed, args.steps)), flush=True)


if __name__ == "__main__":
    main()
