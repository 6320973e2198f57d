"""Where one decoding step goes, by kernel, and the bytes that it has to read."""

import time

import torch

MEMORY_TB_PER_SECOND = {"H200": 4.8, "H100": 3.35}  # by the data sheets (SXM)


@torch.no_grad()
def experts_touched(model, tokens):
    """Distinct experts chosen in each mixture layer, averaged over the layers, when (B, 1) tokens take a step."""
    chosen = []
    hooks = [
        router.register_forward_hook(lambda _, __, output: chosen.append(output[2].unique().numel()))
        for router in model.routers.values()
    ]
    try:
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(chosen) / len(chosen)


def bytes_of_a_step(model, batch, context, touched):
    """Bytes that a step must read: every weight that multiplies, of the routed experts `touched` ones a layer, and the
    cache of `batch` rows of `context` tokens."""
    config, total = model.config, 0
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight") and parameter is not model.lm_head.weight:
            continue
        layer = name.removeprefix("model.layers.").split(".")[0]
        if layer.isdigit() and int(layer) >= config.num_hidden_layers:
            continue  # MTP
        share = touched / config.n_routed_experts if ".mlp.experts." in name else 1.0
        total += parameter.nbytes * share
    width = model.lm_head.weight.element_size() * (config.kv_lora_rank + config.qk_rope_head_dim)
    if model.decoding.cache_dtype == "fp8":
        width = config.kv_lora_rank + -(-config.kv_lora_rank // 128) * 4 + 2 * config.qk_rope_head_dim
    return total + batch * context * config.num_hidden_layers * width


def recorded_batch(engine, rows):
    """The recorded graph of one token a row that serves `rows` rows."""
    recorded = {key[:2]: batch for key, batch in engine.batches.items() if batch.graph is not None}
    fitting = [batch for (size, steps), batch in recorded.items() if steps == 1 and size >= rows]
    if not fitting:
        known = sorted(engine.batches, key=str)
        raise ValueError(f"profile: no graph of a step for {rows} rows was recorded (recorded: {known})")
    return min(fitting, key=lambda batch: batch.size)


def decode_profile(model, tokens, context, dtype, replays=20):
    """Yields one line a kernel: name, launches and us a step, share; and the step's time by the clock.

    Replays the graph that `generate` has recorded, over a cache of zeros: routing is that of the tokens.
    tokens (B, 1) int64.
    """
    if tokens.device.type != "cuda":
        raise ValueError(f"profile: the tokens are on {tokens.device.type}; kernels are listed on cuda only")
    engine, rows = model.decoding_engine, tokens.shape[0]
    batch = recorded_batch(engine, rows)
    cache = engine.open(dtype, rows, context + 4 * replays)
    try:
        batch.load(tokens, [context] * rows, list(range(rows)))
        for _ in range(3):
            batch.run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(replays):
            batch.run()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / replays
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(replays):
                batch.run()
            torch.cuda.synchronize()
    finally:
        engine.close()
    del cache
    kernels = sorted(
        ((event.self_device_time_total / replays, event.count / replays, event.key)
         for event in profiler.key_averages() if event.self_device_time_total > 0),
        reverse=True,
    )  # fmt: skip
    busy = sum(microseconds for microseconds, _, _ in kernels)
    yield {"how": "graph of one step, replayed", "ms_per_token": seconds * 1e3, "busy_us": busy,
           "launches": sum(count for _, count, _ in kernels)}  # fmt: skip
    for microseconds, count, kernel in kernels[:24]:
        yield {"how": f"kernel {kernel[:70]}", "us_per_step": microseconds, "launches": count,
               "share_percent": 100 * microseconds / busy}  # fmt: skip


def captured_seconds(call, replays=20):
    """Time of a call as a CUDA graph: launches from the host drop out."""
    call()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / replays


@torch.no_grad()
def experts_crossover(model, counts):
    """Yields, for numbers of tokens, the routed experts by the decoding kernels and by the grouped matmul (with the
    sorting and gathering around it): microseconds a layer, averaged over all layers' weights, random routing."""
    from modeling_deepseek_r1.experts import grouped_mm_experts_forward
    from modeling_deepseek_r1.kernels_experts import decode_experts

    layers = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    config, weight = model.config, layers[0].gate_up_proj
    for tokens in counts:
        states = torch.randn(tokens, config.hidden_size, dtype=weight.dtype, device=weight.device)
        scores = torch.rand(tokens, config.n_routed_experts, device=weight.device)
        gates, indices = scores.topk(config.num_experts_per_tok)
        found = {}
        for name, function in (("decode", decode_experts), ("grouped_mm", grouped_mm_experts_forward)):
            seconds = captured_seconds(lambda: [function(experts, states, indices, gates) for experts in layers])
            found[name] = seconds / len(layers) * 1e6
        yield {"how": f"routed experts, {tokens} tokens", "decode_us": found["decode"],
               "grouped_mm_us": found["grouped_mm"], "grouped_over_decode": found["grouped_mm"] / found["decode"],
               "experts_touched": indices.unique().numel()}  # fmt: skip


def memory_limit(device):
    """TB/s of the device's memory by its data sheet, or None where it is not listed."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((limit for part, limit in MEMORY_TB_PER_SECOND.items() if part in name), None)
