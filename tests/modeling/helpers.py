"""Tiny models and their twins in transformers, for the tests of this folder."""

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM

VOCAB = 97

# initializer_range 0.2 with width 32: router logits and scores spread out, so that routing is not degenerate.
TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "max_position_embeddings": 64, "initializer_range": 0.2, "num_nextn_predict_layers": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def tiny_config(**changes):
    return DeepSeekR1Config(**{**TINY, **changes})


@torch.no_grad()
def randomise_biases(model, mean=-3.0):
    """Wide routing biases, negative unless `mean` says else: a kept expert may then score below an excluded one's 0."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) + mean)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # ones at first; other values tell whether they are used
            parameter.add_(0.2 * torch.randn_like(parameter))


def tiny_model(model_class=DeepSeekR1ForCausalLM, implementation="eager", experts="grouped_mm", **changes):
    model = model_class(tiny_config(**changes))
    model.set_attn_implementation(implementation)
    model.set_experts_implementation(experts)
    randomise_biases(model)
    return model.eval()


def library_twin(model):
    """The library's model with the same weights; its attention and experts run eagerly."""
    config = model.config
    fields = {name: getattr(config, name) for name in TINY if name != "num_nextn_predict_layers"}
    fields |= {name: getattr(config, name) for name in
               ("attention_bias", "attention_dropout", "rope_parameters", "routed_scaling_factor", "topk_method",
                "tie_word_embeddings", "norm_topk_prob", "rms_norm_eps")}  # fmt: skip
    if config.scoring_func == "softmax":
        twin = DeepseekV2ForCausalLM(DeepseekV2Config(**fields))
    else:
        del fields["topk_method"]
        twin = DeepseekV3ForCausalLM(DeepseekV3Config(
            **fields, rope_interleave=config.rope_interleave, num_nextn_predict_layers=config.num_nextn_predict_layers
        ))  # fmt: skip
    first_mtp = config.num_hidden_layers
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if not (name.startswith("model.layers.") and int(name.split(".")[2]) >= first_mtp)
    }
    twin.load_state_dict(weights)
    twin.set_attn_implementation("eager")
    twin.set_experts_implementation("eager")
    return twin.eval()


def random_ids(rows=2, length=11):
    """No special tokens among them (pad 0, bos 1, eos 2)."""
    return torch.randint(3, VOCAB, (rows, length))


def padded(ids, side, amounts=(0, 4)):
    """-> ids, attention mask, labels; row r has `amounts[r]` pads on that side. side None: no mask, no pads.

    Labels are -100 at padding and at the first token after it, which a padded position would have to predict: what
    lies at padded positions is not defined and differs between attention backends.
    """
    if side is None:
        return ids, None, ids.clone()
    mask = torch.ones_like(ids)
    for row, amount in enumerate(amounts):
        mask[row, slice(0, amount) if side == "left" else slice(ids.shape[1] - amount, ids.shape[1])] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":
        labels[range(len(amounts)), amounts] = -100
    return ids * mask, mask, labels


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(actual, expected, **tolerances):
    """Equal to 1e-5, what fp32 sums in another order differ by at these sizes (values of order 1)."""
    torch.testing.assert_close(actual, expected, **({"atol": 1e-5, "rtol": 1e-5} | tolerances))
