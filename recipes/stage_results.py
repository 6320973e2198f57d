"""What stages after pretraining share at both ends of a run: accuracy on tasks before and after, merged adapters."""

import shutil
from pathlib import Path

import torch

from recipes.evaluation import evaluate_tasks
from recipes.zero_setup import whole_size


def evaluate_stage(trainer, name, afresh):
    """The stage's `eval_tasks`, answered by the model as it is; completions are kept in `eval_<name>/`."""
    args, folder = trainer.args, Path(trainer.args.output_dir) / f"eval_{name}"
    if afresh and trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with trainer.speed.paused(), trainer.compute_loss_context_manager():
        return evaluate_tasks(
            trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, args.task_evaluation(),
            output_dir=str(folder), name=name, accelerator=trainer.accelerator,
            progress=not args.disable_tqdm,
        )  # fmt: skip


def evaluate_before(trainer):
    """The tasks' results before training, once a run: a resumed run finds them on disk."""
    if not (trainer.args.eval_tasks and trainer.args.eval_before):
        return None
    return evaluate_stage(trainer, "before", afresh=trainer.args.overwrite_output_dir)


def evaluate_after(trainer, before):
    """{"before" (where there is one), "after"} for eval.json."""
    trained = trainer.state.global_step > trainer.first_step  # else the answers of a killed evaluation still hold
    return ({"before": before} if before else {}) | {"after": evaluate_stage(trainer, "after", trained)}


@torch.no_grad()
def save_merged(trainer, token_ids):
    """The model with its adapter merged, in `merged/`; returns the largest difference of its logits on `token_ids`."""
    args, tokenizer, model = trainer.args, trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    ids = torch.tensor([token_ids], device=model.device)
    expected = model(input_ids=ids).logits.float()
    merged = model.merge_and_unload()
    difference = (merged(input_ids=ids).logits.float() - expected).abs().max().item()
    folder = Path(args.output_dir) / "merged"
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return difference


def sizes_of(model):
    """{"parameters", "trained parameters"} of a run's config.yaml, as text."""
    parameters = list(model.parameters())
    total, trained = (sum(whole_size(p) for p in parameters if p.requires_grad >= wanted) for wanted in (False, True))
    return {"parameters": f"{total:,}", "trained parameters": f"{trained:,} ({trained / total:.2%})"}
