"""Multi-token prediction: extra layers that each predict one token further ahead."""

import torch
from torch import nn

from .decoder import DeepSeekR1DecoderLayer
from .layout import drop_mtp_copies
from .linear_weights import project
from .norms import DeepSeekR1RMSNorm


class DeepSeekR1MTPLayer(DeepSeekR1DecoderLayer):
    """One prediction depth: combines the previous depth's states with the embeddings of the next tokens.

    h^k_i = norm(block(eh_proj([enorm(Emb(t_{i+k})); hnorm(h^{k-1}_i)]))), from which the shared output head predicts
    t_{i+k+1}. h^0 is the main model's output after its final norm, and each depth hands on its own normalised output.
    The order of the two halves and the norm before the head are those of the released weights.
    Source: DeepSeek-V3 (arXiv:2412.19437), Sec. 2.2, Eqs. 21-23.

    Shapes: next_embeds (B, S, D), hidden_states (B, S, D) -> (B, S, D), ready for the output head. Other arguments as
    in `DeepSeekR1DecoderLayer`.
    """

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.enorm = DeepSeekR1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = DeepSeekR1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        # Released files also hold copies of the embedding and the head here; `layout` writes and drops them.
        self.shared_head = nn.ModuleDict({"norm": DeepSeekR1RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.register_load_state_dict_pre_hook(drop_mtp_copies)

    def forward(self, hidden_states, next_embeds, **kwargs):
        halves = torch.cat((self.enorm(next_embeds), self.hnorm(hidden_states)), dim=-1)
        combined = project(self.eh_proj, halves)                                                           # Eq. 21
        return self.shared_head["norm"](super().forward(combined, **kwargs))                               # Eq. 22


def document_ids(position_ids):
    """(B, S) positions -> (B, S) int64: 0 for a row's first document, 1 for its second, ... A document starts where a
    position is not its left neighbour's successor."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(starts.long().cumsum(-1), (1, 0))


def shift_left(tensor, steps, fill):
    """tensor (B, S, ...) -> the same shape; entry i holds entry i + `steps`, the last `steps` hold `fill`."""
    tail = torch.full_like(tensor[:, :steps], fill)
    return torch.cat((tensor[:, steps:], tail), dim=1)


def shifted_labels(labels, steps, documents=None, ignore_index=-100):
    """Targets that lie `steps` tokens ahead: entry i is labels[i + steps], or `ignore_index` where that lies past the
    row's end or in another document. Shapes: labels (B, S) int64, documents (B, S) int64 or None -> (B, S)."""
    targets = shift_left(labels, steps, ignore_index)
    if documents is None:
        return targets
    return targets.masked_fill(shift_left(documents, steps, -1) != documents, ignore_index)
