"""Packed documents on a GPU: attention that skips what lies in other documents, instead of a dense mask.

A mask (B, 1, S, S) drops torch's attention from cuDNN to a kernel that multiplies everything and is several times
slower. Here the rows are one long row, and flash attention is told where its documents begin: torch's own, or whichever
version `attn_implementation` names.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .experts import compute_dtype
from .fused import runs_fused


class Documents(NamedTuple):
    """Where the N documents of the joined rows lie.

    bounds: (N + 1,) int32, each one's first token, then the number of tokens. longest: length of the longest.
    """

    bounds: torch.Tensor
    longest: int

    def as_arguments(self):
        """What the library's flash attention functions call them; with these they join the rows."""
        return {
            "cu_seq_lens_q": self.bounds, "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest, "max_length_k": self.longest,
        }  # fmt: skip


def find_documents(position_ids, rows):
    """(B or 1, S) positions of `rows` rows -> Documents, or None if every row is one. Waits for the device.

    A document starts with a row, and where a position is not its left neighbour's successor.
    """
    starts = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    starts = starts.expand(rows, -1).flatten()
    begins = starts.nonzero().flatten()
    if begins.numel() == rows:
        return None
    bounds = F.pad(begins, (0, 1), value=starts.numel()).int()
    return Documents(bounds, int(bounds.diff().max()))


def attends_to_documents(model, inputs_embeds):
    """Whether the attention of a `DeepSeekR1Model` is told where documents lie: always under a flash attention, which
    takes no other mask; under torch's attention where `document_attention` serves: on CUDA in half precision, without
    dropout.

    Not where somebody put something else in the place of torch's attention, or hooks that can change an attention's
    arguments, as accelerate's context parallelism does: each process then has a part of the keys only.
    """
    config = model.config
    if any(layer.self_attn._forward_pre_hooks_with_kwargs for layer in model.layers):
        return False
    if is_flash_attention_requested(config):
        return not torch.compiler.is_compiling()  # how many there are is data
    return (
        config._attn_implementation == "sdpa"
        and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        and inputs_embeds.is_cuda
        and has_flash_attention(inputs_embeds.device)
        and runs_fused(inputs_embeds)
        and compute_dtype(inputs_embeds) in (torch.bfloat16, torch.float16)
        and not (model.training and config.attention_dropout)
        and config.v_head_dim <= config.qk_head_dim <= 256
        and config.qk_head_dim % 8 == 0
        and set(config.attention_types or ["latent"]) == {"latent"}
    )


def has_flash_attention(device):
    """Whether torch's flash attention was built, is not switched off, and runs on this GPU (Ampere or newer)."""
    return (
        torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def document_attention(queries, keys, values, documents, scaling):
    """Causal attention within each document, by torch's flash attention.

    Shapes: queries, keys (B, H, S, d), values (B, H, S, v), v <= d -> (B, S, H, v).
    """
    rows, _, _, width = queries.shape
    queries, keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (queries, keys, values))
    missing = width - values.shape[-1]  # this kernel takes one width only
    output = torch.ops.aten._flash_attention_forward(
        queries, keys, F.pad(values, (0, missing)) if missing else values, documents.bounds, documents.bounds,
        documents.longest, documents.longest, 0.0, True, False, scale=scaling,
    )[0]  # fmt: skip
    return output[..., : width - missing].unflatten(0, (rows, -1))
