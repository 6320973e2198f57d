"""Feature matching: which layers of student and teacher are compared, and the maps from one width to the other."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from recipes.distill_losses import feature_loss

FILE = "feature_projections.safetensors"


def _number(text, given):
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(
            f"feature_layers={given!r} must be a number of pairs, e.g. 2, or pairs student:teacher, e.g. 0:1,1:3"
        ) from error


def even_pairs(count, student_layers, teacher_layers):
    """`count` pairs of layers at equal depths, the last one of each model among them.

    >>> even_pairs(2, 2, 6)
    [(0, 2), (1, 5)]
    """
    last = lambda place, depth: max(round(place * depth / count) - 1, 0)
    return [(last(place, student_layers), last(place, teacher_layers)) for place in range(1, count + 1)]


def layer_pairs(given, student_layers, teacher_layers):
    """[(layer of the student, layer of the teacher)], from 0.

    Args:
        given: pairs "student:teacher"; one number: so many pairs, evenly spread; None: one pair for each layer of the
            shallower model.
    Raises:
        ValueError: for a layer that is not there.
    """
    if given is None:
        return even_pairs(min(student_layers, teacher_layers), student_layers, teacher_layers)
    if len(given) == 1 and ":" not in str(given[0]):
        count = _number(given[0], given)
        if not 1 <= count <= student_layers:
            raise ValueError(f"feature_layers={count} must lie in [1, {student_layers}], the student's layers")
        return even_pairs(count, student_layers, teacher_layers)
    pairs = []
    for text in given:
        student, _, teacher = str(text).partition(":")
        pair = _number(student, given), _number(teacher, given)
        if not (0 <= pair[0] < student_layers and 0 <= pair[1] < teacher_layers):
            raise ValueError(
                f"feature_layers={text}: the student has layers 0 to {student_layers - 1}, the teacher 0 to "
                f"{teacher_layers - 1}"
            )
        pairs.append(pair)
    return pairs


class FeatureProjections(nn.Module):
    """A linear map without bias for each pair of layers, where the widths differ; else the states as they are."""

    def __init__(self, pairs, student_width, teacher_width):
        super().__init__()
        differ = student_width != teacher_width
        self.maps = nn.ModuleList(
            nn.Linear(student_width, teacher_width, bias=False) if differ else nn.Identity() for _ in pairs
        )

    def forward(self, student_states, teacher_states):
        """Two lists of (N, D), one entry a pair -> () float32: Eq. 3 summed over tokens, mean over pairs."""
        losses = [
            feature_loss(each(student), teacher).sum()
            for each, student, teacher in zip(self.maps, student_states, teacher_states)
        ]
        return torch.stack(losses).mean()


class ProjectionCallback(TrainerCallback):
    """Keeps the maps in checkpoints, beside the student and not in it, and clears their gradients after each step."""

    def __init__(self, projections):
        self.projections = projections

    def save_to_checkpoint(self, folder, model):
        save_file({name: each.detach().cpu().contiguous() for name, each in self._weights().items()}, folder / FILE)

    def load_from_checkpoint(self, folder, model):
        self.projections.load_state_dict(load_file(Path(folder) / FILE))

    def checkpoint_bytes(self):
        return sum(each.numel() * each.element_size() for each in self._weights().values())

    def _weights(self):
        return self.projections.state_dict()

    def on_step_end(self, args, state, control, **kwargs):
        self.projections.zero_grad()  # the trainer clears the model's alone
