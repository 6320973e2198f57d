"""The registry of tasks: problems with reference answers and verifiers, by split, seed and difficulty.

    from recipes.tasks import get_task
    task = get_task("chain_sum")
    problem = task.problems("test", seed=0, difficulty=2, size=100)[0]
    task.score("<think>4 + 3 = 7</think> The answer is 7.", problem)    # Verdict(correct=..., parsed=...)

| tasks                        | answers                                | file                  |
|------------------------------|----------------------------------------|-----------------------|
| reasoning-gym's, chosen      | numbers, words, grids, expressions     | `task_puzzles.py`     |
| `mathematics`                | symbolic, by math-verify               | `task_mathematics.py` |
| `list_functions`             | programs, in the sandbox               | `task_code.py`        |
| `human_eval`                 | the same; evaluation only, fetched     | `task_code.py`        |
| mmlu, commonsense_qa, boolq, | letters, yes/no, numbers; fetched      | `task_packaged.py`    |
| openbook_qa, logi_qa, asdiv  |                                        |                       |

How answers are read is described in `task_answers.py`; how training and test are kept apart in
`task_base.py`. A new task is a subclass of `Task` and a line in TASKS; the tests feed every entry its
reference answers and nonsense, so a broken verifier does not get in.
"""

import difflib
from itertools import islice

from recipes.task_base import LEVELS, Problem, Task, Verdict, split_of
from recipes.task_code import HumanEvalTask, ListFunctionsTask
from recipes.task_mathematics import MathematicsTask, verify_mathematics
from recipes.task_packaged import PACKAGED_TASKS
from recipes.task_puzzles import PUZZLE_TASKS

__all__ = ["LEVELS", "TASKS", "Problem", "Task", "Verdict", "check_disjoint", "get_task", "score", "split_of",
           "verify_mathematics"]

TASKS = {
    **PUZZLE_TASKS,
    "mathematics": MathematicsTask("mathematics"),
    "list_functions": ListFunctionsTask("list_functions"),
    "human_eval": HumanEvalTask(),
    **PACKAGED_TASKS,
}


def get_task(name, folder=None):
    """The task of that name; `folder` is where fetched tasks find their files (default data/tasks).

    Raises:
        ValueError: for an unknown name, listing the known ones, closest first.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(str(name), TASKS, n=5, cutoff=0.5)
        known = close + [other for other in sorted(TASKS) if other not in close]
        raise ValueError(f"unknown task {name!r}; known are {', '.join(known)}")
    task = TASKS[name]
    return task if folder is None or task.generated else task.at(folder)


def score(answer_text, problem, untagged="whole"):
    """The verdict of the problem's own task on a completion."""
    return get_task(problem.task).score(answer_text, problem, untagged)


def check_disjoint(names, seeds=(0, 1), size=100, folder=None):
    """Generate both splits of tasks at every difficulty and compare them, across tasks too.

    Returns:
        {"train": number of different problems, "test": the same}.
    Raises:
        ValueError: if a key or a prompt is in both, naming it.
    """
    keys, prompts = {"train": {}, "test": {}}, {"train": {}, "test": {}}
    for name in names:
        task = get_task(name, folder)
        for split in task.splits:
            for seed in seeds:
                for problem in islice(task.stream(split, seed), size):
                    keys[split][problem.metadata["key"]] = prompts[split][problem.prompt] = name
    for found in (keys, prompts):
        common = found["train"].keys() & found["test"].keys()
        if common:
            example = min(common)
            raise ValueError(f"{len(common)} problems are in both splits, for instance {example[:200]!r} "
                             f"({found['train'][example]} train, {found['test'][example]} test)")
    return {split: len(found) for split, found in keys.items()}
