"""The model with the fused training kernels against the same model in plain torch: losses, gradients, load counts.

On a GPU the kernels run as they are, elsewhere in Triton's interpreter (see `interpreted` in tests/conftest.py).
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modeling_deepseek_r1.documents import find_documents
from modeling_deepseek_r1.fused import runs_fused, set_fused_kernels
from recipes.optimizers import FusedAdamW

from .helpers import tiny_model
from .kernel_tests import DEVICE, runs_elsewhere, runs_kernels, switch_restored  # noqa: F401  (the fixture acts by being here)

# The interpreter takes milliseconds a row of a layer: there one dense and one MoE layer and short rows.
LENGTH, SIZES = (21, {}) if DEVICE == "cuda" else (9, {"num_hidden_layers": 2})

KINDS = {
    "plain": dict(num_nextn_predict_layers=1, seq_aux_loss_alpha=0.1),
    "direct queries": dict(q_lora_rank=None, n_group=1, topk_group=1, rope_interleave=False),
    "softmax": dict(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
                    n_shared_experts=0, router_z_loss_coef=0.01),
}  # fmt: skip


@runs_elsewhere
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


def step(model, fused, autocast, ids, **inputs):
    """-> loss, gradients by name, load counts of a training step."""
    set_fused_kernels(fused)
    model.train().zero_grad()
    model.discard_expert_counts()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, [router.load_counts.clone() for router in model.routers.values()]


def model_and_ids(kind, dtype=torch.float32, **changes):
    torch.manual_seed(3)
    changes = {**SIZES, **KINDS[kind], **changes}
    model = tiny_model(implementation="sdpa", **changes).to(DEVICE, dtype)
    return model, torch.randint(3, model.config.vocab_size, (2, LENGTH), device=DEVICE)


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_the_plain_one(kind):
    """fp32. Padding and packed documents included: what differs from row to row goes through masks."""
    model, ids = model_and_ids(kind)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    first = LENGTH * 3 // 7
    positions = torch.cat((torch.arange(first), torch.arange(LENGTH - first))).expand(2, -1).to(DEVICE)
    cases = {"attention_mask": mask}, {"position_ids": positions}, {}
    for inputs in cases if DEVICE == "cuda" or kind == "plain" else cases[:1]:
        plain, fused = (step(model, on, False, ids, **inputs) for on in (False, True))
        torch.testing.assert_close(fused[0], plain[0], rtol=2e-5, atol=1e-5)
        assert fused[1].keys() == plain[1].keys()
        for name in plain[1]:
            torch.testing.assert_close(fused[1][name], plain[1][name], rtol=1e-3, atol=2e-5, msg=name)
        assert all(torch.equal(a, b) for a, b in zip(fused[2], plain[2]))


@runs_kernels
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_keeps_to_the_fp32_gradients(autocast):
    """Neither bf16 form may be farther from the fp32 step than twice the plain bf16 one (in the interpreter, which cuts
    off where a GPU rounds, three times); routes are replayed, since rounding would make experts change places."""
    times = 2 if DEVICE == "cuda" else 3
    # Widths that torch's grouped matmul takes on CUDA.
    model, ids = model_and_ids("direct queries", hidden_size=64, moe_intermediate_size=32)
    layers = len(model.routers)
    top_k, experts = model.config.num_experts_per_tok, model.config.n_routed_experts
    routes = torch.rand(*ids.shape, layers, experts, device=DEVICE).argsort(-1)[..., :top_k]
    exact = step(model, False, False, ids, routes=routes)[1]
    if not autocast:
        model = model.bfloat16()
    plain, fused = (step(model, on, autocast, ids, routes=routes)[1] for on in (False, True))
    for name, wanted in exact.items():
        error, allowed = ((each[name].float() - wanted).norm() for each in (fused, plain))
        assert error <= times * allowed + 0.01 * wanted.norm(), f"{name}: {error} against {allowed}, {wanted.norm()}"


@runs_kernels
def test_copies_kept_by_the_optimizer_change_no_number():
    """Two steps under autocast, so that the second takes what the first has written."""
    runs = []
    for copies in (False, True):
        model, ids = model_and_ids("direct queries", hidden_size=64, moe_intermediate_size=32)
        optimizer = FusedAdamW(model.parameters(), lr=1e-2, compute_copies=copies)
        found = []
        for row in ids[:, :5].split(1):
            found.append(step(model, True, True, row)[:2])
            optimizer.step()
        runs.append(found)
    linears = {f"{name}.weight" for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    narrow = {name for name, gradient in runs[1][1][1].items() if gradient.dtype == torch.bfloat16}
    assert narrow == linears - {"lm_head.weight"} | {name for name in runs[1][1][1] if ".experts." in name}
    for (loss, gradients), (expected_loss, expected) in zip(runs[1], runs[0]):
        assert loss == expected_loss
        for name, wanted in expected.items():
            assert torch.equal(gradients[name].float(), wanted), name


@runs_kernels
def test_checkpointing_changes_nothing_and_counts_once():
    model, ids = model_and_ids("plain")
    whole = step(model, True, False, ids[:1])
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = step(model, True, False, ids[:1])
        torch.testing.assert_close(again[0], whole[0])
        for name in whole[1]:
            torch.testing.assert_close(again[1][name], whole[1][name], rtol=1e-4, atol=1e-6, msg=f"{name}, {reentrant}")
        assert all(torch.equal(a, b) for a, b in zip(again[2], whole[2]))


@runs_kernels
def test_hooks_and_frozen_weights_are_respected():
    """What stands around a module is called; what is frozen gets no gradient."""
    model, ids = model_and_ids("plain")
    layer, seen = model.model.layers[1], []
    for module in (layer.post_attention_layernorm, layer.mlp.experts, layer.mlp.shared_experts.gate_proj):
        module.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    layer.mlp.experts.down_proj.requires_grad_(False)
    loss, gradients, _ = step(model, True, False, ids)
    assert seen == ["DeepSeekR1RMSNorm", "Linear", "DeepSeekR1Experts"]
    assert "model.layers.1.mlp.experts.down_proj" not in gradients
    plain_loss, plain, _ = step(model, False, False, ids)
    torch.testing.assert_close(loss, plain_loss, rtol=2e-5, atol=1e-5)
    for name in plain:
        torch.testing.assert_close(gradients[name], plain[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="flash attention over documents needs a GPU")
@pytest.mark.parametrize("kind", ["plain", "direct queries"])
def test_documents_see_only_themselves(kind):
    """Packed rows in bf16, without a mask: as near to fp32 under a dense mask as plain bf16 is."""
    model, ids = model_and_ids(kind, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=20, hidden_size=64,
                               moe_intermediate_size=32, num_nextn_predict_layers=0)  # fmt: skip
    positions = torch.stack((torch.cat((torch.arange(9), torch.arange(12))), torch.arange(21))).to(DEVICE)
    layers, config = len(model.routers), model.config
    routes = torch.rand(*ids.shape, layers, config.n_routed_experts, device=DEVICE).argsort(-1)
    inputs = {"position_ids": positions, "routes": routes[..., : config.num_experts_per_tok]}
    exact = step(model, False, False, ids, **inputs)
    plain, fused = (step(model, on, True, ids, **inputs) for on in (False, None))
    assert abs(fused[0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + 0.01
    for name, wanted in exact[1].items():
        error, allowed = ((each[1][name].float() - wanted).norm() for each in (fused, plain))
        assert error <= 2 * allowed + 0.02 * wanted.norm(), f"{name}: {error} against {allowed}, {wanted.norm()}"


@pytest.mark.parametrize("positions, bounds", [
    ([[0, 1, 2, 3]], [0, 4, 8]), ([[0, 1, 0, 1], [0, 1, 2, 3]], [0, 2, 4, 8]),
    ([[5, 6, 7, 8], [1, 0, 1, 2]], [0, 4, 5, 8]),
])  # fmt: skip
def test_where_documents_lie(positions, bounds):
    found = find_documents(torch.tensor(positions), 2)
    if len(bounds) == 3:
        assert found is None
    else:
        assert found.bounds.tolist() == bounds and found.bounds.dtype == torch.int32
        assert found.longest == max(b - a for a, b in zip(bounds, bounds[1:]))


def test_the_switch():
    value = torch.zeros(1, device=DEVICE)
    set_fused_kernels(False)
    assert not runs_fused(value)
    set_fused_kernels(None)
    assert runs_fused(value) == (DEVICE == "cuda")
    assert not runs_fused(value.long())


@runs_kernels
def test_a_function_of_the_model_can_be_checkpointed_by_hand():
    model, ids = model_and_ids("direct queries")
    set_fused_kernels(True)
    layer = model.train().model.layers[1]
    states = torch.randn(2, LENGTH, model.config.hidden_size, device=DEVICE, requires_grad=True)
    angles = model.model.rotary_emb(states, torch.arange(LENGTH, device=DEVICE).unsqueeze(0))
    run = lambda x: layer(x, position_embeddings=angles)
    wanted, = torch.autograd.grad(run(states).square().sum(), states)
    found, = torch.autograd.grad(checkpoint(run, states, use_reentrant=False).square().sum(), states)
    torch.testing.assert_close(found, wanted)
