"""One decoding step through the layers: every row of a batch gets its new tokens, whatever its length.

`ModuleStep` goes through the model's own modules, so that it is right for whatever they are (adapters, quantised
layers) and on every device; `decoding_fused.KernelStep` does the same with fused kernels.
"""

import contextlib
import weakref
from dataclasses import dataclass, field

import torch

from .decoding_cpu import SingleTokenLayer, row_product
from .decoding_experts import experts_few_tokens
from .experts import DeepSeekR1Experts
from .fused import kernels_run_on
from .linear_weights import effective_weight, is_plain
from .moe import DeepSeekR1MoE
from .rotary import rotate, softmax_scale

try:
    import triton
except ImportError:
    triton = None
else:
    from .kernels_attention import attention_blocks, expand_values, latent_attention, prepare_and_absorb, split_count
    from .kernels_experts import SILU, decode_experts


@dataclass
class StepInputs:
    """Where the tokens of one step stand.

    Shapes (B rows of the batch, S new tokens a row): lengths (B,) int32, tokens that the cache row held before;
    rows (B,) int32, cache rows. `routes`: None, or a list that receives each expert layer's (B * S, K) indices.
    """

    cache: object
    lengths: torch.Tensor
    rows: torch.Tensor
    steps: int
    routes: list | None = None
    shared: dict = field(default_factory=dict)  # what the layers of one step have in common


class ModuleStep:
    """The step through the model's modules, attention in its absorbed form.

    Source: DeepSeek-V2 (arXiv:2405.04434), Sec. 2.1.2: W_UK moves into the query and W_UV behind the attention, so
    that the cached latents themselves are keys and values of one shared head.
    """

    def __init__(self, model, dtype, options):
        # Weakly, as in the engine: the model owns both, and is to be freed when its last user lets go.
        self.model, self.config, self.dtype, self.options = weakref.proxy(model), model.config, dtype, options
        self.device = model.model.embed_tokens.weight.device
        self.kernels = options.kernels and kernels_run_on(self.device)
        self.scale = softmax_scale(model.config)
        self.multiprocessors = 1
        if self.device.type == "cuda":
            self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.autocast = dtype != model.model.embed_tokens.weight.dtype
        self.up_projections, self.single_token = {}, {}

    @torch.no_grad()
    def refresh(self):
        """Reads anew what is derived from the weights; call it after they changed and before decoding."""
        for index, layer in enumerate(self.model.model.layers):
            linear, known = layer.self_attn.kv_b_proj, self.up_projections.get(index)
            weight = effective_weight(linear, self.config.kv_lora_rank, self.dtype, self.device).to(self.dtype)
            if known is None or weight.data_ptr() == known.data_ptr():  # a plain layer's own weight
                self.up_projections[index] = weight.contiguous()
            else:
                known.copy_(weight)  # in place: a recorded graph reads this address
        if self.device.type == "cpu" and not self.kernels and self.dtype == torch.float32:
            self.single_token = {
                index: SingleTokenLayer(layer, self.config, self.up_projections[index])
                for index, layer in enumerate(self.model.model.layers)
                if SingleTokenLayer.serves(layer)
            }

    def up_projection(self, index):
        """W_UK (H, nope, r) and W_UV (H, v, r) of a layer."""
        weight = self.up_projections[index].view(self.config.num_attention_heads, -1, self.config.kv_lora_rank)
        return weight.split((self.config.qk_nope_head_dim, self.config.v_head_dim), dim=1)

    def computing(self):
        """The context that every step runs in."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def __call__(self, tokens, inputs):
        """tokens (B, S) int64 -> states (B, S, D) after the final norm; their keys and values are in the cache."""
        with self.computing():
            hidden_states = self.model.model.embed_tokens(tokens)
            self.begin(hidden_states, inputs)
            for index in range(self.config.num_hidden_layers):
                hidden_states = self.layer(index, hidden_states, inputs)
            return self.model.model.norm(hidden_states)

    def head(self, hidden_states):
        """(..., D) -> logits (..., V)."""
        head = self.model.lm_head
        if self.single_token and hidden_states.shape[:-1].numel() == 1 and is_plain(head):
            return row_product(hidden_states.view(1, -1), head.weight).view(*hidden_states.shape[:-1], -1)
        with self.computing():
            return head(hidden_states)

    def mtp(self, depth, hidden_states, next_tokens, inputs):
        """One prediction depth: states (B, S, D) and the tokens (B, S) that follow them -> its states (B, S, D).

        Its keys and values go to the cache's layer `num_hidden_layers + depth`.
        """
        layer = self.model.model.mtp_layers[depth]
        with self.computing():
            embeds = self.model.model.embed_tokens(next_tokens)
            self.begin(embeds, inputs)
            both = torch.cat((layer.enorm(embeds), layer.hnorm(hidden_states)), dim=-1)
            hidden_states = self.layer(self.config.num_hidden_layers + depth, layer.eh_proj(both), inputs)
            return layer.shared_head["norm"](hidden_states)

    # ------------------------------------------------------------ parts

    def begin(self, hidden_states, inputs):
        """Angles and mask that all layers of the step share; the kernels make their own."""
        if self.kernels:
            return
        positions = inputs.lengths.long().unsqueeze(1) + torch.arange(inputs.steps, device=self.device)
        cos, sin = self.model.model.rotary_emb(hidden_states, positions)
        inputs.shared["cos"], inputs.shared["sin"] = cos.unsqueeze(1), sin.unsqueeze(1)
        rows, lengths = inputs.rows.tolist(), inputs.lengths.tolist()
        total = max(lengths) + inputs.steps
        one_run = rows == list(range(rows[0], rows[0] + len(rows)))
        inputs.shared["rows"] = slice(rows[0], rows[0] + len(rows)) if one_run else inputs.rows.long()
        inputs.shared["total"] = total
        if len(rows) == inputs.steps == 1 and self.single_token and not inputs.cache.fp8:
            inputs.shared["rotation"] = (torch.complex(cos[0].float(), sin[0].float()), cos[0], sin[0])
        mask = None
        if inputs.steps > 1 or min(lengths) != max(lengths):
            unseen = torch.arange(total, device=self.device) > positions.unsqueeze(-1)       # (B, S, total)
            mask = torch.zeros(unseen.shape, dtype=self.dtype, device=self.device).masked_fill_(unseen, -torch.inf)
        inputs.shared["mask"] = mask

    def layer(self, index, hidden_states, inputs):
        layer = self.model.model.layers[index]
        single = self.single_token.get(index)
        if single is not None and "rotation" in inputs.shared:
            stored = inputs.cache.buffers[index][int(inputs.shared["rows"].start), : inputs.shared["total"]]
            return single(hidden_states[0], stored, inputs.shared["rotation"], inputs.routes).unsqueeze(0)
        hidden_states = hidden_states + self.attention(
            index, layer.self_attn, layer.input_layernorm(hidden_states), inputs
        )
        return hidden_states + self.feed_forward(layer.mlp, layer.post_attention_layernorm(hidden_states), inputs)

    def attention(self, index, attention, normed, inputs):
        """(B, S, D) -> (B, S, D): the attention block without its norm and residual."""
        rows, steps = normed.shape[:2]
        if self.kernels:
            queries = attention.project_queries(normed).transpose(1, 2).flatten(0, 1)             # (T, H, nope + R)
            compressed = attention.kv_a_proj_with_mqa(normed).flatten(0, 1)
            values = self.attend_by_kernels(index, queries.to(self.dtype), compressed.to(self.dtype), inputs)
        else:
            values = self.attend(index, attention, normed, inputs)
        return attention.o_proj(values.view(rows, steps, -1))

    def attend(self, index, attention, normed, inputs):
        """Normed states (B, S, D) -> values (B, S, H * v), in plain torch."""
        config, cache, shared = self.config, inputs.cache, inputs.shared
        query_nope, query_rope = attention.project_queries(normed).split(
            (config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1
        )
        query_rope = rotate(query_rope, shared["cos"], shared["sin"], config.rope_interleave)
        latent, key_rope = attention.compress(normed)
        key_rope = rotate(key_rope, shared["cos"], shared["sin"], config.rope_interleave)
        cache.write(index, latent.squeeze(1), key_rope.squeeze(1), inputs.rows, inputs.lengths)

        by_key, by_value = self.up_projection(index)
        rows, heads, steps = query_nope.shape[:3]
        query_nope = query_nope.transpose(0, 1).reshape(heads, rows * steps, -1)
        query_latent = torch.bmm(query_nope.to(self.dtype), by_key).view(heads, rows, steps, -1).transpose(0, 1)
        queries = torch.cat((query_latent, query_rope.to(self.dtype)), dim=-1).reshape(rows, heads * steps, -1)

        stored = cache.buffers[index][shared["rows"], : shared["total"]]
        if cache.fp8:
            stored = torch.cat(cache.decode(stored), dim=-1)
        scores = torch.matmul(queries * self.scale, stored.transpose(1, 2))
        if shared["mask"] is not None:
            scores = (scores.view(rows, heads, steps, -1) + shared["mask"].unsqueeze(1)).view_as(scores)
        weights = scores.softmax(-1, dtype=torch.float32).to(stored.dtype)
        attended = torch.matmul(weights, stored[..., : cache.rank]).view(rows, heads, steps, -1)
        values = torch.bmm(attended.transpose(0, 1).reshape(heads, rows * steps, -1), by_value.transpose(1, 2))
        return values.transpose(0, 1).contiguous()                                                # (T, H, v)

    def attend_by_kernels(self, index, queries, compressed, inputs):
        """Raw projections (T, H, nope + R) and (T, r + R) -> values (T, H, v); writes the cache."""
        config, cache = self.config, inputs.cache
        attention = self.model.model.layers[index].self_attn
        tokens, heads = queries.shape[:2]
        rank, rope, nope = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
        new = {"device": self.device, "dtype": self.dtype}
        query_rope, query_latent = torch.empty(tokens, heads, rope, **new), torch.empty(tokens, heads, rank, **new)
        norm, rotary = attention.kv_a_layernorm, self.model.model.rotary_emb
        prepare_and_absorb(queries, compressed, norm.weight, norm.variance_epsilon, rotary.inv_freq,
                           float(rotary.attention_scaling), cache.table, index, inputs.rows, inputs.lengths,
                           inputs.steps, query_rope, config.rope_interleave, cache.fp8, rank,
                           self.up_projections[index], query_latent)  # fmt: skip
        blocks = attention_blocks(inputs.steps, heads, rank, 1 if cache.fp8 else self.dtype.itemsize)
        splits = split_count(len(inputs.rows), -(-heads * inputs.steps // blocks["BLOCK_M"]), self.multiprocessors)
        # One split is the result itself, and read as it is: a third of the traffic, and a launch less.
        dtype = self.dtype if splits == 1 else torch.float32
        partial = torch.empty(splits, tokens, heads, rank, dtype=dtype, device=self.device)
        partial_lse = torch.empty(splits, tokens, heads, dtype=torch.float32, device=self.device)
        latent_attention(query_latent, query_rope, cache.table, index, inputs.rows, inputs.lengths, inputs.steps,
                         self.scale, cache.fp8, partial, partial_lse, splits)  # fmt: skip
        values = torch.empty(tokens, heads, config.v_head_dim, **new)
        expand_values(partial, partial_lse, self.up_projections[index], values, nope)
        return values

    def feed_forward(self, mlp, normed, inputs):
        if type(mlp) is not DeepSeekR1MoE:
            return mlp(normed)
        _, weights, indices = mlp.gate(normed)
        if inputs.routes is not None:
            inputs.routes.append(indices)
        flat = normed.flatten(0, -2)
        # Only experts that nothing wraps are read directly; on a GPU the ordinary ones may wait for the host.
        plain = type(mlp.experts) is DeepSeekR1Experts and mlp.experts.gate_up_proj.dtype == flat.dtype
        if plain and self.kernels and isinstance(mlp.experts.act_fn, SILU):
            output = decode_experts(mlp.experts, flat, indices, weights)
        elif plain and self.device.type == "cpu":
            output = experts_few_tokens(flat, indices, weights, mlp.experts)
        else:
            output = mlp.experts(flat, indices, weights)
        output = output.view_as(normed)
        return output if mlp.shared_experts is None else output + mlp.shared_experts(normed)
