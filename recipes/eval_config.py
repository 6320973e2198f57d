"""The settings of `recipes/eval.py`: what is loaded, asked and measured."""

from dataclasses import dataclass, field

import torch

from recipes.evaluation import EvaluationSettings
from recipes.run_settings import setting
from recipes.sampling import SamplingSettings


@dataclass
class EvalConfig:
    """Raises ValueError for settings that cannot work, naming the field, its value and the way out."""

    # -- the model
    model_name_or_path: str | None = setting(None, "Folder or Hub name of any causal language model.")
    revision: str | None = setting(None, "Branch, tag or commit on the Hub.")
    adapter: str | None = setting(None, "PEFT adapter (folder or Hub name) put on the model.")
    gguf_file: str | None = setting(None, "Name of a GGUF file in the folder (needs the package gguf).")
    tokenizer_name_or_path: str | None = setting(None, "Folder or Hub name of the tokenizer. Default: the model's.")
    chat_template: str | None = setting(
        None, "deepseek_r1, deepseek_r1_zero or a .jinja file, instead of the tokenizer's own template."
    )
    trust_remote_code: bool = setting(False, "Run the code that a model folder brings.")
    dtype: str = setting(
        "auto",
        "float32, bfloat16, float16 or auto: float32 on a CPU, bfloat16 on a GPU that has it. Results are promised to "
        "be the same for any batch size in float32 only.",
    )
    use_cpu: bool = setting(False, "Stay on the CPU although there is a GPU.")
    # -- verified tasks
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of recipes/tasks.py, with difficulties if wanted: chain_sum gcd:1-3 mathematics:2."},
    )
    split: str = setting("test", "Problems of the test split, or of train.")
    problems: int = setting(100, "Problems of each task, shared evenly by its difficulties.")
    problem_seed: int = setting(0, "Chooses the problems: the same for all models that are to be compared.")
    difficulties: list[int] = field(
        default_factory=list,
        metadata={"help": "For tasks named without difficulties. Default: all that a task has."},
    )
    tasks_folder: str | None = setting(None, "Where fetched tasks have their files. Default: data/tasks.")
    prompt_format: str = setting(
        "chat", "chat: the tokenizer's template. plain: 'Question: ... Answer:', for base models."
    )
    system_prompt: str | None = setting(None, "System message, in front of each problem.")
    thinking: bool = setting(True, "Ask the template for a prompt that ends inside <think>, if it can.")
    strict: bool = setting(True, "An answer in a wrong format is wrong. The lenient accuracy is reported beside it.")
    # -- sampling
    samples: int = setting(1, "Completions of each problem; more than one needs a temperature.")
    temperature: float = setting(0.0, "0: greedy. DeepSeek-R1 is evaluated at 0.6 (arXiv:2501.12948, Sec. 3).")
    top_p: float = setting(1.0, "Share of the distribution kept. DeepSeek-R1: 0.95 (ibid.).")
    top_k: int = setting(0, "Tokens kept, 0: all.")
    max_new_tokens: int = setting(512, "Longest completion in tokens; less where the model's context is full before.")
    seed: int = setting(0, "Of the sampling: another seed, other samples.")
    batch_size: int = setting(32, "Completions at a time on each process; halved when memory does not suffice.")
    stop: list[str] = field(default_factory=list, metadata={"help": "Texts that end a completion."})
    # -- held-out text
    text_dataset: str | None = setting(None, "Packed folder, text files or Hub name: perplexity and bits per byte.")
    text_column: str = setting("text", "Column that holds a document's text.")
    text_window: int | None = setting(None, "Tokens seen at once. Default: the model's context, at most 2048.")
    text_batch_size: int = setting(8, "Windows at a time on each process.")
    max_text_bytes: int | None = setting(None, "Leading documents up to about this many bytes. Default: all.")
    # -- results
    name: str | None = setting(None, "The model's name in tables. Default: the last part of its path.")
    output_dir: str | None = setting(None, "Gets eval.json, report.html and completions.jsonl; resumes from the last.")
    overwrite_output_dir: bool = setting(False, "Drop the completions that are there and start afresh.")
    disable_tqdm: bool = setting(False, "No progress bar.")
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "eval.json files to put side by side, instead of an evaluation; the first is the base."},
    )

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("output_dir is unset: results need a folder, e.g. --output_dir runs/eval")
        if self.compare:
            return
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path is unset: give a model folder or Hub name, or eval.json files to "
                             "--compare")
        if not self.tasks and self.text_dataset is None:
            raise ValueError("tasks and text_dataset are both unset: there is nothing to evaluate; e.g. --tasks "
                             "chain_sum gcd:1-3 or --text_dataset data/nano")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r} must be auto, float32, bfloat16 or float16")
        if self.text_batch_size < 1:
            raise ValueError(f"text_batch_size={self.text_batch_size} must be at least 1")
        if self.tasks:
            self.evaluation_settings()  # so that a typo is told before a model is loaded

    def evaluation_settings(self):
        """The part that `evaluate_tasks` takes."""
        sampling = SamplingSettings(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
            samples=self.samples, seed=self.seed, batch_size=self.batch_size, stop=tuple(self.stop),
        )  # fmt: skip
        return EvaluationSettings(
            tasks=list(self.tasks), split=self.split, seed=self.problem_seed, problems=self.problems,
            difficulties=list(self.difficulties) or None, prompt_format=self.prompt_format,
            system_prompt=self.system_prompt, thinking=self.thinking, strict=self.strict, sampling=sampling,
            tasks_folder=self.tasks_folder,
        )  # fmt: skip

    def torch_dtype(self, device):
        """The dtype that `auto` stands for on a device."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if on_gpu else torch.float32
