"""The two ends of a fine-tuning run: what is printed, evaluated and written before training, and after it."""

from recipes.logging_callbacks import write_run_config
from recipes.run_results import conclude, text_table
from recipes.sft_trainer import causal_lm
from recipes.stage_results import evaluate_after, save_merged, sizes_of


def announce_run(trainer, facts):
    """Print and store commit, sizes, device and the resolved config."""
    args, model = trainer.args, causal_lm(trainer.model)
    if not trainer.is_world_process_zero():
        return
    mtp = getattr(model, "trains_mtp", False)
    sizes = sizes_of(trainer.model) | {
        "multi-token prediction": f"trained, weight {model.config.mtp_loss_coef}" if mtp else "not trained",
        "examples": facts["training"][0],
        "packed rows": f"{len(trainer.train_dataset):,} of up to {args.max_length} tokens",
    }
    content = write_run_config(args, model, args.output_dir, {"stage": "sft", "sizes": sizes, "data": facts})
    device = content["device"]
    where = f"{device['type']} x{device['processes']}, mixed precision: {device['mixed_precision']}"
    rows = [("commit", content["commit"]), *sizes.items(), ("device", where), ("output", args.output_dir)]
    rows += [("data", line) for part in ("training", "held out") for line in facts.get(part, [])[1:]]
    print(text_table(rows), flush=True)


def finish_run(trainer, before):
    """Evaluate, save, write eval.json and report.html, print results. Returns the content of eval.json."""
    args, results = trainer.args, {"stage": "sft", "step": trainer.state.global_step}
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate(metric_key_prefix="final")
        results["held_out"] = {name: metrics[f"final_{name}"] for name in ("loss", "token_accuracy", "tokens")}
    trainer.save_model()
    if args.eval_tasks:
        results["tasks"] = evaluate_after(trainer, before)
    if not trainer.is_world_process_zero():
        return results
    if args.lora_rank and args.merge_adapter:
        results["merged_logits_difference"] = save_merged(trainer, trainer.train_dataset[0]["input_ids"][:64])
    return trainer.push_results(conclude(args.output_dir, results))
