"""Bytes that our own model keeps for the backward, derived from what its fused training functions save.

Which tensor is kept by whom, for one layer and one token (w bytes of the compute dtype, r of the residual stream):

    input and post-attention norm   2 (D r + 4)              the residual sums and 1 / rms
    q_proj, kv_a_proj               D w                      the normed states, once for both
    latents                         (2 r_q + 2 r_kv + R) w   each before and after its norm (r_q only with q_lora_rank)
    attention                       H (2 (N + R) + N + 2 V) w + 4 H    queries, keys, expanded latents (values are a
                                                             view of them), output; log-sum-exp
    shared experts, router, rows    D w                      the normed states, once for all
    gate and up                     2 I w                    of a dense layer or the shared experts; their product is
                                                             made again
    routed experts                  K (D + 3 I_e) w          gathered rows, gate-up product and what the down projection
                                                             reads; `training_experts`
    router                          4 E + 20 K               logits in fp32, indices, weights, order and its inverse

(D hidden_size, H heads, N nope, R rope, V value, E experts, K choices, I and I_e inner widths.) MTP adds to its block
the next token's embedding, both normed halves and the state they come from. tests/recipes/test_activation_memory.py
counts the saved bytes of a real model, and holds the whole to peaks measured on an H100.

The plain paths (torch.compile, a CPU in fp32, the library's classes) save more or other tensors than these.
"""

import contextlib
import functools

import torch

from modeling_deepseek_r1.kernels_cross_entropy import fused_chunk_rows


def counts_exactly(config):
    """Whether `config` is of the model that the formulas here describe."""
    return config.model_type == "deepseek_r1"


def _inner_width(config, sparse):
    """Of the part that every token visits: the dense MLP, or the shared experts."""
    return config.moe_intermediate_size * (config.n_shared_experts or 0) if sparse else config.intermediate_size


def layer_bytes(config, sparse, width, residual, selective=False, room=1):
    """Saved bytes of one decoder layer and one token; the table above. `selective`: without the inside of experts and
    MLPs, which is made again. `room`: rows of experts that memory is taken for, in times of their mean."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    expanded = config.qk_nope_head_dim + config.v_head_dim
    latents = 2 * (config.q_lora_rank or 0) + 2 * config.kv_lora_rank + config.qk_rope_head_dim
    attention = heads * (2 * config.qk_head_dim + expanded + config.v_head_dim)
    norms = 2 * (hidden * residual + 4) + 4 + (4 if config.q_lora_rank else 0)
    total = norms + width * (2 * hidden + latents + attention) + 4 * heads
    total += 0 if selective else 2 * width * _inner_width(config, sparse)
    if sparse:
        choices = config.num_experts_per_tok
        total += 0 if selective else room * choices * width * (hidden + 3 * config.moe_intermediate_size)
        total += 4 * config.n_routed_experts + 20 * choices
    return total


def layer_kinds(config):
    """[sparse?] per layer, MTP blocks included."""
    count = config.num_hidden_layers + (getattr(config, "num_nextn_predict_layers", 0) or 0)
    if not getattr(config, "n_routed_experts", None):
        return [False] * count
    every = getattr(config, "moe_layer_freq", 1) or 1
    return [i >= config.first_k_dense_replace and i % every == 0 for i in range(count)]


def trained_depths(config):
    """MTP depths that a training step runs."""
    return config.num_nextn_predict_layers if config.mtp_loss_coef else 0


def activation_bytes(config, tokens, width, residual, checkpointing=False, room=1):
    """Saved by all layers and final norms, in bytes.

    With checkpointing: every layer's input, and one whole layer, the one whose turn it is. "selective": every layer
    without the inside of its experts and MLPs, and that of one layer. `room`: see `layer_bytes`.
    """
    kinds, depths = layer_kinds(config), trained_depths(config)
    kinds = kinds[: config.num_hidden_layers + depths]
    hidden = config.hidden_size

    def of_layers(selective):
        of_kind = functools.cache(lambda sparse, stream: layer_bytes(config, sparse, width, stream, selective, room))
        # An MTP block's residual stream starts at a projection's output, so it has the compute dtype.
        own = config.num_hidden_layers
        return [of_kind(sparse, residual if place < own else width) for place, sparse in enumerate(kinds)]

    per_layer = of_layers(False)
    ends = hidden * residual + 4 + depths * (hidden * (residual + 4 * width) + 12)
    if checkpointing == "selective":
        kept = of_layers(True)
        saved = sum(kept) + max(whole - part for whole, part in zip(per_layer, kept))
    else:
        saved = len(per_layer) * hidden * residual + max(per_layer) if checkpointing else sum(per_layer)
    return int(tokens * (saved + ends))


def packed_weight_bytes(config, width, checkpointing=False):
    """The gate and up matrices that a gated MLP joins and keeps: 2 I D of every layer, or of one."""
    of_kind = functools.cache(lambda sparse: 2 * _inner_width(config, sparse) * config.hidden_size)
    sizes = [of_kind(sparse) for sparse in layer_kinds(config)]
    return width * (max(sizes) if checkpointing else sum(sizes))


def loss_bytes(config, tokens, width):
    """Of the head's loss: a chunk of logits, and by each depth the head's gradient in fp32 and the states' gradient."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    chunk = fused_chunk_rows(tokens, vocabulary, width) * vocabulary * width
    return chunk + (1 + trained_depths(config)) * (4 * vocabulary * hidden + tokens * hidden * width)


def backward_bytes(config, tokens, width, experts=1, room=1):
    """Beside what is saved, at the deepest point of a layer's backward: gradients of rows, of the gated product and of
    gate and up, the product made again, and the layer's weight gradients. `experts`: share of the experts here; `room`:
    see `layer_bytes`."""
    hidden, sparse = config.hidden_size, any(layer_kinds(config))
    rows, inner = tokens, _inner_width(config, sparse)
    if sparse:
        rows, inner = room * tokens * config.num_experts_per_tok, config.moe_intermediate_size
    weights = 3 * hidden * inner * (experts * config.n_routed_experts if sparse else 1)
    return int(width * (rows * (hidden + 4 * inner) + weights))


@contextlib.contextmanager
def counting_saved_bytes(model):
    """A list that, after the block, holds one number: bytes of all storages saved for the backward, weights aside."""
    storages, found = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (tensor, storage.nbytes())  # the tensor keeps the address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    for weight in [*model.parameters(), *model.buffers()]:
        storages.pop(weight.untyped_storage().data_ptr(), None)
    found.append(sum(size for _, size in storages.values()))
