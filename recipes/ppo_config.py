"""The settings of `recipes/ppo.py`: one typed dataclass, read from YAML and the command line."""

from dataclasses import dataclass

from recipes.ppo_arguments import PPOConfig
from recipes.rl_config import RLRecipeSettings


@dataclass
class PPORecipeConfig(RLRecipeSettings, PPOConfig):
    """Everything of `PPOConfig` and `RLRecipeSettings`.

    Raises:
        ValueError: for settings that cannot work, naming the field, its value and the way out.
    """
