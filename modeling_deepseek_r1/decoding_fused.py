"""The decoding step in fused kernels, for plain weights on a GPU: eight launches a layer at batch 1.

    norm + [q_proj; kv_a_proj] | rotate, write the cache, absorb W_UK | attention, split over the context
    | join splits, W_UV | o_proj + residual | norm + router | experts' gate/up | experts' down + shared + residual

With more tokens than `kernels_linear.MAX_ROWS` the dense projections are ordinary matrix products.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .attention import DeepSeekR1LatentAttention
from .decoding_step import ModuleStep
from .experts import DeepSeekR1Experts
from .fused import kernels_run_on
from .kernels_drafting import begin as begin_step
from .kernels_drafting import best_of_logits, best_tokens
from .kernels_experts import FEW_TOKENS, experts_forward
from .kernels_linear import MAX_ROWS, few_rows_linear
from .kernels_routing import choose_experts, has_exact_product, route
from .linear_weights import is_bare, is_plain
from .moe import DeepSeekR1MLP, DeepSeekR1MoE
from .norms import DeepSeekR1RMSNorm
from .routing import SigmoidGroupRouter, SoftmaxGroupRouter, SoftmaxRouter

# (scoring, how a group is scored) of the routers that the routing kernel computes.
ROUTER_KERNELS = {
    SigmoidGroupRouter: ("sigmoid", "sum2"),
    SoftmaxRouter: ("softmax", None),
    SoftmaxGroupRouter: ("softmax", "max"),
}
# Modules whose weights are read; linear layers have a rule of their own.
READ_MODULES = (DeepSeekR1LatentAttention, DeepSeekR1RMSNorm, DeepSeekR1MLP, DeepSeekR1MoE, DeepSeekR1Experts,
                *ROUTER_KERNELS)  # fmt: skip


def is_read(name, module):
    """Whether the kernels compute what calling a decoder layer's module would: nothing wraps it or hooks into it."""
    if name.endswith("act_fn") or name.startswith("branch") or type(module) is nn.ModuleDict:
        return True  # what the config names; nothing outside of training; a container
    return is_plain(module) or (type(module) in READ_MODULES and is_bare(module))


class KernelStep(ModuleStep):
    """`ModuleStep` with the same results to rounding, reading the weights themselves instead of calling modules.

    Where the model computes in another dtype than its weights' (fp32 weights under bf16 autocast), copies in the
    compute dtype are read; `refresh` fills them anew, in place.
    """

    def __init__(self, model, dtype, options):
        super().__init__(model, dtype, options)
        self.copies, self.layers = {}, {}
        self.tickets, self.retired = None, []
        self.embedding, self.norm_weight = self.weight(model.model.embed_tokens), self.weight(model.model.norm)
        self.head_weight = self.weight(model.lm_head)

    @staticmethod
    def serves(model, dtype, options):
        """Whether the kernels compute exactly this model: CUDA, plain layers without biases, SiLU, known routers."""
        device = model.model.embed_tokens.weight.device
        if not (options.kernels and kernels_run_on(device)) or model.config.hidden_act != "silu":
            return False
        parts = [(name, part) for layer in model.model.layers for name, part in layer.named_modules() if name]
        embedding, norm = model.model.embed_tokens, model.model.norm
        return (
            all(is_read(name, part) for name, part in parts) and is_read("norm", norm) and is_plain(model.lm_head)
            and type(embedding) is nn.Embedding and is_bare(embedding)
            and all(parameter.device == device for parameter in model.parameters())
        )

    # ------------------------------------------------------------ weights

    def weight(self, owner):
        """A weight, or a module's, in the compute dtype: the parameter itself, or a copy that `refresh` fills."""
        parameter = owner if isinstance(owner, torch.Tensor) else owner.weight
        if parameter.dtype == self.dtype:
            return parameter.detach()
        if parameter not in self.copies:
            self.copies[parameter] = parameter.detach().to(self.dtype)
        return self.copies[parameter]

    def of_layer(self, index):
        """{name: weight} of a layer, gathered once."""
        if index in self.layers:
            return self.layers[index]
        layer = self.model.model.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        found = {"input_norm": layer.input_layernorm, "post_norm": layer.post_attention_layernorm,
                 "kv_a": attention.kv_a_proj_with_mqa, "o": attention.o_proj}  # fmt: skip
        if attention.q_lora_rank is None:
            found["q"] = attention.q_proj
        else:
            found |= {"q_a": attention.q_a_proj, "q_a_norm": attention.q_a_layernorm, "q": attention.q_b_proj}
        dense = mlp if type(mlp) is DeepSeekR1MLP else mlp.shared_experts
        if dense is not None:
            found |= {"gate": dense.gate_proj, "up": dense.up_proj, "down": dense.down_proj}
        if dense is not mlp:
            found |= {"experts_up": mlp.experts.gate_up_proj, "experts_down": mlp.experts.down_proj}
        self.layers[index] = {name: self.weight(owner) for name, owner in found.items()}
        return self.layers[index]

    @torch.no_grad()
    def refresh(self):
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))
        super().refresh()

    # ------------------------------------------------------------ the step

    def __call__(self, tokens, inputs):
        return self.normed(self.last_hidden(tokens, inputs), self.norm_weight).view(*tokens.shape, -1)

    def last_hidden(self, tokens, inputs, further=0):
        """tokens (B, S) -> (B * S, D), the states before the final norm. `further`: passes over MTP layers to come that
        find their expert counts behind those of all layers."""
        hidden = torch.empty(tokens.numel(), self.embedding.shape[1], dtype=self.dtype, device=self.device)
        begin_step(tokens, self.embedding, hidden, self.scratch(len(hidden), inputs, further))
        for index in range(self.config.num_hidden_layers):
            hidden = self.layer(index, hidden, inputs)
        return hidden

    def best(self, hidden, norm_weight, winners, picks=None):
        """The head's best tokens behind states (T, D) before their norm, or behind rows `picks` of them, packed: in
        `winners` (>= T, SLOTS), which is in order for few rows, or in a tensor of their own."""
        rows = len(hidden) if picks is None else len(picks)
        if rows <= MAX_ROWS:
            best_tokens(hidden, norm_weight, self.config.rms_norm_eps, self.head_weight, winners[:rows], picks)
            return winners[:rows]
        hidden = hidden if picks is None else hidden.index_select(0, picks)
        return best_of_logits(F.linear(self.normed(hidden, norm_weight), self.head_weight))

    def head(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        if len(flat) > MAX_ROWS:
            return F.linear(hidden_states, self.head_weight)
        logits = flat.new_empty(len(flat), self.head_weight.shape[0])
        few_rows_linear(flat, (self.head_weight,), (logits,))
        return logits.view(*hidden_states.shape[:-1], -1)

    def mtp(self, depth, hidden_states, next_tokens, inputs):
        layer = self.model.model.mtp_layers[depth]
        embeds = self.normed(F.embedding(next_tokens, self.embedding), self.weight(layer.enorm))
        both = torch.cat((embeds, self.normed(hidden_states, self.weight(layer.hnorm))), dim=-1).flatten(0, 1)
        self.begin(both, inputs)
        hidden = self.product(both, self.weight(layer.eh_proj))
        hidden = self.layer(self.config.num_hidden_layers + depth, hidden, inputs)
        return self.normed(hidden, self.weight(layer.shared_head["norm"])).view_as(hidden_states)

    def begin(self, hidden_states, inputs):
        counts = self.scratch(hidden_states.shape[0], inputs)
        if counts is not None:
            counts.zero_()

    def scratch(self, tokens, inputs, further=0):
        """Memory that the layers of a step share -> all layers' expert counts, to be zeroed at once, or None."""
        inputs.shared["counts"] = inputs.shared["lists"] = None
        experts, layers = self.config.n_routed_experts, len(self.model.model.layers) + further
        if experts is None:
            return None
        if tokens > FEW_TOKENS:
            inputs.shared["counts"] = torch.empty(layers, experts, dtype=torch.int32, device=self.device)
            inputs.shared["lists"] = torch.empty(experts, tokens, dtype=torch.int32, device=self.device)
        if self.tickets is None or len(self.tickets) < tokens:
            self.retired.append(self.tickets)  # recorded graphs still read it
            self.tickets = torch.zeros(max(tokens, 64), dtype=torch.int32, device=self.device)
        return inputs.shared["counts"]

    def layer(self, index, hidden, inputs):
        """(T, D) -> (T, D)."""
        hidden = self.attention_block(index, hidden, inputs)
        if type(self.model.model.layers[index].mlp) is DeepSeekR1MoE:
            return self.experts_block(index, hidden, inputs)
        return self.dense_block(index, hidden)

    def normed(self, hidden, weight, eps=None):
        return F.rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps if eps is None else eps)

    def product(self, x, weight, residual=None, norm=None, eps=None):
        """norm(x) @ weight.T + residual for any number of rows; may overwrite the residual."""
        eps = self.config.rms_norm_eps if eps is None else eps
        if len(x) <= MAX_ROWS:
            output = x.new_empty(len(x), weight.shape[0])
            few_rows_linear(x, (weight,), (output,), norm, eps, residual)
            return output
        x = x if norm is None else self.normed(x, norm, eps)
        return F.linear(x, weight) if residual is None else residual.addmm_(x, weight.t())

    def products(self, x, weights, norm):
        """norm(x) @ weight.T for two weights, in one launch for few rows."""
        if len(x) > MAX_ROWS:
            x = self.normed(x, norm)
            return [F.linear(x, weight) for weight in weights]
        outputs = [x.new_empty(len(x), weight.shape[0]) for weight in weights]
        few_rows_linear(x, weights, outputs, norm, self.config.rms_norm_eps)
        return outputs

    def attention_block(self, index, hidden, inputs):
        weights, attention = self.of_layer(index), self.model.model.layers[index].self_attn
        down = weights["q"] if attention.q_lora_rank is None else weights["q_a"]
        queries, compressed = self.products(hidden, (down, weights["kv_a"]), weights["input_norm"])
        if attention.q_lora_rank is not None:
            eps = attention.q_a_layernorm.variance_epsilon
            queries = self.product(queries, weights["q"], norm=weights["q_a_norm"], eps=eps)
        queries = queries.view(len(hidden), self.config.num_attention_heads, -1)
        values = self.attend_by_kernels(index, queries, compressed, inputs)
        return self.product(values.flatten(1), weights["o"], residual=hidden)

    def dense_block(self, index, hidden):
        weights = self.of_layer(index)
        gate, up = self.products(hidden, (weights["gate"], weights["up"]), weights["post_norm"])
        return self.product(F.silu(gate).mul_(up), weights["down"], residual=hidden)

    def experts_block(self, index, hidden, inputs):
        weights, gate = self.of_layer(index), self.model.model.layers[index].mlp.gate
        tokens, shared = len(hidden), inputs.shared
        scoring, group_score = ROUTER_KERNELS[type(gate)]
        groups, kept = (1, 1) if group_score is None or gate.n_group == 1 else (gate.n_group, gate.topk_group)
        indices = torch.empty(tokens, gate.top_k, dtype=torch.int32, device=self.device)
        gates = torch.empty(tokens, gate.top_k, dtype=torch.float32, device=self.device)
        bias, gate_weight = gate.e_score_correction_bias if gate.has_bias else None, gate.weight.detach()
        counts = None if shared["counts"] is None else shared["counts"][index]
        lists = (indices, gates, counts, shared["lists"])
        rule = (scoring, groups, kept, group_score or "max", gate.top_k, gate.norm_topk_prob,
                float(gate.routed_scaling_factor))  # fmt: skip
        if tokens > MAX_ROWS and has_exact_product(hidden, gate_weight):
            normed = self.normed(hidden, weights["post_norm"])
            choose_experts(torch.mm(normed, gate_weight.t(), out_dtype=torch.float32), bias, *lists, *rule)
        else:
            normed = torch.empty_like(hidden)
            route(hidden, weights["post_norm"], self.config.rms_norm_eps, gate_weight, bias, normed, *lists, *rule,
                  tickets=self.tickets)  # fmt: skip
        if inputs.routes is not None:
            inputs.routes.append(indices)
        of_shared = (weights["gate"], weights["up"], weights["down"]) if "gate" in weights else None
        return experts_forward(
            normed, weights["experts_up"], weights["experts_down"], of_shared, *lists, hidden,
            torch.empty_like(hidden),
        )  # fmt: skip
