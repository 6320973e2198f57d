"""FlashAttention-4, `attn_implementation="flash_attention_4"`, on queries, keys and values as wide as they are.

The library's function of that name pads values to the width of queries and keys (128 to 192 in released models: a copy,
and a fifth more multiplications). Here whole rows, as in training, go to the kernels unpadded, and documents by their
bounds. What comes with padding or a cache goes through the library's function, to the same kernels.
"""

import os

import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLASH_ATTENTION_4 = "flash_attention_4"
DTYPES = (torch.bfloat16, torch.float16)


def attends_unpadded(implementation, queries, keys, attention_mask, documents=None, **kwargs):
    """Whether `flash_attention_4` serves these arguments of an attention function: the rows whole and causal.

    Not where somebody put another function in the place of the library's, or, without our `documents`, where the caller
    gives the library bounds of its own.
    """
    return (
        implementation == FLASH_ATTENTION_4
        and ALL_ATTENTION_FUNCTIONS[FLASH_ATTENTION_4] is flash_attention_forward
        and attention_mask is None
        and queries.shape[2] == keys.shape[2]
        and kwargs.get("is_causal") is not False
        and (documents is not None or kwargs.get("cu_seq_lens_q") is None)
    )


def flash_attention_4(queries, keys, values, scaling, documents=None, dropout=0.0):
    """Causal attention over whole rows, or within each document of the joined rows.

    The first call for a pair of widths compiles for seconds. The backward pass sums queries' gradients in a fixed order
    only where torch.use_deterministic_algorithms or, as in the library, FLASH_ATTENTION_DETERMINISTIC=1 asks for it.
    Source: FlashAttention-3 (arXiv:2407.08608) describes the algorithm on Hopper; the kernels are flash-attn-4's.

    Shapes (B batch, H heads, S sequence): queries, keys (B, H, S, d), values (B, H, S, v), documents as
    `find_documents` gives them -> (B, S, H, v).
    Raises:
        ImportError: without the package.
        ValueError: for dropout, another dtype than bfloat16 or float16, widths that are no multiples of 8 up to 256.
            Hopper takes all of these; what another card does not, the package says.
    """
    _check(queries, keys, values, dropout)
    dense, variable = _kernels()
    deterministic = torch.are_deterministic_algorithms_enabled() or _deterministic_by_environment()
    settings = {"softmax_scale": scaling, "causal": True, "deterministic": deterministic}
    queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))
    if documents is None:
        return _output(dense(queries, keys, values, **settings))
    output = variable(
        *(part.flatten(0, 1) for part in (queries, keys, values)),
        cu_seqlens_q=documents.bounds, cu_seqlens_k=documents.bounds,
        max_seqlen_q=documents.longest, max_seqlen_k=documents.longest, **settings,
    )  # fmt: skip
    return _output(output).unflatten(0, queries.shape[:2])


def _kernels():
    """The package's functions for rows of one length and of several."""
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(
            f'attn_implementation="{FLASH_ATTENTION_4}" needs the package flash-attn-4 (pip install --pre '
            f'"flash-attn-4[cu13]"), which does not import: {error}; or take attn_implementation="sdpa"'
        ) from error
    return flash_attn_func, flash_attn_varlen_func


def _deterministic_by_environment():
    return os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"


def _output(returned):
    return returned[0] if isinstance(returned, tuple) else returned  # some versions add the log-sum-exp


def _check(queries, keys, values, dropout):
    instead = f'with attn_implementation="{FLASH_ATTENTION_4}"; or take "sdpa"'
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: the kernels have none, set 0 {instead}")
    dtypes = {part.dtype for part in (queries, keys, values)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"queries, keys and values are {names}: load weights in bfloat16 or float16, or use autocast (bf16=true), "
            f"{instead}"
        )
    widths = queries.shape[-1], values.shape[-1]
    if any(width % 8 or width > 256 for width in widths):
        raise ValueError(
            f"qk_nope_head_dim + qk_rope_head_dim={widths[0]} and v_head_dim={widths[1]} must be multiples of 8 up to "
            f"256 {instead}"
        )
