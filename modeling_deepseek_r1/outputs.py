"""What the heads return, and how they find and score their targets."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


@dataclass
class DeepSeekR1CausalLMOutput(MoeCausalLMOutputWithPast):
    """
    Beside the library's fields (`loss` in nats, `logits`, `past_key_values`, `hidden_states`, `attentions`,
    `router_logits`):

        mtp_loss: () mean over the prediction depths of their cross-entropy, before `mtp_loss_coef`; in training.
        token_losses: (B, S) float32, entry i the cross-entropy in nats of predicting token i + 1, 0 where there is no
            label; with `return_token_losses=True`.
    """

    mtp_loss: torch.FloatTensor | None = None
    token_losses: torch.FloatTensor | None = None


def last_token_index(input_ids, attention_mask, pad_token_id, rows, length, device):
    """(B,) index of each row's last real token, whichever side the padding is on.

    Taken from the attention mask if given, else from `pad_token_id`; raises ValueError if several rows could be padded
    and neither can tell.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -length:].bool()
    elif pad_token_id is not None and input_ids is not None:
        real = input_ids != pad_token_id
    elif rows == 1:
        real = torch.ones(1, length, dtype=torch.bool, device=device)
    else:
        raise ValueError(
            f"cannot find the last token of {rows} rows: pass attention_mask, or set pad_token_id in the config"
        )
    positions = torch.arange(length, device=device)
    return (real.to(device) * positions).argmax(-1)


def token_regression_loss(logits, labels, num_items_in_batch=None, ignore_index=-100):
    """Mean squared error per token, for values and process rewards: logits (B, S, 1), labels (B, S) float, ignored
    where they are `ignore_index` -> (), divided by `num_items_in_batch` or by the number of labels."""
    labels = labels.to(logits.device)
    kept = labels != ignore_index
    squares = nn.functional.mse_loss(logits.squeeze(-1).float()[kept], labels[kept].float(), reduction="sum")
    return squares / (kept.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch)
