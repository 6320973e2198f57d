"""The settings of `recipes/grpo.py`: one typed dataclass, read from YAML and the command line."""

from dataclasses import dataclass

from recipes.grpo_arguments import R1GRPOConfig
from recipes.rl_config import RLRecipeSettings


@dataclass
class GRPORecipeConfig(RLRecipeSettings, R1GRPOConfig):
    """Everything of `R1GRPOConfig` and `RLRecipeSettings`.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """
