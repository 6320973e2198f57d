"""Progressive distillation: teacher -> intermediate students -> student, a sub-folder for each one on the way.

Where a student is much smaller than its teacher, one of a size in between teaches it better (teacher assistants,
arXiv:1902.03393, Sec. 4).
"""

import dataclasses
import gc
import json
from pathlib import Path

import torch

from recipes.checkpoint_files import write_atomically
from recipes.logging_callbacks import changed_arguments

SETTINGS, RESULT = "stage.json", "eval.json"
OWN = {"model_name_or_path": None, "student_config": None, "student_layers": None}
# What may differ between two calls of the same stage.
FREE = ("output_dir", "logging_dir", "resume_from_checkpoint", "overwrite_output_dir", "allow_config_change",
        "disable_tqdm", "logging_steps", "save_steps", "save_total_limit", "report_to", "run_name")  # fmt: skip


def stage_settings(args, number, teacher, teacher_eval):
    """The settings of stage `number` (from 1): the run's own with the stage's laid over them."""
    change = OWN | args.progressive[number - 1]
    if "num_train_epochs" in change and "max_steps" not in change:
        change["max_steps"] = -1
    resumed = None if args.overwrite_output_dir and not args.resume_from_checkpoint else "auto"
    shared = {
        "progressive": None, "output_dir": str(Path(args.output_dir) / f"stage_{number}"), "push_to_hub": False,
        "teacher_model_name_or_path": teacher, "teacher_eval": teacher_eval, "resume_from_checkpoint": resumed,
    }  # fmt: skip
    try:
        return dataclasses.replace(args, **(shared | change))
    except ValueError as error:
        raise ValueError(f"progressive, stage {number}: {error}") from error


def _facts(args):
    facts = {name: value for name, value in changed_arguments(args).items() if name not in FREE}
    return json.loads(json.dumps(facts, default=str))


def _is_done(args):
    """Whether a stage has run to its end with these settings.

    Raises:
        ValueError: where its folder was begun with others.
    """
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint is None or not (folder / SETTINGS).is_file():
        return False
    old, new = json.loads((folder / SETTINGS).read_text(encoding="utf-8")), _facts(args)
    changed = [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in sorted(old.keys() | new.keys())
               if old.get(name) != new.get(name)]  # fmt: skip
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings ({'; '.join(changed)}); restore them, take another output_dir, "
            "or pass --overwrite_output_dir to make all stages again"
        )
    return (folder / RESULT).is_file()


def run_stages(args, run):
    """Runs what is not finished; `run(settings)`: one distillation.

    Returns:
        settings of the last step, whose teacher is the last intermediate student; [(folder, its eval.json)].
    """
    teacher, teacher_eval, done = args.teacher_model_name_or_path, args.teacher_eval, []
    settings = []
    for number in range(1, len(args.progressive) + 1):  # all of them are checked before the first one runs
        settings.append(stage_settings(args, number, teacher, teacher_eval))
        teacher = settings[-1].output_dir
        teacher_eval = str(Path(teacher) / RESULT) if args.eval_tasks else None
    for each in settings:
        folder, main = Path(each.output_dir), each.process_index == 0
        if not _is_done(each):
            if main:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / RESULT).unlink(missing_ok=True)
                write_atomically(folder / SETTINGS, json.dumps(_facts(each), indent=1))
            run(each)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        done.append((str(folder), json.loads((folder / RESULT).read_text(encoding="utf-8"))))
    fresh = args.student_config is not None or args.student_layers is not None
    own = {"model_name_or_path": None} if fresh else {}  # which is the teacher, where none is given
    last = dataclasses.replace(
        args, progressive=None, teacher_model_name_or_path=teacher, teacher_eval=teacher_eval, **own
    )
    return last, done
