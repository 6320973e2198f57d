"""The settings of `recipes/sft.py`: one typed dataclass, read from YAML and the command line."""

from dataclasses import dataclass, fields

from trl import SFTConfig

from recipes.run_settings import RunSettings, setting
from recipes.sft_data import MULTI_TURN, OVERLONG
from recipes.stage_settings import AdapterSettings, ModelSettings, TaskSettings, check_rules

# Fields of TRL's that prepare data or model in its own way, too late here: what takes their place.
REPLACED = {
    "chat_template_path": "chat_template", "completion_only_loss": "assistant_only_loss", "truncation_mode": "overlong",
    "dataset_text_field": "a column called text", "dataset_kwargs": "the fields listed under data by --help",
    "eos_token": "tokenizer_name_or_path with that token",
}  # fmt: skip


@dataclass
class SFTRecipeConfig(ModelSettings, AdapterSettings, TaskSettings, RunSettings, SFTConfig):
    """Everything of `trl.SFTConfig`, and the fields below.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """

    # -- model
    add_template_tokens: bool = setting(
        False, "Give the tokenizer the tokens that chat_template is made of and it lacks; the embeddings grow."
    )
    mtp_loss_coef: float | None = setting(
        None, "Weight of the multi-token-prediction loss. Default: the model's own; 0 freezes these layers."
    )
    # -- data
    dataset_name: str | None = setting(
        None, "Folder with train.jsonl (and test.jsonl), a .jsonl or .parquet file, or a Hub name[:configuration]."
    )
    validation_fraction: float = setting(0.02, "Share of the problems held out where the data set has no test split.")
    max_length: int | None = setting(1024, "Tokens of an example, and of a packed row.")
    multi_turn: str = setting("split", f"Conversations of several turns: {', '.join(MULTI_TURN)}; see sft_data.py.")
    overlong: str = setting("shorten", f"Examples longer than max_length: {', '.join(OVERLONG)}; see sft_data.py.")
    errors: str = setting("strict", "Bad conversations: strict stops at the first, skip leaves them out and counts.")
    assistant_only_loss: bool = setting(True, "Train on reasoning, answer and end token only.")
    packing: bool = setting(
        True, "Several examples a row, which do not see each other (under packing_strategy wrapped they do)."
    )
    # -- what to do
    dry_run: bool = setting(False, "Print what the data become, then stop.")

    def __post_init__(self):
        super().__post_init__()
        self._check_choices()
        self._check_of_trl()
        check_rules(
            self,
            (
                ("max_length", self.max_length is not None and self.max_length >= 8, "at least 8"),
                ("validation_fraction", 0 <= self.validation_fraction < 1, "in [0, 1)"),
                ("label_smoothing_factor", 0 <= self.label_smoothing_factor < 1, "in [0, 1)"),
                ("mtp_loss_coef", self.mtp_loss_coef is None or self.mtp_loss_coef >= 0, "zero or more"),
            ),
        )

    def _check_choices(self):
        for name, allowed in (("multi_turn", MULTI_TURN), ("overlong", OVERLONG), ("errors", ("strict", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.add_template_tokens and self.lora_rank:
            raise ValueError(
                f"add_template_tokens=true adds rows of embedding, which lora_rank={self.lora_rank} leaves untrained; "
                "set lora_rank=0, or use a chat_template that needs no new tokens, e.g. deepseek_r1_zero"
            )
        if self.add_template_tokens and not self.chat_template:
            raise ValueError("add_template_tokens=true has no effect without chat_template; set it, e.g. deepseek_r1")
        if self.loss_type != "nll" and self.label_smoothing_factor:
            raise ValueError(f"loss_type={self.loss_type} has no label smoothing; set label_smoothing_factor to 0")

    def _check_of_trl(self):
        defaults = {field.name: field.default for field in fields(SFTConfig)}
        for name, instead in REPLACED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here; leave it out and use {instead}")
        if self.padding_free and not self.packing:
            raise ValueError("padding_free=true needs packing=true here, which is free of padding by itself")
        if self.eval_packing and not self.packing:
            raise ValueError("eval_packing=true needs packing=true: else examples of a row would see each other")
