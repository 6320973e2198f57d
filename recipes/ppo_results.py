"""PPO inside a run folder."""

from recipes.ppo_trainer import PPOTrainer
from recipes.rl_results import RecipeRLMixin, announce_run


class RecipePPOTrainer(RecipeRLMixin, PPOTrainer):
    """`PPOTrainer` with checkpoints that survive a kill and tokens/s."""

    def create_optimizer(self, *args, **kwargs):
        # Here, outermost: the recipes' choice of an optimizer does not ask the trainers below it.
        return self.part_value_function(super().create_optimizer(*args, **kwargs))


def announce(trainer, facts):
    """The head of a run, printed and stored."""
    args = trainer.args
    epochs = f"{args.num_ppo_epochs} epochs of {args.num_mini_batches} optimizer steps on each rollout"
    announce_run(trainer, facts, "ppo", {"value function": args.value_function, "PPO": epochs})
