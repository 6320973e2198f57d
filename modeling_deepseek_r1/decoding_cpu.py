"""One token through one layer on a CPU, in fp32, with as few operations as there can be.

At batch 1 a processor spends as long on calling an operation as on a small matrix. `SingleTokenLayer` computes what
the layer's modules compute, from their weights, where nothing wraps these modules.
"""

import torch
import torch.nn.functional as F

from .attention import DeepSeekR1LatentAttention
from .experts import DeepSeekR1Experts
from .linear_weights import is_bare, is_plain
from .moe import DeepSeekR1MLP, DeepSeekR1MoE
from .norms import DeepSeekR1RMSNorm
from .rotary import rotate, softmax_scale
from .routing import ROUTERS

READ_MODULES = (
    DeepSeekR1LatentAttention, DeepSeekR1RMSNorm, DeepSeekR1MLP, DeepSeekR1MoE, DeepSeekR1Experts, *ROUTERS.values()
)  # fmt: skip


def normalise(states, weight, epsilon, out=None):
    """RMS norm of one row; states (1, D) or a part of its columns -> (1, D)."""
    row = states[0]
    scale = (float(torch.dot(row, row)) / len(row) + epsilon) ** -0.5
    return torch.mul(states * scale, weight, out=out)


def _row_product():
    """oneDNN's product of few rows, where torch was built with it: F.linear's reads weights half as fast (on 2 cores 9
    against 18 GB/s for (4096, 512) fp32), because it asks MKL for a matrix times a vector."""
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    if product is None:
        return F.linear
    return lambda row, weight: product(row, weight, None, "none", [], "")


row_product = _row_product()


class SingleTokenLayer:
    """A decoder layer for one new token of one row, over its modules' own weights.

    Source: DeepSeek-V2 (arXiv:2405.04434), Sec. 2.1.2, as `ModuleStep`. Make it anew when weights have moved.

    Shapes (D hidden_size, W the cache's width): states (1, D) -> (1, D), the residual included; stored (n, W), the row
    of the cache up to the new token, whose place is the last and is filled here; angles (1, R / 2) complex64, and cos,
    sin (1, R / 2).
    """

    def __init__(self, layer, config, kv_b_weight):
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.rank, self.rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.nope, self.interleave, self.scale = config.qk_nope_head_dim, config.rope_interleave, softmax_scale(config)
        self.by_key, self.by_value = kv_b_weight.view(self.heads, -1, self.rank).split(
            (self.nope, config.v_head_dim), dim=1
        )
        # Looked up once: a module's attribute costs as much as an operation on a row.
        self.norms = [
            (norm.weight, norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm, attention.kv_a_layernorm)
        ]
        self.query_weights, self.query_norm = [attention.q_proj.weight] if attention.q_lora_rank is None else [], None
        if not self.query_weights:
            self.query_weights = [attention.q_a_proj.weight, attention.q_b_proj.weight]
            self.query_norm = attention.q_a_layernorm.weight, attention.q_a_layernorm.variance_epsilon
        self.compress, self.output = attention.kv_a_proj_with_mqa.weight, attention.o_proj.weight
        self.gate = mlp.gate if isinstance(mlp, DeepSeekR1MoE) else None
        self.dense = mlp if self.gate is None else mlp.shared_experts
        if self.dense is not None:
            dense = self.dense
            self.dense = dense.act_fn, dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight
        if self.gate is not None:
            self.router, self.act_fn = self.gate.weight, mlp.experts.act_fn
            self.gate_up = mlp.experts.gate_up_proj.unbind(0)
            self.down = mlp.experts.down_proj.unbind(0)

    @staticmethod
    def serves(layer):
        """Whether all modules of a layer are those that this class reads, bare, in fp32."""
        attention, mlp = layer.self_attn, layer.mlp
        if type(attention) is not DeepSeekR1LatentAttention or type(mlp) not in (DeepSeekR1MLP, DeepSeekR1MoE):
            return False
        return all(
            name.endswith("act_fn") or is_plain(module) or (type(module) in READ_MODULES and is_bare(module))
            for part in (layer.input_layernorm, layer.post_attention_layernorm, attention, mlp)
            for name, module in part.named_modules()
        ) and all(parameter.dtype == torch.float32 for parameter in layer.parameters())

    def __call__(self, states, stored, rotation, routes=None):
        before_attention, before_mlp, _ = self.norms
        values = self.attend(normalise(states, *before_attention), stored, rotation)
        states = row_product(values, self.output).add_(states)
        normed = normalise(states, *before_mlp)
        if self.dense is not None:
            act_fn, gate, up, down = self.dense
            inner = act_fn(row_product(normed, gate)).mul_(row_product(normed, up))
            states.add_(row_product(inner, down))
        return states if self.gate is None else self.add_experts(states, normed, routes)

    def attend(self, normed, stored, rotation):
        """(1, D) -> values (1, H * v)."""
        heads, rank, nope = self.heads, self.rank, self.nope
        queries = row_product(normed, self.query_weights[0])
        if self.query_norm is not None:
            queries = row_product(normalise(queries, *self.query_norm), self.query_weights[1])
        queries = queries.mul_(self.scale).view(heads, -1)
        latent, key_rope = row_product(normed, self.compress).split((rank, self.rope), dim=1)
        query_nope, query_rope = queries.split((nope, self.rope), dim=1)
        rotated = self.rotate(torch.cat((query_rope, key_rope)), rotation)
        torch.cat((normalise(latent, *self.norms[2]), rotated[heads:]), dim=1, out=stored[-1:])

        # Products of a matrix and a vector per head: torch's batched product takes three times as long for them.
        query_latent = (self.by_key * query_nope.unsqueeze(2)).sum(1)
        weights = torch.mm(torch.cat((query_latent, rotated[:heads]), dim=1), stored.t()).softmax(-1)
        attended = torch.mm(weights, stored[:, :rank])
        return (self.by_value * attended.unsqueeze(1)).sum(2).view(1, -1)

    def rotate(self, states, rotation):
        """(n, R) -> (n, R), half-split."""
        angles, cos, sin = rotation
        if not self.interleave:
            return rotate(states, cos, sin, False)
        turned = torch.view_as_complex(states.view(-1, self.rope // 2, 2)) * angles
        return torch.view_as_real(turned).transpose(1, 2).reshape(-1, self.rope)

    def add_experts(self, states, normed, routes):
        """Adds the routed experts' outputs to states (1, D), in place. Reads the indices on the host."""
        gate, act_fn = self.gate, self.act_fn
        scores = gate.score(row_product(normed, self.router))
        indices = gate.select(scores)
        if routes is not None:
            routes.append(indices)
        weights = scores.gather(-1, indices)[0].tolist()
        factor = gate.routed_scaling_factor / (max(sum(weights), 1e-20) if gate.norm_topk_prob else 1.0)
        for expert, weight in zip(indices[0].tolist(), weights):
            opened, up = row_product(normed, self.gate_up[expert]).chunk(2, dim=1)
            states.add_(row_product(act_fn(opened).mul_(up), self.down[expert]), alpha=weight * factor)
        return states
