"""torchtitan's DeepSeek-V3 modules at our sizes, without its trainer: its two best variants on one GPU.

Its model, SDPA attention, grouped-mm experts and dispatcher, compile per block, chunked loss (compiled), AdamW with the
load-balancing hook. A step is zero_grad, forward, chunked loss, backward, bias update, AdamW; no clipping, no
checkpointing. `fp32`: fp32 weights under bf16 autocast; `bf16`: bf16 weights. Written for 0.3.0, which
expects a newer torch than 2.11 in three places (`adapt_torch`); each adaptation is recorded. So is the attention kernel
that takes our head sizes: where no fused one does, the figure says little about torchtitan.
"""

import inspect
import time
import types

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.train_cases import (
    autocast,
    first_step_figures,
    memory_figures,
    step_figures,
    synchronize,
    time_steps,
    token_batches,
)


def adapt_torch():
    """Names that torchtitan 0.3.0 imports and torch 2.11 does not have; returns what was put in.

    Enough for one device, plain tensors and SDPA. Its FSDP, flex and varlen attention and fused MLA need more there.
    """
    import torch.distributed.fsdp as fsdp
    from torch.nn.attention.flex_attention import create_block_mask

    changed = []
    if not hasattr(fsdp, "DataParallelMeshDims"):  # an annotation, and FSDP paths that one device does not take
        fsdp.DataParallelMeshDims = type("DataParallelMeshDims", (), {})
        changed.append("torch.distributed.fsdp.DataParallelMeshDims")
    if not hasattr(torch.compiler, "_is_non_strict_tracing"):
        torch.compiler._is_non_strict_tracing = lambda: False
        changed.append("torch.compiler._is_non_strict_tracing")
    if "separate_full_blocks" not in inspect.signature(create_block_mask).parameters:
        changed.append("create_block_mask without separate_full_blocks (unused by SDPA)")
    return changed


def titan_config(fields, length):
    """Its model config for our field names, with SDPA as inner attention."""
    import torchtitan.models.common.attention as attention
    import torchtitan.models.deepseek_v3 as deepseek
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

    width, vocabulary = fields["hidden_size"], fields["vocab_size"]
    layers = deepseek._build_dsv3_layers(
        n_layers=fields["num_hidden_layers"], n_dense_layers=fields["first_k_dense_replace"], dim=width,
        n_heads=fields["num_attention_heads"], q_lora_rank=fields["q_lora_rank"] or 0,
        kv_lora_rank=fields["kv_lora_rank"], qk_nope_head_dim=fields["qk_nope_head_dim"],
        qk_rope_head_dim=fields["qk_rope_head_dim"], v_head_dim=fields["v_head_dim"], mscale=1.0,
        dense_hidden_dim=fields["intermediate_size"], moe_hidden_dim=fields["moe_intermediate_size"],
        num_experts=fields["n_routed_experts"], num_shared_experts=fields["n_shared_experts"],
        router_top_k=fields["num_experts_per_tok"], router_score_func="sigmoid", router_num_expert_groups=None,
        router_num_limited_groups=None, router_route_scale=fields["routed_scaling_factor"], router_route_norm=True,
        attn_backend="flex", moe_comm_backend="standard", non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=fields["qk_rope_head_dim"], max_seq_len=length, theta=10000.0, scaling="none"),
    )  # fmt: skip
    for layer in layers:  # 0.3.0 no longer offers it by name; the module is still there
        layer.attention.inner_attention = attention.ScaledDotProductAttention.Config()
    return deepseek.DeepSeekV3Model.Config(
        vocab_size=vocabulary, dim=width, layers=layers,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=width, param_init=deepseek._EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=width, param_init=deepseek._NORM_INIT),
        lm_head=Linear.Config(
            in_features=width, out_features=vocabulary, param_init=deepseek._output_linear_init(width)),
    )  # fmt: skip


def attention_kernel(job):
    """Name of the first of its SDPA backends that takes our head sizes, forward and backward."""
    fields, dtype = job["fields"], torch.float32 if job["device"] == "cpu" else torch.bfloat16
    widths = 2 * [fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]] + [fields["v_head_dim"]]
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        query, key, value = (
            torch.zeros(1, 512, fields["num_attention_heads"], width, device=job["device"], dtype=dtype)
            .transpose(1, 2).requires_grad_() for width in widths)  # fmt: skip
        try:
            with sdpa_kernel(backend):
                scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
        except RuntimeError:  # refused: the next one
            continue
        return backend.name
    return SDPBackend.MATH.name


class TitanStep:
    """One training step of its modules: call it with ids (B, S)."""

    def __init__(self, job):
        from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
        from torchtitan.components.optimizer import default_adamw, register_moe_load_balancing_hook
        from torchtitan.config import CompileConfig
        from torchtitan.distributed import utils
        from torchtitan.distributed.compile import apply_compile

        utils.set_spmd_backend("partial_dtensor")  # plain tensors
        dimensions = types.SimpleNamespace(
            tp_enabled=False, ep_enabled=False, tp=1, get_optional_mesh=lambda *_, **__: None)
        compiled = CompileConfig(enable=True, components=["model", "loss"])
        self.job = job
        torch.manual_seed(job.get("seed", 0))
        with torch.device("meta"):
            model = titan_config(job["fields"], job["length"]).build()
        apply_compile(model, compile_config=compiled, parallel_dims=dimensions)
        model.to_empty(device=job["device"])
        with torch.no_grad():
            model.init_weights(buffer_device=None)
        if "-bf16" in job["variant"]:  # not its RoPE cache and biases: its own bf16 training leaves those too
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        self.model = model.train()
        loss = CrossEntropyLoss.Config(global_vocab_size=job["fields"]["vocab_size"])
        self.loss = ChunkedLossWrapper.Config(loss_fn=loss).build(compile_config=compiled)
        self.loss.set_lm_head(model.lm_head)
        model._skip_lm_head = True
        self.optimizer = default_adamw(lr=1e-4).build(model_parts=[model])
        register_moe_load_balancing_hook(self.optimizer, [model], dimensions)
        shape = (job["batch"], 1)
        self.positions = torch.arange(job["length"], device=job["device"], dtype=torch.int32).repeat(shape)
        self.tokens = torch.tensor(float(job["batch"] * job["length"]), device=job["device"])
        self.counts = None  # of the last step, while `listening`

    def __call__(self, ids, listening=False):
        self.optimizer.zero_grad()
        with autocast(self.job):
            predictions = self.model(ids, positions=self.positions)
            loss, _ = self.loss(predictions, ids.roll(-1, dims=1), self.tokens, positions=self.positions)
        del predictions
        loss.backward()
        if listening:
            first = self.job["fields"]["first_k_dense_replace"]
            layers = range(first, self.job["fields"]["num_hidden_layers"])
            self.counts = [self.model.layers[str(i)].moe.tokens_per_expert_E.detach().float().clone() for i in layers]
        self.optimizer.step()
        return loss.detach()


def measure_titan(job):
    """One line of results. Raises RuntimeError where torchtitan is not installed: that is the result then."""
    changed = adapt_torch()
    try:
        import torchtitan.components.loss  # noqa: F401
        import torchtitan.models.deepseek_v3  # noqa: F401
    except ModuleNotFoundError as error:  # itself, or a package that it needs
        raise RuntimeError(f"torchtitan is not installed (pip install torchtitan==0.3.0): {error}") from error
    kernel = attention_kernel(job)
    step, batches = TitanStep(job), token_batches(job)
    synchronize(job["device"])
    ready = time.time()
    milliseconds, first = time_steps(job, step, batches)
    step(batches[0], listening=True)
    load = max(float(count.max() / count.mean()) for count in step.counts)
    return {
        **step_figures(job, milliseconds), **memory_figures(job), **first_step_figures(job, ready, first),
        "load_max_over_mean": round(load, 3), "attention": kernel, "adapted": changed,
    }  # fmt: skip
