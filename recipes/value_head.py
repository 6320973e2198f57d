"""The value function of PPO: a head on the policy's own trunk, or a model of its own.

Either is a submodule `value_head` of the causal LM and runs inside the LM's forward pass, so that DDP, FSDP, the
optimizer and the checkpoints see it. On disk it is a file of its own, and the policy beside it a plain causal LM.
"""

import contextlib
import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import FusedCausalLMOutput

from recipes.rl_setup import load_named

VALUE_FILE = "value_head.safetensors"
KINDS = ("shared", "separate")


@dataclass
class PPOModelOutput(FusedCausalLMOutput):
    """`FusedCausalLMOutput` and `value_preds` (B, S) float32: value of the state after each token."""

    value_preds: torch.Tensor | None = None


class ValueHead(nn.Module):
    """V(s) of the state after each token, in float32 also under autocast; 0 everywhere at first.

    A trunk of its own gets a linear head, as a reward model has it. The last states of the policy's trunk are made to
    predict the next token and say little about how the text went so far, so that the head on them looks back itself:

        u_t = silu(A [h_t; h_t-1]),    m_t = mean of u_1 ... u_t,    V_t = w . silu(B [u_t; m_t])

    over the tokens that are no padding (measured against other heads: benchmarks/LOG.md, PPO against TRL's).

    Args:
        trunk: None: the policy's hidden states are used; else a backbone of its own.
    Attributes:
        trunk_gradient: whether the values' gradient goes on into the policy's hidden states.
    Shapes: hidden_states (B, S, D) of the policy -> (B, S) float32.
    """

    trunk_gradient = False

    def __init__(self, hidden_size, trunk=None):
        super().__init__()
        self.trunk = trunk
        if trunk is None:
            self.step = nn.Linear(2 * hidden_size, hidden_size, dtype=torch.float32)
            self.hidden = nn.Linear(2 * hidden_size, hidden_size, dtype=torch.float32)
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_states, inputs):
        if self.trunk is not None:
            names = ("input_ids", "attention_mask", "position_ids")
            given = {name: inputs[name] for name in names if inputs.get(name) is not None}
            hidden_states = self.trunk(**given, use_cache=False).last_hidden_state
        elif not self.trunk_gradient:
            hidden_states = hidden_states.detach()
        with torch.autocast(hidden_states.device.type, enabled=False):
            # float32 where the weights are: FSDP and DeepSpeed may hand them out in bfloat16
            hidden_states = hidden_states.to(self.linear.weight.dtype)
            if self.trunk is None:
                hidden_states = self._look_back(hidden_states, inputs.get("attention_mask"))
            return self.linear(hidden_states).squeeze(-1).float()

    def _look_back(self, hidden_states, mask):
        """(B, S, D) states, mask (B, S) or None -> (B, S, D) features of each prefix."""
        real = torch.ones_like(hidden_states[..., :1]) if mask is None else mask.unsqueeze(-1).to(hidden_states.dtype)
        previous = nn.functional.pad(hidden_states * real, (0, 0, 1, 0))[:, :-1]
        steps = nn.functional.silu(self.step(torch.cat([hidden_states, previous], -1))) * real
        means = steps.float().cumsum(1) / real.float().cumsum(1).clamp(min=1)
        return nn.functional.silu(self.hidden(torch.cat([steps, means.to(steps.dtype)], -1)))


def _model_of(model):
    """(trunk, weight of its scalar head or None) of a reward model or any other model with a backbone."""
    if isinstance(model, str):
        load = functools.partial(
            AutoModelForSequenceClassification.from_pretrained, num_labels=1, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
        model, report = load_named("value_model_name_or_path", model, load)
        fresh = any(name.startswith("score.") for name in report["missing_keys"])
    else:
        fresh = False
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear) and score.out_features != 1:
        raise ValueError(f"value_model: its head has {score.out_features} outputs, a value is one: set num_labels=1")
    weight = score.weight if isinstance(score, nn.Linear) and not fresh else None
    return model.base_model, weight


def build_value_head(policy, kind, source=None):
    """The `ValueHead` of a policy.

    Args:
        policy: the causal LM (without PEFT's wrapper).
        kind: "shared" (the policy's trunk) or "separate" (a trunk of its own).
        source: separate: a reward model, as InstructGPT has it (arXiv:2203.02155, Sec. 3.5), or another model, or a
            folder or Hub name of one; None: a copy of the policy's trunk. shared: a folder with an earlier run's
            `value_head.safetensors`. None starts at 0.
    Raises:
        ValueError: for an unknown kind, a source that does not fit the policy's tokens, or a folder without values.
    """
    config = policy.config.get_text_config()
    if kind not in KINDS:
        raise ValueError(f"value_function={kind!r} must be one of {', '.join(KINDS)}")
    if isinstance(source, str) and (Path(source) / VALUE_FILE).is_file():
        with safe_open(Path(source) / VALUE_FILE, "pt") as file:
            saved = (file.metadata() or {}).get("kind", "shared")
        if saved != kind:
            raise ValueError(
                f"value_model_name_or_path={source} holds a {saved} value function; set value_function={saved}"
            )
        head = ValueHead(config.hidden_size) if kind == "shared" else _separate_head(policy, None)
        load_value_head(head, source)
        return head
    if kind == "shared":
        if source is not None:
            raise ValueError(
                f"value_model_name_or_path={source} has no {VALUE_FILE}: value_function=shared reads only that from an "
                "earlier run; leave it out, or set value_function=separate"
            )
        return ValueHead(config.hidden_size)
    return _separate_head(policy, source)


def _copy_trunk(policy):
    """A float32 copy of the policy's trunk, adapters merged into its weights."""
    if getattr(policy, "is_quantized", False) or is_deepspeed_zero3_enabled():
        raise ValueError(
            "value_function=separate cannot copy a policy that is quantised or spread out by DeepSpeed ZeRO-3; give a "
            "model as value_model_name_or_path, e.g. the reward model, or set value_function=shared"
        )
    trunk = copy.deepcopy(policy.base_model).float()
    for name, module in reversed(list(trunk.named_modules())):  # an adapter may wrap another one
        if isinstance(module, BaseTunerLayer):
            module.merge()
            trunk.set_submodule(name, module.get_base_layer())
    return trunk


def _separate_head(policy, source):
    if source is None:
        trunk, weight = _copy_trunk(policy), None
    else:
        trunk, weight = _model_of(source)
    text_config = trunk.config.get_text_config()
    if text_config.vocab_size < policy.config.get_text_config().vocab_size:
        raise ValueError(
            f"value_model: its vocabulary ({text_config.vocab_size}) is smaller than the policy's "
            f"({policy.config.get_text_config().vocab_size}): it must read the policy's tokens"
        )
    trunk.requires_grad_(True)
    for layer in getattr(trunk, "mtp_layers", ()):  # they see no token here
        layer.requires_grad_(False)
    head = ValueHead(text_config.hidden_size, trunk)
    if weight is not None:
        with torch.no_grad():
            head.linear.weight.copy_(weight)
    return head


# ---------------------------------------------------------------- on disk


@contextlib.contextmanager
def without_value_head(model):
    """The causal LM as a plain one, for the time being; yields its value head, or None."""
    head = model._modules.pop("value_head", None)
    try:
        yield head
    finally:
        if head is not None:
            model.value_head = head


def save_value_head(head, folder, state_dict=None):
    """Writes `value_head.safetensors`; `state_dict`: the head's gathered weights where they are sharded."""
    state = head.state_dict() if state_dict is None else state_dict
    kind = "shared" if head.trunk is None else "separate"
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(state, Path(folder) / VALUE_FILE, metadata={"format": "pt", "kind": kind})


def load_value_head(head, folder):
    """Reads what `save_value_head` wrote. Raises ValueError where the file is missing or does not fit."""
    path = Path(folder) / VALUE_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: PPO did not write {folder}, or it was copied without its value function")
    try:
        head.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this value function: {json.dumps(str(error)[:300])}") from error
