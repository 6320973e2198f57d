"""The model card (README.md) of a run folder: what its own files say, and "not recorded" where they do not."""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig

from recipes.checkpoint_files import write_atomically
from recipes.eval_tables import with_interval
from recipes.hub_commit import CARD_START, is_generated_card, mark_card
from recipes.hub_files import ADAPTER_CONFIG, CARD, has_tokenizer, read_json
from recipes.hub_paths import without_paths
from recipes.logging_callbacks import METRICS_FILE, read_metrics
from recipes.reporting import STAGES, result_rows
from recipes.sizing import count_parameters

NOT_RECORDED = "not recorded"
STAGE_OF_RUN = {"pretrain": "pretrain", "sft": "sft", "ppo": "ppo", "grpo": "grpo",
                "distill": "distill", "reward": "reward", "process_reward": "reward"}  # fmt: skip
TASKS = {
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
INTENDED = {
    "pretrain": "Continuing text, and as a starting point for fine-tuning. It follows no instructions.",
    "sft": "Answering questions of the kinds it was tuned on, and as a starting point for reinforcement learning.",
    "reward": "Scoring completions of prompts like those it was trained on: in reinforcement learning, or to choose "
    "the best of several. It writes nothing.",
    "process_reward": "Scoring the steps of a solution, each at its last token. It writes nothing.",
    "ppo": "Answering questions of the kinds it was rewarded for.",
    "grpo": "Answering questions of the kinds it was rewarded for.",
    "distill": "Answering questions of the kinds that its teacher answered, with fewer parameters.",
}


def _read_yaml(path):
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({error}); take it from a copy, or remove it") from error
    if not isinstance(found, dict) or not isinstance(found.get("arguments") or {}, dict):
        raise ValueError(f"{path} is damaged (it holds no settings); take it from a copy, or remove it")  # noqa: TRY004
    return found


def read_run(folder):
    """{"folder", "config" (config.yaml), "results" (eval.json), "records" (metrics)} of a run folder; empty parts."""
    folder = Path(folder)
    config, results = folder / "config.yaml", folder / "eval.json"
    return {
        "folder": folder,
        "config": _read_yaml(config) if config.is_file() else {},
        "results": read_json(results) if results.is_file() else {},
        "records": [r for r in read_metrics(folder / METRICS_FILE) if "kind" in r and "step" in r],
    }


def stage_of(run):
    """The stage's name in STAGES, or None. A pretraining run's config.yaml names none."""
    return run["config"].get("stage", "pretrain") if run["config"] else run["results"].get("stage")


def start_of(run):
    """What a run began with (`model_name_or_path`), or None."""
    return run["config"].get("arguments", {}).get("model_name_or_path")


def _run_folder(name, run):
    """The folder of the run that saved the model `name`: where it was, or now beside the run that used it."""
    name, beside = Path(name), run["folder"].resolve().parent
    places = [name, beside / name.name]
    if re.fullmatch(r"checkpoint-\d+|ema|merged", name.name):
        places += [name.parent, beside / name.parent.name]
    return next((place for place in places if (place / "config.yaml").is_file()), None)


def earlier_stages(run):
    """-> (runs that this one started from, the first one first; the model that their first one began with, or None)."""
    found, seen = [], {run["folder"].resolve()}
    while name := start_of(run):
        folder = _run_folder(name, run)
        if folder is None or folder.resolve() in seen:
            break
        seen.add(folder.resolve())
        run = read_run(folder)
        found.insert(0, run)
    return found, start_of(run)


# ---------------------------------------------------------------- the parts of the card


def _table(header, rows):
    escape = lambda cell: str(cell).replace("|", "\\|").replace("\n", " ")
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(escape, line)) + " |" for line in lines)


def architecture(folder):
    """[(label, text)]: class, sizes and parameters, from config.json."""
    config = AutoConfig.from_pretrained(folder)  # our own type is registered; others are the library's
    text = config.get_text_config()
    rows = [("class", (config.architectures or [NOT_RECORDED])[0]), ("model type", config.model_type)]
    counts = count_parameters(config)
    rows.append(("parameters, as a causal language model", f"{counts.total:,}"))
    rows.append(("active per token", f"{counts.active:,}"))
    fields = {
        "layers": "num_hidden_layers", "width": "hidden_size", "attention heads": "num_attention_heads",
        "routed experts": "n_routed_experts", "experts per token": "num_experts_per_tok",
        "multi-token-prediction layers": "num_nextn_predict_layers", "vocabulary": "vocab_size",
        "context, tokens": "max_position_embeddings",
    }  # fmt: skip
    rows += [(label, f"{getattr(text, name):,}") for label, name in fields.items() if getattr(text, name, None)]
    return [*rows, ("weights stored as", str(config.dtype).removeprefix("torch.") if config.dtype else NOT_RECORDED)]


def data_rows(run):
    """[(source, where from, licence)] of a run's training data, from the manifest of its data set where it is here."""
    names = run["config"].get("arguments", {}).get("dataset_name")
    rows = []
    for name in names if isinstance(names, list) else [names] if names else []:
        file = Path(str(name)).expanduser() / "manifest.json"
        manifest = read_json(file) if file.is_file() else {}
        sources, licences = manifest.get("sources") or [], manifest.get("licences") or {}
        shown = name if HUB_NAME.fullmatch(str(name)) and not Path(name).exists() else Path(str(name)).name
        for source in sources or licences or [None]:
            entry = sources[source] if isinstance(sources, dict) else {}
            entry = entry if isinstance(entry, dict) else {"location": entry}
            licence = entry.get("licence") or licences.get(source) or NOT_RECORDED
            label = f"{shown}: {source}" if source else shown
            found = (manifest.get(key, {}).get(source) for key in ("origins", "locations"))
            location = str(next(filter(None, (entry.get("location"), *found)), NOT_RECORDED))
            rows.append((label, Path(location).name if Path(location).exists() else location, licence))
    return rows


def task_results(results):
    """[(task, problems, before or None, after)] of eval.json: {"value", "low", "high"} as shares."""
    tasks = results.get("tasks", {})
    after = tasks.get("after", tasks if "before" not in tasks else {})
    after, before = (part.get("tasks", part) for part in (after, tasks.get("before", {})))
    return [(name, task["problems"], before.get(name, {}).get("pass@1"), task["pass@1"])
            for name, task in after.items()]  # fmt: skip


def eval_results(results, task_type):
    """The figures of eval.json for the metadata (`model-index`)."""
    found = []

    def add(data, metric, value, name, scale=1.0):
        found.append(EvalResult(
            task_type=task_type, dataset_type=re.sub(r"\W+", "_", data), dataset_name=data, metric_type=metric,
            metric_value=round(scale * value, 4), metric_name=name,
        ))  # fmt: skip

    for name, problems, _, after in task_results(results):
        label = f"pass@1, % (95 % interval {100 * after['low']:.1f} to {100 * after['high']:.1f}, {problems} problems)"
        add(name, "pass@1", after["value"], label, 100)
    if weights := results.get("weights"):
        add("held-out text", "bits_per_byte", weights["bits_per_byte"], "bits per byte")
    if held_out := results.get("held_out"):
        add("held-out answers", "loss", held_out["loss"], "loss, nats per token")
    if pairs := results.get("preferences"):
        share = pairs["accuracy"]
        label = f"accuracy (95 % interval {share['low']:.3f} to {share['high']:.3f}, {pairs['pairs']} pairs)"
        add("held-out pairs", "accuracy", share["value"], label)
    return found


def results_text(run):
    """Tables of the evaluation, with intervals and numbers of problems."""
    parts, tasks = [], task_results(run["results"])
    if tasks:
        rows = [(name, problems, with_interval(before) if before else "", with_interval(after))
                for name, problems, before, after in tasks]  # fmt: skip
        parts.append(_table(["task", "problems", "before training, pass@1 %", "pass@1 %"], rows))
        parts.append("Brackets: 95 % intervals over problems.")
    facts = [row for row in result_rows(run["records"], run["results"], run["config"]) if "pass@1" not in row[0]]
    if facts:
        parts.append(_table(["figure", "value"], facts))
    return "\n\n".join(parts) or f"Evaluation: {NOT_RECORDED}."


def stage_text(run):
    """What one stage did: script, command, settings, data."""
    config, stage = run["config"], stage_of(run)
    title = STAGES.get(stage, "Training")
    if not config:
        return f"### {title}\n\nSettings: {NOT_RECORDED} (the run folder has no config.yaml)."
    config = without_paths(config)
    settings = yaml.safe_dump(config.get("arguments", {}), sort_keys=False, allow_unicode=True).rstrip()
    versions = ", ".join(f"{name} {value}" for name, value in config.get("versions", {}).items())
    rows = [("code, commit", config.get("commit", NOT_RECORDED)), ("packages", versions or NOT_RECORDED),
            ("device", ", ".join(f"{k} {v}" for k, v in config.get("device", {}).items()) or NOT_RECORDED)]  # fmt: skip
    rows += list(config.get("sizes", {}).items())
    data = without_paths(data_rows(run))
    data = _table(["training data", "from", "licence"], data) if data else f"Training data: {NOT_RECORDED}."
    command = config.get("command")
    script = f"recipes/{STAGE_OF_RUN[stage]}.py" if stage in STAGE_OF_RUN else NOT_RECORDED
    shown = f"```bash\n{command}\n```" if command else f"Command: {NOT_RECORDED}; the script is `{script}`."
    return (
        f"### {title}\n\n{shown}\n\n{_table(['', ''], rows)}\n\n{data}\n\n<details><summary>Settings that differ from "
        f"the defaults</summary>\n\n```yaml\n{settings}\n```\n\n</details>"
    )


def usage(repo_id, auto_class, base_model=None, revision="main", tokenizer=None):
    """The lines that load the model; `tokenizer`: name of the repository that has one."""
    at = f', revision="{revision}"' if revision != "main" else ""
    loaded = f'"{base_model or repo_id}", trust_remote_code=True' + ("" if base_model else at)
    lines = [f"from transformers import {auto_class}" + (", AutoTokenizer" if tokenizer else ""), ""]
    if tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}"{at if tokenizer == repo_id else ""})')
    lines.append(f'model = {auto_class}.from_pretrained({loaded}, dtype="auto")')
    if base_model:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'model = PeftModel.from_pretrained(model, "{repo_id}"{at})')
    return "```python\n" + "\n".join(lines) + "\n```"


# ---------------------------------------------------------------- the card


def metadata(run, repo_id, task_type, adapter, base_model, licence):
    """ModelCardData: what the Hub reads."""
    names = run["config"].get("arguments", {}).get("dataset_name")
    names = names if isinstance(names, list) else [names]
    given = start_of(run)
    if base_model is None and given and HUB_NAME.fullmatch(given) and not Path(given).exists():
        base_model = given
    results = eval_results(run["results"], task_type)
    return ModelCardData(
        library_name="peft" if adapter else "transformers", pipeline_tag=task_type, license=licence,
        base_model=base_model, tags=["deepseek_r1", *filter(None, [stage_of(run)]), *(["lora"] if adapter else [])],
        datasets=[n for n in names if n and HUB_NAME.fullmatch(n) and not Path(n).exists()] or None,
        model_name=repo_id.split("/")[-1] if results else None, eval_results=results or None,
    )  # fmt: skip


def given_stages(run, folders):
    """`earlier_stages` of folders that the user names."""
    runs = [read_run(folder) for folder in folders]
    return runs, start_of([*runs, run][0])


def is_all_recorded(runs, outside, adapter):
    """Whether the data of all training behind a model are known, from fresh weights on."""
    stages, rows = [stage_of(run) for run in runs], [data_rows(run) for run in runs]
    known = all(run["config"] for run in runs) and all(rows)
    known = known and all(where != NOT_RECORDED for part in rows for _, where, _ in part)
    return known and outside is None and stages[0] == "pretrain" and not (adapter and len(runs) == 1)


def build_card(folder, repo_id, *, adapter=False, base_model=None, base_folder=None, stages=None, licence=None,
               revision="main", model_folder=None):  # fmt: skip
    """The card's text.

    Args:
        base_model: Hub name of what an adapter or a fine-tuned model starts from; base_folder: where an adapter's base
            can be read here. stages: folders of the earlier stages' runs; None follows `model_name_or_path`.
        model_folder: where the weights are, if not in the run folder itself: a checkpoint.
    """
    run = read_run(folder)
    model_folder = Path(model_folder or folder)
    facts = architecture((base_folder or model_folder) if adapter else model_folder)
    ending = next((end for end in TASKS if facts[0][1].endswith(end)), None)
    task_type, auto_class = TASKS.get(ending, ("text-generation", "AutoModelForCausalLM"))
    if adapter:
        peft = read_json(model_folder / ADAPTER_CONFIG)
        rank = f"{peft.get('peft_type', 'adapter')} of rank {peft.get('r', NOT_RECORDED)} on the model below"
        facts = [("adapter", rank), ("base model", base_model or NOT_RECORDED), *facts]
    earlier, outside = earlier_stages(run) if stages is None else given_stages(run, stages)
    stage = stage_of(run)
    data = metadata(run, repo_id, task_type, adapter, base_model, licence)
    made = [STAGES.get(stage_of(each), "training") for each in [*earlier, run]]
    if outside:
        absent = "" if HUB_NAME.fullmatch(outside) and not Path(outside).exists() else " (its run folder is not here)"
        made.insert(0, f"`{without_paths(outside)}`{absent}")
    tokenizer = repo_id if has_tokenizer(model_folder) else base_model if adapter else None
    only = " and nothing else" if is_all_recorded([*earlier, run], outside, adapter) else ""
    limits = (
        f"Trained on the data named above{only}: facts, languages and tasks outside of it are beyond it. Its "
        "output may be wrong, biased or offensive, and reasoning that reads well may still be wrong. The figures hold "
        "for the tasks and problems named here."
    )
    return mark_card(
        f"---\n{data.to_yaml()}\n---\n{{mark}}\n\n# {repo_id.split('/')[-1]}\n\n"
        f"{STAGES.get(stage, 'A model')} of an open DeepSeek-R1. Stages: {' -> '.join(made)}.\n\n"
        f"## Model\n\n{_table(['', ''], facts)}\n\n"
        f"## Use\n\n{usage(repo_id, auto_class, base_model if adapter else None, revision, tokenizer)}\n\n"
        "`trust_remote_code=True` runs the Python files of the repository: read them, or pin a `revision`.\n\n"
        f"Intended use: {INTENDED.get(stage, NOT_RECORDED)}\n\n"
        f"Licence of the weights: {licence or NOT_RECORDED}. That of each data source is below.\n\n"
        f"## Evaluation\n\n{results_text(run)}\n\n"
        "## Training\n\n" + "\n\n".join(map(stage_text, [*earlier, run])) + "\n\n"
        f"## Limits\n\n{limits}\n"
    )


def write_card(folder, repo_id, target=None, **facts):
    """Writes README.md, or `target`, unless somebody wrote or edited the folder's. Returns (path, whether written).

    Of PEFT's empty form, whose metadata may have been filled in, README.old.md keeps a copy.
    """
    path = Path(folder) / CARD
    there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if there is not None and not is_generated_card(there):
        return path, False
    text = build_card(folder, repo_id, **facts)
    if target is None and there is not None and CARD_START not in there:
        path.replace(path.with_name("README.old.md"))
    write_atomically(target or path, text)
    return Path(target or path), True
