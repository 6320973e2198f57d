"""Both ends of a distillation: the teacher's accuracy and speed, what is printed, what eval.json holds."""

import json
import statistics
import time
from pathlib import Path

import torch
from transformers import GenerationConfig

from recipes.distill_students import load_teacher
from recipes.evaluation import evaluate_tasks, load_problems, render_prompt
from recipes.logging_callbacks import write_run_config
from recipes.run_results import conclude, text_table
from recipes.sampling import evaluation_mode, is_spread, left_padded, plain_generation, whole_model
from recipes.sft_trainer import causal_lm
from recipes.sizing import count_parameters
from recipes.stage_results import evaluate_after, save_merged, sizes_of

REPETITIONS = 3


# ---------------------------------------------------------------- size and speed


def _prompts(args, trainer, tokenizer, own):
    """Token ids of the prompts on which speed is measured: the same texts for every model."""
    if args.eval_tasks:
        settings = args.task_evaluation()
        problems = [problem for _, problem in load_problems(settings)][: args.speed_prompts]
        return [render_prompt(own, problem, settings)[1] for problem in problems]
    rows = trainer.train_dataset.select(range(min(args.speed_prompts, len(trainer.train_dataset))))
    if "prompt" in rows.column_names:
        texts = [row if isinstance(row, str) else row[-1]["content"] for row in rows["prompt"]]
    else:
        texts = [tokenizer.decode(ids[:32], skip_special_tokens=True) for ids in rows["input_ids"]]
    return [own(text or "a")["input_ids"] for text in texts]


def generation_speed(model, tokenizer, prompts, new_tokens):
    """Tokens/s of greedy generation, all prompts in one batch, end tokens ignored: median of three after a first run.

    Fewer new tokens where the context is short.
    """
    model = whole_model(model)
    length, times = max(map(len, prompts)), []
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length + new_tokens
    new_tokens = min(new_tokens, context - length)
    if new_tokens < 1:
        raise ValueError(f"a prompt of {length} tokens fills the context of {context}: nothing can be generated")
    ids, mask, pad = left_padded(model, tokenizer, prompts, length)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=pad)
    with evaluation_mode(model), plain_generation(model, config):
        for _ in range(REPETITIONS + 1):
            start = time.perf_counter()
            found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return len(prompts) * (found.shape[1] - length) / statistics.median(times[1:])


def measure(trainer, model, tokenizer):
    """Size and speed of a model, for eval.json; no speed of one that is spread over processes. Parameters of adapters
    are those of the merged model."""
    args, config = trainer.args, causal_lm(model).config
    counts, dtype = count_parameters(config), causal_lm(model).dtype
    prompts = _prompts(args, trainer, trainer.processing_class, tokenizer)
    found = {
        "model_type": config.model_type,
        "parameters": counts.total,
        "active parameters a token": counts.active,
        "bytes of weights": counts.total * dtype.itemsize,
    }
    if is_spread(model):
        return found
    return found | {"tokens/s, greedy": generation_speed(model, tokenizer, prompts, args.speed_tokens)}


# ---------------------------------------------------------------- the teacher


def read_teacher_eval(args):
    """The teacher's results from an eval.json: of recipes/eval.py, of the stage that trained it (after training), or of
    another student's distillation from it.

    Raises:
        ValueError: where it holds none of `eval_tasks`, or with other settings.
    """
    path = Path(args.teacher_eval)
    path = path / "eval.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"teacher_eval={args.teacher_eval} does not exist; leave it out to evaluate the teacher here")
    found = json.loads(path.read_text(encoding="utf-8"))
    theirs = found.get("distillation", {}).get("teacher", {})
    if theirs.get("name") == args.teacher_model_name_or_path:  # "after" is another student's
        found = theirs.get("tasks", {})
    elif "overall" not in found:
        found = found.get("tasks", {}).get("after", {})
    wanted, held = args.task_evaluation().facts(), found.get("settings")
    if held is None:
        raise ValueError(f"teacher_eval={path} holds no results on tasks; leave it out to evaluate the teacher here")
    differing = [f"{name} (there {held.get(name)!r}, here {wanted[name]!r})"
                 for name in wanted if held.get(name) != wanted[name]]  # fmt: skip
    if differing:
        raise ValueError(
            f"teacher_eval={path} was made with other settings: {'; '.join(differing)}. Make it again with these, or "
            "leave it out to evaluate the teacher here"
        )
    return found


def describe_teacher(trainer, teacher, tokenizer):
    """{"name", sizes, speed, "tasks": results on `eval_tasks`} of the teacher, before training.

    `teacher`: None where training needs none; it is then loaded for this alone.
    """
    args = trainer.args
    teacher = load_teacher(args, tokenizer).to(args.device) if teacher is None else teacher
    result = {"name": args.teacher_model_name_or_path} | measure(trainer, teacher, tokenizer)
    if args.eval_tasks and args.teacher_eval:
        result["tasks"] = read_teacher_eval(args)
    elif args.eval_tasks:
        folder = Path(args.output_dir) / "eval_teacher"
        with trainer.speed.paused(), trainer.accelerator.autocast():
            result["tasks"] = evaluate_tasks(
                teacher, tokenizer, args.task_evaluation(), output_dir=str(folder), name="teacher",
                accelerator=trainer.accelerator, progress=not args.disable_tqdm,
            )  # fmt: skip
    return result


def accuracy_kept(student, teacher):
    """{task: student's pass@1 / teacher's, None where the teacher's is 0; "mean": of the means over tasks}."""
    names = list(student["tasks"])
    values = [[result["tasks"][name]["pass@1"]["value"] for name in names] for result in (student, teacher)]
    shares = {name: own / other if other else None for name, own, other in zip(names, *values)}
    return shares | {"mean": sum(values[0]) / sum(values[1]) if sum(values[1]) else None}


# ---------------------------------------------------------------- the two ends of a run


def announce_run(trainer, facts):
    """Print and store commit, sizes, device and the resolved config."""
    args, model = trainer.args, causal_lm(trainer.model)
    if not trainer.is_world_process_zero():
        return
    sizes = sizes_of(trainer.model) | {"method": args.method, "teacher": args.teacher_model_name_or_path or "not named"}
    if args.method == "on_policy":
        sizes |= {"divergence": f"generalised JSD, beta {args.beta:g}, temperature {args.temperature:g}"}
    elif args.method == "logits":
        sizes |= {"loss": f"{args.alpha:g} x {args.temperature:g}^2 x KL + {1 - args.alpha:g} x cross-entropy"
                  + (f" + {args.feature_coef:g} x feature loss" if args.feature_coef else "")}  # fmt: skip
    training = facts["training"]
    sizes["training data"] = training if isinstance(training, str) else training[0]
    content = write_run_config(args, model, args.output_dir, {"stage": "distill", "sizes": sizes, "data": facts})
    device = content["device"]
    where = f"{device['type']} x{device['processes']}, mixed precision: {device['mixed_precision']}"
    rows = [("commit", content["commit"]), *sizes.items(), ("device", where), ("output", args.output_dir)]
    print(text_table(rows), flush=True)


def _held_out(trainer):
    metrics = trainer.evaluate(metric_key_prefix="final")
    if trainer.args.method == "on_policy":
        return {"held_out_divergence": metrics["final_loss"]}
    return {"held_out": {name: metrics[f"final_{name}"] for name in ("loss", "token_accuracy", "tokens")}}


def finish_run(trainer, before, teacher):
    """Evaluate, save, write eval.json and report.html, print results. Returns the content of eval.json.

    `teacher`: what `describe_teacher` found, or None.
    """
    args, results = trainer.args, {"stage": "distill", "step": trainer.state.global_step}
    if trainer.eval_dataset is not None:
        results |= _held_out(trainer)
    trainer.save_model()
    if args.eval_tasks:
        results["tasks"] = evaluate_after(trainer, before)
    student = measure(trainer, trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class)
    found = results["distillation"] = {"method": args.method, "student": student}
    if teacher is not None:
        found["teacher"] = teacher
        if args.eval_tasks:
            found["kept"] = accuracy_kept(results["tasks"]["after"], teacher["tasks"])
    if not trainer.is_world_process_zero():
        return results
    if args.lora_rank and args.merge_adapter:
        ids = trainer.processing_class("What is 2 + 3?")["input_ids"]
        results["merged_logits_difference"] = save_merged(trainer, ids)
    return trainer.push_results(conclude(args.output_dir, results))
