"""fp32, bf16 and fp16: what is kept exact, and that each of them trains."""

import pytest
import torch

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM
from modeling_deepseek_r1.norms import DeepSeekR1RMSNorm

from .helpers import close, library_twin, random_ids, tiny_config, tiny_model

CASTS = {
    "to_bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to_device_and_dtype": lambda model: model.to("cpu", torch.float16),
    "twice": lambda model: model.half().float(),
}


def routers(model):
    return list(model.routers.values())


@pytest.mark.parametrize("cast", CASTS)
def test_casting_keeps_what_routing_counts_on(cast):
    model, ids = tiny_model(num_nextn_predict_layers=1), random_ids()
    biases = [router.e_score_correction_bias.clone() for router in routers(model)]
    model.balance_loss_scale = 1 / 3  # not a number of bf16
    CASTS[cast](model)
    assert len(biases) == 3
    for router, bias in zip(routers(model), biases, strict=True):
        assert router.e_score_correction_bias.dtype == torch.float32 and torch.equal(
            router.e_score_correction_bias, bias
        )
        assert router.load_counts.dtype == torch.int64
        assert router.balance_loss_scale.dtype == torch.float32 and float(router.balance_loss_scale) == pytest.approx(
            1 / 3
        )
    model.train()(ids, labels=ids).loss.backward()
    model.update_expert_bias()
    for router, bias in zip(routers(model), biases, strict=True):
        moved = (router.e_score_correction_bias - bias).abs()
        close(moved[moved > 0], torch.full_like(moved[moved > 0], 0.001), atol=1e-6)
        assert moved.max() > 0  # 0.001 is lost on a bf16 value near 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_low_precision_keeps_the_bias(dtype, tmp_path):
    model = tiny_model(num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    loaded = DeepSeekR1ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == loaded.model.layers[1].mlp.experts.down_proj.dtype == dtype
    for router, expected in zip(routers(loaded), routers(model), strict=True):
        assert torch.equal(router.e_score_correction_bias, expected.e_score_correction_bias)
        assert router.e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("scores", [{}, {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_is_fp32_under_autocast(dtype, scores):
    """Logits, gate values and the choice of experts are bit for bit those of the router run outside autocast."""
    model, ids = (
        tiny_model(n_routed_experts=32, num_experts_per_tok=6, n_group=8, topk_group=4, **scores),
        random_ids(4, 16),
    )
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, output: seen.append((module, args, output)))
    with torch.autocast("cpu", dtype), torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    assert len(seen) == 2 and all(x.dtype == torch.float32 for x in logits)
    for module, args, output in list(seen):
        expected = type(module).forward(module, *args)
        assert output[0].dtype == output[1].dtype == torch.float32
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(output, expected, strict=True))
        rounded = args[0].flatten(0, -2).to(dtype) @ module.weight.T.to(dtype)
        assert not torch.equal(rounded.float(), output[0])  # what autocast would have made of it


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_bf16_is_as_close_to_fp32_as_the_librarys_bf16(mode, experts):
    """Distance to the fp32 logits, over tokens that both route as fp32 does: at most 1.5 x the library's own."""
    model = tiny_model(num_hidden_layers=2, experts=experts)
    twin, ids = library_twin(model), random_ids(8, 16)

    def logits_and_routes(m):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            output = m(ids, output_router_logits=True)
        bias = m.model.layers[1].mlp.gate.e_score_correction_bias.float()
        scores = (output.router_logits[0].float().sigmoid() + bias).unflatten(-1, (4, 2))
        kept = scores.sum(-1).topk(2).indices
        allowed = torch.full_like(scores, -torch.inf).scatter(1, kept[..., None].expand(-1, -1, 2), 0.0)
        return output.logits.float().flatten(0, 1), (scores + allowed).flatten(1).topk(3).indices.sort(-1).values

    with torch.no_grad():
        exact = twin(ids, output_router_logits=True)
    exact_logits = exact.logits.flatten(0, 1)
    if mode == "pure":
        model.bfloat16(), twin.bfloat16()
    (ours, our_routes), (theirs, their_routes) = logits_and_routes(model), logits_and_routes(twin)
    same = (our_routes == their_routes).all(-1)
    assert same.float().mean() > 0.8
    our_error, their_error = ((x - exact_logits)[same].abs().median() for x in (ours, theirs))
    assert 0 < our_error < 1.5 * their_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_large_values_does_not_overflow(dtype):
    """The square of 1000 is beyond fp16."""
    norm, states = DeepSeekR1RMSNorm(64).to(dtype), 1000 * torch.randn(5, 64)
    expected = states / states.pow(2).mean(-1, keepdim=True).sqrt()
    close(norm(states.to(dtype)).float(), expected, atol=2**-8, rtol=2**-7)


@pytest.mark.parametrize("mode", ["fp32", "pure_bf16", "bf16_autocast", "fp16_scaler"])
def test_a_batch_overfits(mode):
    """Twenty steps on one batch: the main loss falls under 60 %, MTP's under 80 %, nothing overflows."""
    model, ids = tiny_model(num_nextn_predict_layers=1, initializer_range=0.05), random_ids(4, 16)
    model = model.train().to(torch.bfloat16) if mode == "pure_bf16" else model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=mode == "fp16_scaler", init_scale=2.0**12)
    cast = {"bf16_autocast": torch.bfloat16, "fp16_scaler": torch.float16}.get(mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    main, mtp = [], []
    for _ in range(20):
        optimizer.zero_grad()
        model.balance_loss_scale = scaler.get_scale()
        with torch.autocast("cpu", cast, enabled=cast is not None):
            output = model(ids, labels=ids)
        scaler.scale(output.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.update_expert_bias()
        mtp.append(output.mtp_loss.item())
        main.append(output.loss.item() - model.config.mtp_loss_coef * mtp[-1])
    assert main[-1] < 0.6 * main[0] and mtp[-1] < 0.8 * mtp[0]
    assert scaler.get_scale() == (2.0**12 if mode == "fp16_scaler" else 1.0)  # no step overflowed
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


def test_rotary_angles_survive_a_cast():
    model = DeepSeekR1ForCausalLM(tiny_config(max_position_embeddings=8192))
    rotary, positions = model.model.rotary_emb, torch.arange(4000, 4100).unsqueeze(0)
    exact = rotary(torch.zeros(1), positions)
    model.bfloat16()
    for ours, theirs in zip(model.model.rotary_emb(torch.zeros(1), positions), exact):
        assert torch.equal(ours, theirs)
