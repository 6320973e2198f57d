"""Configuration of the DeepSeek-R1 family: one dataclass, spelled as in the released `config.json` files."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# (scoring_func, topk_method) of the released V2 and V3 configurations; `routing.ROUTERS` has one class for each.
ROUTER_KINDS = (("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy"))
ATTENTION_KINDS = ("latent",)


@strict
class DeepSeekR1Config(PreTrainedConfig):
    r"""Configuration of `DeepSeekR1Model` and its heads.

    The defaults are those of the released DeepSeek-R1 (671 B parameters, 37 B active a token). Field names are the
    released ones, so that a released `config.json` (DeepSeek-V2, V3 or R1) loads unchanged; unknown fields are kept.

    Args:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width D of the residual stream.
        intermediate_size: inner width of a dense feed-forward layer.
        moe_intermediate_size: inner width of one expert.
        num_hidden_layers: decoder layers, without the multi-token-prediction layers.
        num_attention_heads: attention heads H.
        num_key_value_heads: kept for the released files; latent attention has one key/value head per query head.
        n_shared_experts: experts every token passes through (one MLP of this many times `moe_intermediate_size`).
            0 or None: no shared expert.
        n_routed_experts: experts E among which the router chooses. None: every layer is dense.
        num_experts_per_tok: experts K that a token is sent to.
        n_group, topk_group: experts form `n_group` groups, of which a token may use `topk_group` (V3, Sec. 2.1.2).
            None means 1.
        scoring_func, topk_method: which router, one of ("sigmoid", "noaux_tc") as in V3/R1, ("softmax", "greedy")
            and ("softmax", "group_limited_greedy") as in V2. None: by the checkpoint's `model_type`, V3's otherwise.
        norm_topk_prob: divide the K gate values by their sum (V3, Eq. 13). None: True, False for V2.
        routed_scaling_factor: factor on the gate values. None: 2.5, 1.0 for V2.
        first_k_dense_replace: this many first layers have a dense feed-forward layer.
        moe_layer_freq: of the others, every `moe_layer_freq`-th (by layer index) is a mixture of experts.
        q_lora_rank: width of the compressed queries. None: queries are projected directly (V2-Lite).
        kv_lora_rank: width of the cached latent that keys and values are expanded from (V2, Sec. 2.1.2).
        qk_nope_head_dim, qk_rope_head_dim: a head's query/key width without and with rotary positions.
        v_head_dim: a head's value width.
        attention_types: one name per decoder layer from the attention registry. None: "latent" everywhere.
        attention_bias: biases in the attention's down and output projections.
        attention_dropout: dropout on the attention weights, in training.
        rope_parameters: rotary settings as in transformers (`rope_type`, `rope_theta`, YaRN's `factor`, `mscale`,
            `mscale_all_dim`, ...). `rope_theta` and `rope_scaling` of released files are folded in.
        rope_interleave: rotary pairs are neighbours (2i, 2i+1), as in released weights; else the two halves.
        max_position_embeddings: longest sequence the rotary settings are made for, in tokens.
        hidden_act, rms_norm_eps, initializer_range, tie_word_embeddings, use_cache, pad_token_id, bos_token_id,
            eos_token_id, output_router_logits, pretraining_tp: as everywhere in transformers.
        num_nextn_predict_layers: multi-token-prediction layers (V3, Sec. 2.2); 0 for a checkpoint without them.
            None: 1, 0 for V2.
        mtp_loss_coef: lambda of V3, Eq. 25, applied in training.
        bias_update_speed: gamma of the auxiliary-loss-free balancing (V3, Sec. 2.1.2); 0 freezes the routing bias.
        seq_aux_loss_alpha: alpha of the sequence-wise balance loss (V3, Eqs. 17-20). 0 turns it off.
        router_z_loss_coef: weight of mean(logsumexp(router logits)^2) (ST-MoE, arXiv:2202.08906, Eq. 5).
        label_smoothing: share of the target mass spread over the vocabulary, in training.
        hidden_dropout: dropout on each sub-layer's output before it joins the residual stream.
        drop_path_rate: probability of skipping the last layer's branches; grows linearly from 0 at the first
            layer (stochastic depth, arXiv:1603.09382, Sec. 3).

    Raises:
        ValueError: for any combination that cannot work, naming the field, its value and what is allowed.
    """

    model_type = "deepseek_r1"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = 1
    n_routed_experts: int | None = 256
    num_experts_per_tok: int | None = 8
    n_group: int | None = 8
    topk_group: int | None = 4
    scoring_func: str | None = None
    topk_method: str | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float | int | None = None
    first_k_dense_replace: int | None = 3
    moe_layer_freq: int = 1
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_types: list[str] | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool | None = True
    max_position_embeddings: int = 163840
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    output_router_logits: bool = False
    pretraining_tp: int | None = 1
    num_nextn_predict_layers: int | None = None
    mtp_loss_coef: float | int = 0.3
    bias_update_speed: float | int = 0.001
    seq_aux_loss_alpha: float | int = 1e-4
    router_z_loss_coef: float | int = 0.0
    label_smoothing: float | int = 0.0
    hidden_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    # Present from the start, because TRL reads it from any config it is given; filled on save.
    auto_map: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        # A deepseek_v2/v3 file makes a deepseek_r1 config, so that everything keyed on the type behaves alike.
        source_type = kwargs.pop("model_type", None)
        is_v2 = source_type == "deepseek_v2"
        if self.scoring_func is None:
            self.scoring_func = "softmax" if is_v2 else "sigmoid"
        if self.topk_method is None:
            self.topk_method = "greedy" if self.scoring_func == "softmax" else "noaux_tc"
        if self.auto_map is None or source_type not in (None, "deepseek_r1"):
            self.auto_map = {}  # a deepseek_v3 file points at other remote code
        defaults = {
            "norm_topk_prob": not is_v2,
            "routed_scaling_factor": 1.0 if is_v2 else 2.5,
            "num_nextn_predict_layers": 0 if is_v2 else 1,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.n_group = self.n_group or 1
        self.topk_group = self.topk_group or 1
        self.first_k_dense_replace = self.first_k_dense_replace or 0
        self.n_shared_experts = self.n_shared_experts or 0
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim  # what the library's rotary initialisers read
        super().__post_init__(**kwargs)
        try:
            self.validate_architecture()  # here, because `@strict` would wrap its errors in one that is no ValueError
        except TypeError:
            pass  # a field of the wrong type, which `@strict` reports next, by its name

    def is_moe_layer(self, layer_idx):
        """Whether layer `layer_idx` (MTP layers follow the decoder layers) has routed experts."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    def validate_architecture(self):
        """Cross-field checks, at construction and whenever `@strict` validates."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_layer_freq",
                     "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary positions turn pairs of channels; "
                f"use {self.qk_rope_head_dim + 1}"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must equal num_attention_heads="
                f"{self.num_attention_heads}: latent attention expands one key and value per query head; leave it out"
            )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be at least 1, or null for direct queries")
        if self.num_nextn_predict_layers < 0:
            raise ValueError(f"num_nextn_predict_layers={self.num_nextn_predict_layers} must be 0 or more")
        for name in ("first_k_dense_replace", "n_shared_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; known: {sorted(ACT2FN)}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} must lie in [0, vocab_size={self.vocab_size}), or be null"
            )
        self._validate_ranges()
        self._validate_rotary()
        self._validate_attention_types()
        if self.n_routed_experts is not None:
            self._validate_routing()

    def _validate_ranges(self):
        for name in ("attention_dropout", "hidden_dropout", "drop_path_rate", "label_smoothing"):
            value = getattr(self, name) or 0.0
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} must lie in [0, 1)")
        for name in ("mtp_loss_coef", "bias_update_speed", "seq_aux_loss_alpha", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or positive")

    def _validate_rotary(self):
        rope = self.rope_parameters or {}
        kind, known = rope.get("rope_type", "default"), ["default", *ROPE_INIT_FUNCTIONS]
        if kind not in known:
            raise ValueError(f"rope_parameters has rope_type={kind!r}; known: {known}")
        if kind not in ("default", "longrope", "proportional") and "factor" not in rope:
            raise ValueError(f"rope_parameters={rope} lacks factor, which rope_type={kind!r} needs")

    def _validate_attention_types(self):
        if self.attention_types is None:
            return
        if len(self.attention_types) != self.num_hidden_layers:
            raise ValueError(
                f"attention_types has {len(self.attention_types)} entries for num_hidden_layers="
                f"{self.num_hidden_layers}; give one per layer, or null for {ATTENTION_KINDS[0]!r} everywhere"
            )
        unknown = sorted(set(self.attention_types) - set(ATTENTION_KINDS))
        if unknown:
            raise ValueError(f"attention_types has unknown names {unknown}; known: {list(ATTENTION_KINDS)}")

    def _validate_routing(self):
        experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        if (self.scoring_func, self.topk_method) not in ROUTER_KINDS:
            raise ValueError(
                f"no router for scoring_func={self.scoring_func!r} with topk_method={self.topk_method!r}; "
                f"known pairs: {list(ROUTER_KINDS)}"
            )
        if experts < 1:
            raise ValueError(f"n_routed_experts={experts} must be at least 1, or null for a dense model")
        if self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size={self.moe_intermediate_size} must be at least 1")
        if self.num_experts_per_tok is None or not 1 <= self.num_experts_per_tok <= experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie in [1, n_routed_experts={experts}]"
            )
        if self.topk_method == "greedy" or groups == 1:
            return  # groups are not used
        if experts % groups:
            fits = [g for g in range(1, experts + 1) if experts % g == 0]
            raise ValueError(
                f"n_routed_experts={experts} must be a multiple of n_group={groups}; use n_group in {fits}"
            )
        if not 1 <= kept <= groups:
            raise ValueError(f"topk_group={kept} must lie in [1, n_group={groups}]")
        size = experts // groups
        if self.num_experts_per_tok > kept * size:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {kept * size} experts in the "
                f"topk_group={kept} kept groups of {size}; raise topk_group or lower num_experts_per_tok"
            )
        if self.scoring_func == "sigmoid" and size < 2:
            raise ValueError(
                f"n_group={groups} leaves {size} expert a group, but a group is scored by its two best experts; "
                f"use n_group <= {experts // 2}"
            )


__all__ = ["DeepSeekR1Config"]
