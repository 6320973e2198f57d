"""What differs on a GPU: fused grouped matmuls, autocast, loss scaling, compilation. Skipped without one."""

import pytest
import torch
from datasets import Dataset
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Trainer, TrainingArguments

from modeling_deepseek_r1.losses import linear_cross_entropy
from recipes.callbacks import ExpertBalanceCallback
from tests.modeling.test_balance import Record, arguments, rows, tiny_model, tiny_tokenizer
from tests.modeling.test_checkpoints import FIELDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def relative_error(result, reference):
    return ((result.double() - reference.double()).norm() / reference.double().norm()).item()


def wide_model(**changes):
    """Sizes that torch's grouped matmul takes (multiples of 8 elements)."""
    fields = dict(hidden_size=128, moe_intermediate_size=64, intermediate_size=256, n_routed_experts=16,
                  num_experts_per_tok=4, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
                  seq_aux_loss_alpha=1e-4)  # fmt: skip
    return tiny_model(**{**fields, **changes}).cuda()


@pytest.mark.parametrize("empty", [False, True])
def test_grouped_experts_equal_the_loop(empty):
    model = wide_model()
    experts = model.model.layers[1].mlp.experts
    states = torch.randn(300, 128, device="cuda", requires_grad=True)
    indices = torch.rand(300, 16, device="cuda").topk(4).indices
    if empty:
        indices = indices % 3                                             # most experts get nothing, some pairs repeat
    weights = torch.rand(300, 4, device="cuda", requires_grad=True)
    results = {}
    for kind, dtype in (("eager", torch.float64), ("grouped_mm", torch.bfloat16)):
        model.set_experts_implementation(kind)
        twin = experts.to(dtype)
        of_weights = dtype if kind == "eager" else torch.float32
        inputs = [part.detach().to(of).requires_grad_() for part, of in ((states, dtype), (weights, of_weights))]
        output = twin(inputs[0], indices, inputs[1])
        results[kind] = [output, *torch.autograd.grad(output.square().sum(), [*inputs, *twin.parameters()])]
    for fast, plain in zip(results["grouped_mm"], results["eager"]):
        assert relative_error(fast, plain) < 2e-2                         # bf16 has 8 bits of mantissa


def test_fp32_logits_equal_the_librarys():
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**FIELDS, num_key_value_heads=2, num_mtp_layers=0)).cuda().eval()
    ours = tiny_model(**{**FIELDS, "num_nextn_predict_layers": 0}).cuda().eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(3, 64, (2, 30), device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp32", "bf16_autocast", "bf16"])
def test_linear_cross_entropy(kind, monkeypatch):
    monkeypatch.setattr("modeling_deepseek_r1.losses.CHUNK_ELEMENTS", 64 * 512)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    head = torch.nn.Linear(64, 512, bias=False, device="cuda", dtype=dtype)
    hidden = torch.randn(200, 64, device="cuda", dtype=dtype, requires_grad=True)
    labels = torch.randint(512, (200,), device="cuda")
    labels[:20] = -100
    with torch.autocast("cuda", torch.bfloat16, enabled=kind == "bf16_autocast"):
        total, _ = linear_cross_entropy(hidden, head, labels, 0.1)
    logits = hidden.double() @ head.weight.double().t()
    reference = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    tolerance = 1e-5 if kind == "fp32" else 1e-2
    assert relative_error(total, reference) < tolerance
    ours = torch.autograd.grad(total / 180, [hidden, head.weight])
    for gradient, exact in zip(ours, torch.autograd.grad(reference / 180, [hidden, head.weight])):
        assert relative_error(gradient, exact) < tolerance


def train(tmp_path, batch, steps, model, **changes):
    record = Record()
    fields = {**arguments(tmp_path, batch, steps), "use_cpu": False, "learning_rate": 1e-3, **changes}
    settings = TrainingArguments(**fields)
    settings._n_gpu = 1  # with several cards and no launcher, Trainer would take nn.DataParallel
    trainer = Trainer(model, settings, train_dataset=rows(8),
                      callbacks=[ExpertBalanceCallback(), record])  # fmt: skip
    return trainer.train().training_loss, record


def test_injected_gradient_under_fp16_loss_scaling(tmp_path):
    """Balance gradient (difference of alpha 1 and 0) is equal for 8x1 and 2x4 under the scaler, and in fp32."""
    gradients = []
    for batch, fp16 in ((8, False), (8, True), (2, True)):
        with_loss, without = (
            train(tmp_path, batch, 1, wide_model(seq_aux_loss_alpha=alpha), learning_rate=0.0, fp16=fp16)[1].grads[0]
            for alpha in (1.0, 0.0)
        )
        gradients.append(with_loss - without)
    for scaled in gradients[1:]:
        # fp16 activations move a few tokens to other experts; a wrong scale would be off by 4 or by 65536
        assert relative_error(scaled, gradients[0]) < 8e-2


def sft_gradient(tmp_path, batch, alpha, fp16):
    from trl import SFTConfig, SFTTrainer

    record = Record()
    fields = arguments(tmp_path, batch, 1, bf16=False, fp16=fp16, use_cpu=False)
    settings = SFTConfig(**fields)
    settings._n_gpu = 1
    SFTTrainer(
        wide_model(seq_aux_loss_alpha=alpha), settings, train_dataset=rows(8).remove_columns("labels"),
        processing_class=tiny_tokenizer(), callbacks=[ExpertBalanceCallback(), record],
    ).train()  # fmt: skip
    return record.grads[0]


def grpo_gradient(tmp_path, batch, alpha, fp16):
    from trl import GRPOConfig, GRPOTrainer

    record = Record()
    fields = arguments(tmp_path, batch, 1, bf16=False, fp16=fp16, use_cpu=False, num_generations=8)
    settings = GRPOConfig(**fields, max_completion_length=6)
    settings._n_gpu = 1
    GRPOTrainer(
        wide_model(seq_aux_loss_alpha=alpha), reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=settings, train_dataset=Dataset.from_dict({"prompt": ["t5 t6 t7", "t9 t8"] * 4}),
        processing_class=tiny_tokenizer(), callbacks=[ExpertBalanceCallback(), record],
    ).train()  # fmt: skip
    return record.grads[0]


@pytest.mark.parametrize("gradient", [sft_gradient, grpo_gradient])
def test_injected_gradient_under_fp16_loss_scaling_in_trl(tmp_path, gradient):
    exact, whole, split, single = (
        gradient(tmp_path, batch, 1.0, fp16) - gradient(tmp_path, batch, 0.0, fp16)
        for batch, fp16 in ((8, False), (8, True), (2, True), (1, True))
    )
    assert exact.norm() > 1e-3
    assert relative_error(split, whole) < 8e-2 and relative_error(single, whole) < 8e-2
    # Sampling in fp16 may give other completions than in fp32; a missing loss scale would be off by 65536.
    assert 0.5 < whole.norm() / exact.norm() < 2.0


@pytest.mark.parametrize(
    "changes", [{"bf16": True}, {"fp16": True}, {}, {"bf16": True, "gradient_checkpointing": True}]
)
def test_trains_in_every_precision(tmp_path, changes):
    model = wide_model()
    before = model.model.layers[1].mlp.experts.gate_up_proj.detach().clone()
    loss, record = train(tmp_path, 8, 60, model, learning_rate=3e-3, **changes)
    assert loss < 4.0 and record.loads[-1].sum(-1).tolist() == [8 * 16 * 4] * 2    # starts at ln 64 = 4.16
    assert not torch.equal(before, model.model.layers[1].mlp.experts.gate_up_proj)


def test_compiles_in_one_graph_and_counts():
    torch._dynamo.reset()
    model, ids = wide_model(num_nextn_predict_layers=1).bfloat16().train(), torch.randint(3, 64, (2, 32), device="cuda")
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    counts = [router.load_counts.clone() for router in model.routers.values()]
    model.discard_expert_counts()
    compiled = torch.compile(model, fullgraph=True)(input_ids=ids, labels=ids).loss
    compiled.backward()
    torch.testing.assert_close(compiled, loss, rtol=2e-2, atol=2e-2)
    for router, count in zip(model.routers.values(), counts):
        tokens = 32 if router is not model.routers[3] else 31
        assert int(router.load_counts.sum()) == int(count.sum()) == 2 * 4 * tokens


def test_generates_with_dynamic_and_static_caches():
    model, ids = wide_model().bfloat16().eval(), torch.randint(3, 64, (2, 8), device="cuda")
    dynamic = model.generate(ids, max_new_tokens=12, do_sample=False)
    static = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert dynamic.shape == (2, 20) and (dynamic == static).float().mean() > 0.9       # bf16 near-ties may differ


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_loss_with_layers_on_two_devices(tmp_path):
    model = wide_model(num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0,
              "model.layers.2": 1, "model.layers.3": 1, "model.norm": 1, "lm_head": 1}  # fmt: skip
    spread = type(model).from_pretrained(tmp_path, device_map=places).train()
    ids = torch.randint(3, 64, (2, 12), device="cuda:0")
    losses = [m.train()(input_ids=ids, labels=ids).loss for m in (model, spread)]
    torch.testing.assert_close(losses[0].cpu(), losses[1].cpu(), rtol=1e-4, atol=1e-5)
    losses[1].backward()
    assert set(spread.update_expert_bias()) == {1, 2, 3}
