"""The DeepSeek-R1 model and its heads for transformers: language modelling, sequence and token classification."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import DeepSeekR1LatentAttention
from .configuration_deepseek_r1 import DeepSeekR1Config
from .decoder import DeepSeekR1DecoderLayer
from .decoding import FastGenerationMixin
from .decoding_cache import PrefillView
from .documents import attends_to_documents, find_documents
from .experts import DeepSeekR1Experts
from .layout import CheckpointLayoutMixin, register_with_library
from .losses import linear_cross_entropy
from .mtp import DeepSeekR1MTPLayer, document_ids, shift_left, shifted_labels
from .norms import DeepSeekR1RMSNorm
from .outputs import DeepSeekR1CausalLMOutput, last_token_index, token_regression_loss
from .recomputation import ActivationCheckpointingMixin
from .replay import split_routes
from .rotary import DeepSeekR1RotaryEmbedding
from .routing import DeepSeekR1Router, update_expert_bias


class DeepSeekR1PreTrainedModel(CheckpointLayoutMixin, ActivationCheckpointingMixin, PreTrainedModel):
    """What every DeepSeek-R1 class shares: initialisation, checkpoint layout, what is recomputed, expert balancing."""

    config: DeepSeekR1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepSeekR1DecoderLayer", "DeepSeekR1MTPLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The library looks for both interfaces in this file's source; they live in attention.py and experts.py.
    _can_set_attn_implementation_cached_value = True
    _can_set_experts_implementation_cached_value = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "hidden_states": DeepSeekR1DecoderLayer,
        "attentions": OutputRecorder(DeepSeekR1LatentAttention, index=1),
        "router_logits": OutputRecorder(DeepSeekR1Router, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepSeekR1Router):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.load_counts)
            init.ones_(module.balance_loss_scale)
            if module.has_bias:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepSeekR1Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)

    def post_init(self):
        super().post_init()
        # DDP copies rank 0's buffers to all ranks at each forward; every rank must keep the counts of its own tokens.
        counts = [name for name, _ in self.named_buffers() if name.endswith("load_counts")]
        self._ddp_params_and_buffers_to_ignore = counts

    @property
    def routers(self):
        """{index of the layer: its router} in order; MTP layers follow the decoder layers."""
        layers = getattr(self, self.base_model_prefix, self).layers
        return {i: layer.mlp.gate for i, layer in enumerate(layers) if hasattr(layer.mlp, "gate")}

    @property
    def balance_loss_scale(self):
        """Factor on the gradient of the routers' own losses, which bypass the trainer's loss.

        1.0 is right for a bare loop without accumulation or loss scaling. Otherwise set it before each step to
        loss scale / micro-batches in the step, as `ExpertBalanceCallback` does.
        """
        return next((float(router.balance_loss_scale) for router in self.routers.values()), 1.0)

    @balance_loss_scale.setter
    def balance_loss_scale(self, value):
        scales = [router.balance_loss_scale for router in self.routers.values()]
        if scales:  # two launches for all layers
            torch._foreach_zero_(scales)
            torch._foreach_add_(scales, float(value))

    def update_expert_bias(self, group=None, speed=None):
        """Moves every routing bias one step of `speed` towards even load; call once after each optimizer step.

        Uses the tokens counted since the last call, summed over the processes of `group` (None: all). `speed`: None is
        the config's `bias_update_speed`; 0 only measures. The load is kept for `expert_load`.
        Source: DeepSeek-V3 (arXiv:2412.19437), Sec. 2.1.2. Returns: see `expert_load`.
        """
        routers = self.routers
        if not routers:
            return {}
        speed = self.config.bias_update_speed if speed is None else speed
        loads = update_expert_bias(list(routers.values()), speed, group)
        self._expert_load = dict(zip(routers, loads))  # left on the device: reading it is what waits for the step
        return self._expert_load

    def discard_expert_counts(self):
        """Forgets the tokens counted since the last update, for an optimizer step that was skipped."""
        for router in self.routers.values():
            router.load_counts.zero_()

    @property
    def expert_load(self):
        """{layer index: (E,) int64 tokens that each expert was given in the last optimizer step, all processes}."""
        return getattr(self, "_expert_load", {})

    def expert_load_max_over_mean(self):
        """{layer index: largest over mean expert load of the last optimizer step}; 1.0 is perfectly even."""
        if not self.expert_load:
            return {}
        loads = torch.stack(list(self.expert_load.values())).cpu()  # one wait for the device
        return {
            layer: float(load.max() * load.numel() / load.sum())
            for layer, load in zip(self.expert_load, loads)
            if load.any()
        }


class DeepSeekR1Model(DeepSeekR1PreTrainedModel):
    """Embedding, decoder layers and final norm.

    With `mtp_layers` > 0, `layers` also holds that many multi-token-prediction layers after the decoder layers, as
    released checkpoints number them; this class's own `forward` does not run them.

    Attributes:
        balance_per_document: for the balance loss, each document of a padding-free row is a sequence of its own
            (found where positions start again); else a row is one sequence, as in pretraining.
        documents_apart: False: documents packed in a row see each other. Context parallelism has no masks, and the
            positions of a process' part of a row jump without a document's end.
    """

    def __init__(self, config, mtp_layers=0):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.balance_per_document, self.documents_apart = False, True
        self.gradient_checkpointing = False
        last = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [DeepSeekR1DecoderLayer(config, i) for i in range(last)]
            + [DeepSeekR1MTPLayer(config, i) for i in range(last, last + mtp_layers)]
        )
        self.norm = DeepSeekR1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DeepSeekR1RotaryEmbedding(config)
        self.post_init()

    @property
    def mtp_layers(self):
        return self.layers[self.config.num_hidden_layers :]

    def layer_inputs(self, inputs_embeds, attention_mask, position_ids, past_key_values=None, token_mask=None):
        """The keyword arguments that all layers share: positions, masks, and what the routers need in training.

        Shapes: inputs_embeds (B, S, D); attention_mask (B, T) with 0 for padding, an already made mask, or None;
        position_ids (B or 1, S) or None; token_mask: as `forward` takes it.
        """
        rows, length = inputs_embeds.shape[:2]
        # Positions made here hide no packed documents; looking for them waits for a GPU.
        mask_positions = position_ids if self.documents_apart else None
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0) + seen
        if isinstance(past_key_values, PrefillView):
            # The attention itself knows where a chunk of a prompt stands; documents are never packed here.
            attention_mask, past_key_values, mask_positions = None, None, None
        documents = None
        if mask_positions is not None and attention_mask is None and past_key_values is None:
            if attends_to_documents(self, inputs_embeds):
                documents, mask_positions = find_documents(position_ids, rows), None
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=mask_positions,
        )
        segment_ids = None
        if not (self.training and torch.is_grad_enabled()):
            token_mask = None  # only training balances
        else:
            if token_mask is None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
                token_mask = attention_mask[:, -length:].bool()
            if self.balance_per_document:
                segment_ids = document_ids(position_ids).expand(rows, length)
        return {
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            "position_ids": position_ids,
            "attention_mask": causal_mask,
            "documents": documents,
            "token_mask": token_mask,
            "segment_ids": segment_ids,
        }

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        token_mask=None,
        routes=None,
        **kwargs,
    ):
        """input_ids (B, S) int64 or inputs_embeds (B, S, D) -> `last_hidden_state` (B, S, D) after the final norm.

        Documents packed in one row (positions that start again, no attention mask, no cache) do not see each other.
        `token_mask` (B, S) bool: False for tokens that the expert balance leaves out, such as the filling of packed
        rows; by default those that `attention_mask` masks.
        `routes` (B, S, M, K) of an integer dtype: the experts of each token in the M decoder layers with experts, such
        as those that `decoding.record_routes` kept; -1 where the router chooses. See `replay.py`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        training = self.training and torch.is_grad_enabled()
        if use_cache and past_key_values is None and not training:
            past_key_values = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        shared = self.layer_inputs(inputs_embeds, attention_mask, position_ids, past_key_values, token_mask)
        hidden_states = inputs_embeds
        layers = self.layers[: self.config.num_hidden_layers]
        for layer, chosen in zip(layers, split_routes(routes, layers, inputs_embeds)):
            hidden_states = layer(
                hidden_states, past_key_values=past_key_values, routes=chosen, kept_routes=[] if training else None,
                **shared, **kwargs,
            )  # fmt: skip
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class DeepSeekR1ForCausalLM(FastGenerationMixin, DeepSeekR1PreTrainedModel, GenerationMixin):
    """The language model, with its multi-token-prediction layers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.model = DeepSeekR1Model(config, mtp_layers=config.num_nextn_predict_layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def freeze_mtp(self):
        """Takes the multi-token-prediction layers out of training; their loss is then not computed."""
        self.model.mtp_layers.requires_grad_(False)

    @property
    def trains_mtp(self):
        """Whether a training step includes the multi-token-prediction loss: where any of its weights, or an adapter's
        on it, is trained (a trained weight without gradient stops DDP)."""
        return bool(self.config.mtp_loss_coef) and any(p.requires_grad for p in self.model.mtp_layers.parameters())

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        skip_logits=None,
        return_token_losses=False,
        **kwargs,
    ):
        """Language modelling; see `DeepSeekR1Model.forward` for the inputs it shares.

        Args:
            labels: (B, S) int64, aligned with `input_ids` (position i is trained to give labels[i + 1]); -100 is
                ignored, and so is whatever lies in another document of a packed row.
            logits_to_keep: make logits of the last n positions only, of these indices, or, for a (B, n) int64 tensor,
                of these positions of each row; 0: of all.
            num_items_in_batch: tokens that the summed loss is divided by, as trainers pass it under gradient
                accumulation; None: the labels in this batch.
            skip_logits: make no logits; None: skip them in training when labels are given, where the loss is computed
                without ever holding (tokens, vocabulary).
            return_token_losses: also return `token_losses`.
            shift_labels: (B, S) int64 in place of `labels`: position i is trained to give shift_labels[i]. For rows
                that are cut over processes (context parallelism), where a cut's last label lies elsewhere.
        Raises ValueError for `shift_labels` where multi-token prediction is trained, which looks further ahead.
        In training, `loss` includes label smoothing and `mtp_loss_coef * mtp_loss` (V3, Eq. 25).
        """
        # Among kwargs, as in the library: trainers take each argument named so for a label that a batch must have.
        targets = kwargs.pop("shift_labels", None)
        has_labels = labels is not None or targets is not None
        if has_labels and past_key_values is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if skip_logits is None:
            skip_logits = self.training and has_labels
        if skip_logits:
            logits = None
        elif isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dim() == 2:
            kept = logits_to_keep.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
            logits = self.lm_head(hidden_states.gather(1, kept))
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))

        losses = {}
        if targets is not None:
            if self.training and self.trains_mtp:
                raise ValueError("shift_labels: multi-token prediction needs the labels of later tokens too, which "
                                 "another process may have; freeze it (mtp_loss_coef=0)")  # fmt: skip
            losses = self.next_token_losses(hidden_states, targets.to(hidden_states.device), num_items_in_batch)
        elif labels is not None:
            if attention_mask is not None or past_key_values is not None:
                documents = None  # one document a row
            else:
                documents = None if position_ids is None else document_ids(position_ids).expand(labels.shape)
            losses = self.losses(hidden_states, labels.to(hidden_states.device), documents, num_items_in_batch, {
                "input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask,
                "position_ids": position_ids, **kwargs,
            })  # fmt: skip
        return DeepSeekR1CausalLMOutput(
            loss=losses.get("loss"),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            mtp_loss=losses.get("mtp_loss"),
            token_losses=losses.get("token_losses") if return_token_losses else None,
        )

    def losses(self, hidden_states, labels, documents, num_items_in_batch, mtp_inputs):
        """-> {"loss" (), "token_losses" (B, S), in training with MTP also "mtp_loss" () without gradient}, in nats.

        Shapes: hidden_states (B, S, D), labels (B, S), documents (B, S) or None; `mtp_inputs`: as `mtp_hidden_states`
        takes them.
        """
        targets = shifted_labels(labels, 1, None if documents is None else documents.to(labels.device))
        result = self.next_token_losses(hidden_states, targets, num_items_in_batch)
        if self.training and self.trains_mtp:
            items = _items(targets, num_items_in_batch)
            mtp_loss = self.mtp_loss(hidden_states, labels, documents, mtp_inputs) / items
            result["loss"] = result["loss"] + self.config.mtp_loss_coef * mtp_loss                # Eq. 25
            result["mtp_loss"] = mtp_loss.detach()
        return result

    def next_token_losses(self, hidden_states, targets, num_items_in_batch):
        """(B, S, D) and (B, S), what each position is to predict -> {"loss" (), "token_losses" (B, S)}, in nats."""
        loss, token_losses = self.cross_entropy(hidden_states, targets)
        return {"loss": loss / _items(targets, num_items_in_batch), "token_losses": token_losses}

    def cross_entropy(self, hidden_states, targets):
        """(B, S, D) and (B, S) -> sum of the cross-entropies () with gradients, per token (B, S) without; in nats."""
        smoothing = self.config.label_smoothing if self.training else 0.0
        total, each = linear_cross_entropy(
            hidden_states.flatten(0, 1), self.lm_head, targets.flatten().to(hidden_states.device), smoothing
        )
        return total, each.view(targets.shape)

    def mtp_hidden_states(
        self, hidden_states, input_ids, inputs_embeds, attention_mask, position_ids, token_mask=None, routes=None,
        **kwargs,
    ):
        """Yields, for depth k = 1, 2, ..., the states (B, S, D) from which the head predicts token i + k + 1.

        `hidden_states` is the main model's `last_hidden_state`. An entry whose token i + k lies past the row's end or
        in another document means nothing; no other entry depends on it. `routes` are those of the decoder layers: these
        layers choose their experts themselves.
        """
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]  # no cache here: the new tokens only
        shared = self.model.layer_inputs(inputs_embeds, attention_mask, position_ids, token_mask=token_mask)
        documents = document_ids(shared["position_ids"]).expand(inputs_embeds.shape[:2])
        token_mask = shared.pop("token_mask")
        for depth, layer in enumerate(self.model.mtp_layers, start=1):
            real = shift_left(documents, depth, -1) == documents
            if token_mask is not None:
                real = real & shift_left(token_mask, depth, False) & token_mask
            hidden_states = layer(
                hidden_states, shift_left(inputs_embeds, depth, 0.0), token_mask=real,
                kept_routes=[] if self.training else None, **shared, **kwargs,
            )  # fmt: skip
            yield hidden_states

    def mtp_loss(self, hidden_states, labels, documents, mtp_inputs):
        """() mean over the depths of the summed cross-entropy, in nats (V3, Eqs. 24, 25 without lambda and 1 / T)."""
        states = self.mtp_hidden_states(hidden_states, **mtp_inputs)
        sums = [
            self.cross_entropy(at_depth, shifted_labels(labels.to(at_depth.device), depth + 1, documents))[0]
            for depth, at_depth in enumerate(states, start=1)
        ]
        return torch.stack(sums).mean()


def _items(targets, num_items_in_batch):
    """Tokens that a summed loss is divided by, at least 1."""
    items = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return torch.as_tensor(items, device=targets.device).clamp_min(1)


class DeepSeekR1ForSequenceClassification(DeepSeekR1PreTrainedModel):
    """A linear head on each sequence's last real token: classification, or one score as a reward model."""

    # The loss is the mean over the micro-batch: a trainer has to divide it by its accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DeepSeekR1Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        """-> `logits` (B, num_labels); `loss` if labels are given, by `config.problem_type`. Others: see the model."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),  # a cache is of no use here, and with one packed documents see each other
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        rows, length = hidden_states.shape[:2]
        last = last_token_index(
            input_ids, attention_mask, self.config.pad_token_id, rows, length, hidden_states.device
        )
        logits = self.score(hidden_states[torch.arange(rows, device=hidden_states.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DeepSeekR1ForTokenClassification(DeepSeekR1PreTrainedModel):
    """A linear head on every token: token classes, values, or process rewards."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DeepSeekR1Model(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """-> `logits` (B, S, num_labels); `loss` if labels (B, S) are given, -100 ignored: cross-entropy of int64
        classes, or with one label the squared error of float values; the mean over them, or the sum over
        `num_items_in_batch`, as trainers pass it under gradient accumulation. Others: see the model."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None and self.num_labels == 1:
            loss = token_regression_loss(logits, labels, num_items_in_batch)
        elif labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


DeepSeekR1Model.register_for_auto_class("AutoModel")
DeepSeekR1ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
DeepSeekR1ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
DeepSeekR1ForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
DeepSeekR1Config.register_for_auto_class("AutoConfig")
# Here and not in the package's __init__, so that custom code loaded from a folder does it too.
register_with_library()

__all__ = [
    "DeepSeekR1CausalLMOutput",
    "DeepSeekR1ForCausalLM",
    "DeepSeekR1ForSequenceClassification",
    "DeepSeekR1ForTokenClassification",
    "DeepSeekR1Model",
    "DeepSeekR1PreTrainedModel",
]
