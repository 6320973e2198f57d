"""Training speed beside transformers' own DeepseekV3, one process a variant.

    python benchmarks/bench_train.py --device cuda      reference config, 16,384 tokens a step (one H100)
    python benchmarks/bench_train.py --device cpu       the `tiny` config without MTP, ours and theirs in turn

On CUDA our model trains through `recipes/pretrain.py` (HF Trainer) and in a bare loop; the library's in a bare loop
with its best settings (grouped_mm experts, sdpa). MFU by the formula of `recipes/sizing.py`, against 989 TFLOP/s on an
H100. Tokens are random, routing is real. Prints one JSON line a variant and a table; --output also writes the lines to
a file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# 1.813 B parameters, 0.366 B active.
REFERENCE = dict(
    vocab_size=65536, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=704, num_hidden_layers=12,
    num_attention_heads=16, n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6, kv_lora_rank=512,
    q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_group=1, topk_group=1,
    first_k_dense_replace=1, routed_scaling_factor=2.5, max_position_embeddings=32768,
    pad_token_id=0, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
BATCH, LENGTH = 4, 4096
VARIANTS = ("library-fp32", "library-bf16", "bare-fp32", "bare-bf16", "recipe-fp32", "recipe-bf16")


def flops_per_token():
    from modeling_deepseek_r1 import DeepSeekR1Config
    from recipes.sizing import flops_per_token as formula

    return formula(DeepSeekR1Config(**REFERENCE, num_nextn_predict_layers=0), LENGTH)


def our_model(fields):
    from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM

    return DeepSeekR1ForCausalLM(DeepSeekR1Config(**fields, num_nextn_predict_layers=0))


def library_model(fields):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**fields, num_key_value_heads=fields["num_attention_heads"], num_mtp_layers=0)
    )


def bare_loop(build, bf16_weights, steps, warmup=3):
    """Median seconds of a step of forward, backward, fused AdamW and (ours) the bias update."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = build(REFERENCE).train()
    model = model.bfloat16() if bf16_weights else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(2, REFERENCE["vocab_size"], (BATCH, LENGTH), device="cuda")
    times = []
    for step in range(warmup + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=not bf16_weights):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(model, "update_expert_bias"):
            model.update_expert_bias()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def write_random_rows(folder, rows):
    """A packed data set of documents as long as a row, of random tokens."""
    import numpy
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from data_scripts.packing.packed_writer import (
        FORMAT,
        VERSION,
        SplitWriter,
        file_sha256,
        token_dtype,
        write_manifest,
    )

    words = {"<s>": 0, "</s>": 1} | {f"w{token}": token for token in range(2, REFERENCE["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")),
        bos_token="<s>", eos_token="</s>", pad_token="<s>",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    generator, splits = numpy.random.default_rng(0), {}
    for split, count in (("train", rows), ("validation", 2)):
        writer = SplitWriter(folder, split, token_dtype(REFERENCE["vocab_size"]), ["random"], 1 << 30)
        for _ in range(count):
            writer.append(generator.integers(2, REFERENCE["vocab_size"], LENGTH), LENGTH, "random")
        splits[split] = writer.close()
    write_manifest(folder, {
        "format": FORMAT, "version": VERSION, "dtype": "uint16", "vocab_size": REFERENCE["vocab_size"],
        "bos_token_id": 0, "eos_token_id": 1, "sources": ["random"], "splits": splits,
        "tokenizer_sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
    })  # fmt: skip


def through_recipe(bf16_weights, steps):
    """Median seconds of a step as `recipes/pretrain.py` logs it."""
    from recipes.pretrain import main as pretrain

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_random_rows(folder / "data", BATCH * (steps + 6))
        settings = {
            "output_dir": str(folder / "run"), "dataset_name": str(folder / "data"), "sequence_length": LENGTH,
            "model_config": {**REFERENCE, "num_nextn_predict_layers": 0}, "per_device_train_batch_size": BATCH,
            "max_steps": steps + 4, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
            "timing_warmup_steps": 4, "sample_prompts": [],
            "weights_dtype": "bfloat16" if bf16_weights else "float32", "optim": "adamw_torch_fused",
            "learning_rate": 1e-4, "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        pretrain(["--config", str(folder / "config.yaml")])
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(record["step_seconds"] for record in records if "step_seconds" in record)


def measure(variant, steps):
    """One line of results for one variant, in this process."""
    kind, weights = variant.split("-")
    bf16_weights = weights == "bf16"
    if kind == "recipe":
        seconds = through_recipe(bf16_weights, steps)
    else:
        seconds = bare_loop(our_model if kind == "bare" else library_model, bf16_weights, steps)
    tokens = BATCH * LENGTH / seconds
    return {
        "variant": variant, "tokens_per_second": round(tokens), "step_ms": round(seconds * 1e3, 1),
        "mfu_percent": round(100 * tokens * flops_per_token() / 989e12, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }  # fmt: skip


def compare_on_cuda(steps, variants, output):
    lines = []
    for variant in variants:
        command = [sys.executable, __file__, "--device", "cuda", "--steps", str(steps), "--only", variant]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        found = [line for line in result.stdout.splitlines() if line.startswith('{"variant"')]
        line = json.loads(found[-1]) if found else {"variant": variant, "error": result.stderr.strip()[-600:]}
        lines.append(line)
        print(json.dumps(line), flush=True)
        if output:
            Path(output).write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"\n{'variant':14} {'tokens/s':>9} {'step ms':>8} {'MFU %':>6} {'peak GiB':>8}")
    for line in (line for line in lines if "error" not in line):
        speed = f"{line['tokens_per_second']:9,} {line['step_ms']:8} {line['mfu_percent']:6}"
        print(f"{line['variant']:14} {speed} {line['peak_gib']:8}")


def compare_on_cpu(steps, threads):
    """Step times of both models in turn, in one process, on the `tiny` sizes; the median of the pairwise ratios."""
    torch.set_num_threads(threads)
    config = yaml.safe_load((Path(__file__).resolve().parents[1] / "recipes/configs/pretrain_tiny.yaml").read_text())
    ours_only = ("num_nextn_predict_layers", "mtp_loss_coef", "bias_update_speed", "seq_aux_loss_alpha")
    fields = {name: value for name, value in config["model_config"].items() if name not in ours_only}
    torch.manual_seed(0)
    models = {"library": library_model(fields).train(), "ours": our_model(fields).train()}
    models["ours"].load_state_dict(models["library"].state_dict())
    shape = (config["per_device_train_batch_size"], config["sequence_length"])
    ids = torch.randint(3, fields["vocab_size"], shape)
    times = {name: [] for name in models}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for name, model in models.items()}
    for _ in range(steps + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if name == "ours":
                model.update_expert_bias()
            times[name].append(time.perf_counter() - start)
    library, ours = (times[name][2:] for name in ("library", "ours"))
    print(json.dumps({
        "device": f"cpu, {threads} threads", "torch": torch.__version__, "steps": steps,
        "library_ms": round(statistics.median(library) * 1e3, 1), "ours_ms": round(statistics.median(ours) * 1e3, 1),
        "ratio": round(statistics.median(b / a for a, b in zip(library, ours)), 3),
    }))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--only", choices=VARIANTS, help="measure one variant in this process")
    parser.add_argument("--output", help="file for the JSON lines")
    args = parser.parse_args()
    if args.device == "cpu":
        compare_on_cpu(args.steps, args.threads)
    elif args.only:
        print(json.dumps(measure(args.only, args.steps)), flush=True)
    else:
        compare_on_cuda(args.steps, args.variants, args.output)


if __name__ == "__main__":
    main()
