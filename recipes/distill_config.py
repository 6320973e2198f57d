"""The settings of `recipes/distill.py`: one typed dataclass, read from YAML and the command line."""

import json
from dataclasses import dataclass, field, fields

import yaml
from transformers import CONFIG_MAPPING
from trl import DistillationConfig

import modeling_deepseek_r1  # noqa: F401  (registers the model type)
from recipes.pretrain_config import check_names
from recipes.run_settings import setting
from recipes.sft_config import SFTRecipeConfig
from recipes.stage_settings import check_rules
from recipes.zero_setup import zero_stage

METHODS = ("traces", "logits", "on_policy")
TEMPERATURES = {"traces": None, "logits": 2.0, "on_policy": 1.0}
# Choices that mean something in some methods only.
BELONGS = {
    "alpha": ("logits",), "feature_coef": ("logits",), "feature_layers": ("logits",), "beta": ("on_policy",),
    "temperature": ("logits", "on_policy"), "use_vllm": ("on_policy",), "mtp_loss_coef": ("traces",),
    "label_smoothing_factor": ("traces",), "loss_type": ("traces",), "progressive": ("logits", "on_policy"),
}  # fmt: skip
STUDENTS = ("model_name_or_path", "student_config", "student_layers")


def _parsed(given, name, kinds):
    """YAML or JSON from the command line, or what a YAML file held."""
    try:
        found = yaml.safe_load(given) if isinstance(given, str) else given
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={given!r} is neither YAML nor JSON: {error}") from error
    if found is not None and not isinstance(found, kinds):
        raise ValueError(f"{name}={given!r} must be a {kinds[-1].__name__}, see --help")
    return found


@dataclass
class DistillRecipeConfig(SFTRecipeConfig, DistillationConfig):
    """Everything of `SFTRecipeConfig` and `trl.DistillationConfig`, and the fields below.

    The student is one of: `model_name_or_path`, `student_config`, `student_layers`. In the last two cases
    `model_name_or_path` becomes the teacher: where tokenizer and, for `student_layers`, weights come from.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """

    method: str = setting("traces", f"{', '.join(METHODS)}; see docs/distillation.md.")
    # -- models
    student_config: dict | str | None = field(
        default=None,
        metadata={"help": "A new student: {model_type: llama, hidden_size: 256, ...}, on the teacher's tokenizer."},
    )
    student_layers: list | str | None = field(
        default=None,
        metadata={"help": "A student of the teacher's layers: their numbers, [0, 2, 3], or one number, how many."},
    )
    teacher_weights_dtype: str | None = setting(None, "float32 or bfloat16. Default: weights_dtype.")
    teacher_eval: str | None = setting(
        None, "eval.json with the teacher's results on eval_tasks. Default: the teacher is evaluated here."
    )
    progressive: list | str | None = field(
        default=None,
        metadata={
            "help": "Intermediate students on the way (arXiv:1902.03393): a list of settings that differ for them, "
            "such as {student_layers: 4, max_steps: 500}; each is the next one's teacher."
        },
    )
    # -- logits
    alpha: float = setting(0.9, "Weight of the teacher's distribution; 1 - alpha: of the cross-entropy.")
    temperature: float | None = setting(
        None, "Of both distributions; on_policy also samples with it. Default: 2 for logits, 1 for on_policy."
    )
    feature_coef: float = setting(0.0, "Weight of feature matching.")
    feature_layers: list | str | None = field(
        default=None,
        metadata={"help": "Pairs student:teacher, [0:1, 1:3], or one number: pairs, evenly spread. Default: all."},
    )
    # -- on_policy
    max_prompt_length: int | None = setting(None, "Longer prompts are left out. Default: what the context leaves.")
    shuffle_dataset: bool | None = setting(
        None, "Shuffle before rows are packed, or (on_policy) the prompts of each epoch. Default: on_policy alone."
    )
    max_eval_prompts: int = setting(64, "Held-out prompts that an evaluation during training takes at most.")
    # -- measurements
    speed_prompts: int = setting(8, "Prompts on which the speed of generation is measured, all at a time.")
    speed_tokens: int = setting(64, "Tokens generated for each of them.")

    spreads = ()
    rewards = ()  # read by recipes/rl_data.py: nothing is scored
    num_generations = 1

    def __post_init__(self):
        self._check_method()
        self.student_config = _parsed(self.student_config, "student_config", (dict,))
        self.student_layers = self._items("student_layers")
        self.feature_layers = self._items("feature_layers")
        self.progressive = _parsed(self.progressive, "progressive", (list,))
        self._check_student()
        if self.shuffle_dataset is None:
            self.shuffle_dataset = self.method == "on_policy"
        temperature, self.temperature = self.temperature, self.temperature or 1.0  # TRL wants a number
        super().__post_init__()
        self.temperature = TEMPERATURES[self.method] if temperature is None else temperature
        if self.method == "on_policy":
            self.dataloader_drop_last = False  # held-out prompts would be lost; rollouts always take whole batches
        self._check_progressive()
        self.check_zero()
        check_rules(
            self,
            (
                ("alpha", 0 <= self.alpha <= 1, "in [0, 1]"),
                ("temperature", self.temperature is None or self.temperature > 0, "positive"),
                ("feature_coef", self.feature_coef >= 0, "zero or more"),
                ("teacher_weights_dtype", self.teacher_weights_dtype in (None, "float32", "bfloat16"),
                 "float32 or bfloat16"),
                ("max_eval_prompts", self.max_eval_prompts >= 1, "at least 1"),
                ("speed_prompts", self.speed_prompts >= 1, "at least 1"),
                ("speed_tokens", self.speed_tokens >= 1, "at least 1"),
            ),
        )  # fmt: skip
        if self.feature_layers is not None and not self.feature_coef:
            raise ValueError(f"feature_layers={self.feature_layers} has no effect with feature_coef=0; raise it")

    def check_zero(self):
        """What reads whole weights before, or outside of, the forward pass in which ZeRO-3 gathers them."""
        if zero_stage(self) < 3:
            return
        if self.method != "traces":
            raise ValueError(f"method={self.method} computes with the teacher's head beside the student's, which "
                             "ZeRO-3 leaves in pieces: use zero2.yaml, or method=traces")  # fmt: skip
        if self.student_layers is not None:
            raise ValueError(f"student_layers={self.student_layers} copies the teacher's weights, which ZeRO-3 leaves "
                             "in pieces: use zero2.yaml, or make the student in a run of its own")  # fmt: skip

    @property
    def generation_batch_size(self):
        """Prompts of an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _items(self, name):
        """A list from YAML, JSON, or text with commas; one number as a list of one."""
        given = getattr(self, name)
        if isinstance(given, str) and not given.lstrip().startswith("["):
            given = [item.strip() for item in given.split(",")]
        elif isinstance(given, str):
            given = [item.strip().strip("'\"") for item in given.strip().strip("[]").split(",")]
        given = [given] if isinstance(given, int) else given
        if given is None or name == "feature_layers":
            return given
        try:
            return [int(item) for item in given]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}={given!r} must be a number of layers, or their numbers, e.g. 0,2,3") from error

    def _check_method(self):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {', '.join(METHODS)}")
        if self.method != "traces" and not self.teacher_model_name_or_path:
            raise ValueError(f"method={self.method} needs teacher_model_name_or_path, a folder or Hub name")
        defaults = {each.name: each.default for each in fields(DistillRecipeConfig)}
        for name, methods in BELONGS.items():
            if self.method not in methods and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with method={self.method}, only with "
                    f"{' and '.join(methods)}; leave it out"
                )

    def _check_student(self):
        teacher = self.teacher_model_name_or_path
        given = [name for name in STUDENTS if getattr(self, name) is not None]
        if self.model_name_or_path == teacher and len(given) == 2:
            given.remove("model_name_or_path")  # put there below, before settings were copied
        if len(given) != 1:
            raise ValueError(
                f"the student is one of {', '.join(STUDENTS)}; given: {', '.join(given) or 'none of them'}"
            )
        if given == ["model_name_or_path"]:
            return
        if self.add_template_tokens:
            raise ValueError(
                f"add_template_tokens=true is for a student given by model_name_or_path; {given[0]} uses the teacher's "
                "tokenizer as it is: leave it out"
            )
        if teacher is None:
            raise ValueError(f"{given[0]} needs teacher_model_name_or_path, where the student's tokenizer comes from")
        self.model_name_or_path = teacher
        if self.student_config is not None:
            self._check_student_config()

    def _check_student_config(self):
        kind = self.student_config.get("model_type")
        if kind is None:
            raise ValueError("student_config has no model_type; add one, e.g. llama (dense) or deepseek_r1 (MoE)")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"student_config.model_type={kind!r} is unknown to transformers; take e.g. llama, qwen2")
        if "vocab_size" in self.student_config:
            raise ValueError("student_config.vocab_size follows from the teacher's; leave it out")
        config_class = CONFIG_MAPPING[kind]
        known = set(config_class().to_dict()) | {"rope_theta", "rope_scaling", "dtype"}
        check_names(self.student_config, known, "student_config")

    def _check_progressive(self):
        if self.progressive is None:
            return
        known = {each.name for each in fields(type(self)) if each.init} - {"method", "output_dir", "progressive"}
        for number, change in enumerate(self.progressive, 1):
            if not isinstance(change, dict) or not set(STUDENTS) & set(change):
                raise ValueError(
                    f"progressive, stage {number}: {json.dumps(change)} must be settings with one of "
                    f"{', '.join(STUDENTS)}"
                )
            check_names(change, known, f"progressive, stage {number}")
