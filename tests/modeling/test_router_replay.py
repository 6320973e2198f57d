"""Router replay: experts recorded in one pass are used again in another, and their gate values still learn."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from trl.trainer.utils import add_fused_lm_head

from modeling_deepseek_r1 import DeepSeekR1ForSequenceClassification, DeepSeekR1ForTokenClassification
from modeling_deepseek_r1.decoding_options import DecodingOptions
from modeling_deepseek_r1.moe import DeepSeekR1MoE
from modeling_deepseek_r1.replay import recorded_routes, route_mismatch
from modeling_deepseek_r1.routing import sequence_balance_loss

from .helpers import VOCAB, close, gradients, padded, random_ids, tiny_config, tiny_model
from .test_citizen import assert_same_step, step
from .test_decoding_sampling import DEVICE, kernels, needs_kernels

ENDS = [2, 5, 9, 11, 23, 31]  # rows end at different steps
PADS = (0, 3, 2, 6, 1)
FEW_TOKENS = 40  # log-probabilities stay above -4, below which one rounding error is 5e-7
KINDS = {
    "sigmoid": {},
    "greedy": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "group_limited": {"scoring_func": "softmax", "topk_method": "group_limited_greedy"},
}
LAYERS, EXPERTS, TOP_K = 2, 8, 3  # of the tiny model


def random_routes(rows=2, length=11, layers=LAYERS, missing=0.2):
    """Experts that no router would choose; every fifth token or so was not recorded."""
    routes = torch.rand(rows, length, layers, EXPERTS).argsort(-1)[..., :TOP_K].to(torch.int16)
    return routes.masked_fill(torch.rand(rows, length, 1, 1) < missing, -1)


@torch.no_grad()
def twin_experts(**changes):
    """A model whose experts stand in pairs with one and the same row of the router: of three chosen experts one has a
    twin that was as likely, so that a last digit decides, while the gate values are those of either."""
    torch.manual_seed(0)
    model = tiny_model(implementation="sdpa", initializer_range=0.05, vocab_size=FEW_TOKENS, **changes)
    for router in model.routers.values():
        router.weight[1::2] = router.weight[::2]
        if router.has_bias:
            router.e_score_correction_bias.zero_()
    return model


def sample(model, rows=5, ids=None, **options):
    """-> sequences, attention mask of the tokens that count, the record, routes for a forward pass over them."""
    ids, mask, _ = padded(torch.randint(3, FEW_TOKENS, (rows, 9)) if ids is None else ids, "left", PADS[:rows])
    model.decoding.record_routes = model.decoding.record_log_probs = True
    set_seed(3)
    options = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": ENDS, "pad_token_id": 0, **options}
    sequences = model.generate(ids, attention_mask=mask, **options)
    ended = torch.isin(sequences[:, 9:], torch.tensor(options["eos_token_id"])).long()
    mask = torch.cat((mask, (ended.cumsum(-1) - ended == 0).long()), dim=1)
    record = model.decoding_record
    return sequences, mask, record, F.pad(record.routes, (0, 0, 0, 0, 0, 1), value=-1)


def trainer_log_probs(model, sequences, mask, temperature=1.0, **kwargs):
    """(B, new tokens) as TRL computes them (positions count over the padding), 0 after a row's end; and the routes."""
    with torch.no_grad(), recorded_routes(model) as passes:
        logits = model(sequences, attention_mask=mask, **kwargs).logits / temperature
    found = logits.log_softmax(-1)[:, 8:-1].gather(-1, sequences[:, 9:, None]).squeeze(-1)
    return found * mask[:, 9:], passes[0]


# --- sampler and trainer ---------------------------------------------------------------------------------------------


@torch.no_grad()
def perturb(model, weights=0.0, biases=0.0):
    for router in model.routers.values():
        router.weight.add_(weights * torch.randn_like(router.weight))
        router.e_score_correction_bias.add_(biases * torch.randn_like(router.e_score_correction_bias))


@pytest.mark.parametrize("change", [{"weights": 1e-7}, {"biases": 1.0}], ids=["weights", "biases"])
@pytest.mark.parametrize("train", [False, True])
def test_sampler_and_trainer_agree_after_the_routers_moved(change, train):
    """Two or three rounding errors with replay; some hundredths without."""
    model = twin_experts()
    sequences, mask, record, routes = sample(model)
    assert 5 < mask[:, 9:].sum() < mask[:, 9:].numel()  # rows do end at different steps
    perturb(model, **change)
    model.train(train)
    replayed, used = trainer_log_probs(model, sequences, mask, routes=routes)
    assert (replayed - record.log_probs).abs().max() < 1e-6
    assert route_mismatch(used, routes, mask) == {"tokens": 0.0, "experts": 0.0}
    free, used = trainer_log_probs(model, sequences, mask)
    assert (free - record.log_probs).abs().max() > 1e-3
    apart = route_mismatch(used, routes, mask)
    assert apart["tokens"] > 0.1 and apart["experts"] >= apart["tokens"] / TOP_K - 1e-6


def test_moved_biases_leave_a_replayed_pass_as_it_was_to_the_bit():
    model = twin_experts()
    sequences, mask, _, routes = sample(model)
    routes = torch.where(routes < 0, torch.arange(TOP_K, dtype=torch.int16), routes)  # the rows' last tokens too
    before, _ = trainer_log_probs(model, sequences, mask, routes=routes)
    perturb(model, biases=3.0)
    assert torch.equal(trainer_log_probs(model, sequences, mask, routes=routes)[0], before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
def test_what_generate_records_is_replayed(kind, rows):
    """Of any router, by the CPU's own layers (one row) too, repeated prompts included."""
    torch.manual_seed(2)
    model = tiny_model(implementation="sdpa", **KINDS[kind])
    sequences, mask, record, routes = sample(model, rows)
    assert routes.dtype == torch.int16 and routes.shape == (*sequences.shape, LAYERS, TOP_K)
    free, chosen = trainer_log_probs(model, sequences, mask)
    replayed, used = trainer_log_probs(model, sequences, mask, routes=routes)
    recorded = routes[..., 0, 0] >= 0
    assert torch.equal(recorded.sum(1), mask.sum(1) - 1)  # all but each row's last token
    assert torch.equal(used[recorded], routes[recorded]) and (used >= 0).all()
    assert route_mismatch(chosen, routes, mask)["tokens"] == 0.0
    close(replayed, record.log_probs, atol=2e-5)
    close(replayed, free)


# --- gradients -------------------------------------------------------------------------------------------------------


def reference_moe(block, hidden_states, routes):
    """Token by token, expert by expert; one group of experts, no balance loss."""
    gate, experts, inner = block.gate, block.experts, block.experts.gate_up_proj.shape[1] // 2
    rows = []
    for states, chosen in zip(hidden_states.flatten(0, 1), routes.flatten(0, 1).tolist()):
        logits = gate.weight @ states
        scores = torch.sigmoid(logits) if gate.has_bias else torch.softmax(logits, 0)
        if chosen[0] < 0:
            biased = scores + gate.e_score_correction_bias if gate.has_bias else scores
            chosen = sorted(range(EXPERTS), key=lambda expert: -float(biased[expert].detach()))[:TOP_K]
        total = sum(scores[expert] for expert in chosen) if gate.norm_topk_prob else 1.0
        output = block.shared_experts(states)
        for expert in chosen:
            gate_up = experts.gate_up_proj[expert] @ states
            fed = experts.down_proj[expert] @ (F.silu(gate_up[:inner]) * gate_up[inner:])
            output = output + gate.routed_scaling_factor * scores[expert] / total * fed
        rows.append(output)
    return torch.stack(rows).view_as(hidden_states)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
@pytest.mark.parametrize("kind", ["sigmoid", "greedy"])
def test_gradients_equal_a_plain_loop(kind, dtype):
    """Of routers, experts and hidden states; the router's come from the recorded experts' gate values."""
    torch.manual_seed(4)
    changes = {"n_group": 1, "topk_group": 1, "seq_aux_loss_alpha": 0.0, "routed_scaling_factor": 2.5, **KINDS[kind]}
    block = DeepSeekR1MoE(tiny_config(**changes)).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if block.gate.has_bias:
        block.gate.e_score_correction_bias.normal_()
    states, routes, direction = torch.randn(2, 7, 32), random_routes(2, 7)[:, :, 0], torch.randn(2, 7, 32)
    assert (routes[..., 0] < 0).any() and (routes[..., 0] >= 0).any()
    found = []
    for function in (lambda x: block(x, routes=routes.to(dtype)), lambda x: reference_moe(block, x, routes)):
        inputs = states.clone().requires_grad_()
        block.zero_grad()
        output = function(inputs)
        (output * direction).sum().backward()
        found.append((output.detach(), inputs.grad, gradients(block)))
        block.zero_grad(set_to_none=True)
    (output, grad, grads), (expected, expected_grad, expected_grads) = found
    close(output, expected)
    close(grad, expected_grad)
    assert grads.keys() == expected_grads.keys() and grads["gate.weight"].abs().max() > 0.1
    for name, gradient in expected_grads.items():
        close(grads[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_load_and_balance_loss_are_those_of_the_replayed_experts():
    model = tiny_model(seq_aux_loss_alpha=0.1).train()
    router, states, routes = model.routers[1], torch.randn(2, 6, 32), random_routes(2, 6, missing=0.0)[:, :, 0]
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    (router(states, mask, None, routes)[1].sum() * 0.0).backward()  # only the injected part is left
    assert torch.equal(router.load_counts, routes[mask].long().flatten().bincount(minlength=EXPERTS))
    weight = router.weight.detach().clone().requires_grad_()
    loss, _ = sequence_balance_loss((states @ weight.t()).sigmoid(), routes.long(), mask)
    close(router.weight.grad, torch.autograd.grad(0.1 * loss, weight)[0])


def test_the_routers_own_choice_as_routes_changes_nothing_to_the_bit():
    """With multi-token prediction, whose layers choose their experts themselves."""
    model, ids = tiny_model(num_nextn_predict_layers=1, seq_aux_loss_alpha=0.01), random_ids()
    with recorded_routes(model) as passes:
        expected = step(model, ids)
    assert passes[0].shape == (2, 11, LAYERS, TOP_K) and not any(m._forward_hooks for m in model.modules())
    for routes in (passes[0], torch.full_like(passes[0], -1), passes[0].masked_fill(random_routes() < 0, -1)):
        assert_same_step(step(model, ids, routes=routes), expected, atol=0.0, rtol=0.0)
    assert (step(model, ids, routes=random_routes())[0] - expected[0]).abs() > 1e-3


# --- whoever calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_replays_too(reentrant):
    model, ids, routes = tiny_model(num_nextn_predict_layers=1), random_ids(), random_routes()
    expected = step(model, ids, routes=routes)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    forwards = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    with recorded_routes(model) as passes:
        assert_same_step(step(model, ids, routes=routes), expected)
    assert len(forwards) == 2 and len(passes) == 1
    assert torch.equal(passes[0][routes >= 0], routes[routes >= 0])


def test_one_compiled_graph_serves_all_routes():
    torch._dynamo.reset()
    model, ids = tiny_model(implementation="sdpa"), random_ids()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for routes in (random_routes(), random_routes()):
        expected = step(model, ids, routes=routes)
        model.zero_grad()
        model.discard_expert_counts()
        loss = compiled(ids, labels=ids, routes=routes).loss
        loss.backward()
        counts = {layer: router.load_counts.clone() for layer, router in model.routers.items()}
        assert_same_step((loss.detach(), gradients(model), counts), expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    model, ids, routes = tiny_model(), random_ids(), random_routes()
    expected = step(model, ids, routes=routes)
    model.zero_grad()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(ids, labels=ids, routes=routes).loss.backward()
    for name, gradient in expected[1].items():
        close(model.get_parameter(name).grad, gradient)


def test_adapters():
    model, ids, routes = tiny_model(), random_ids(), random_routes()
    settings = {"target_modules": ["q_b_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    with torch.no_grad():
        expected = model(ids, routes=routes).logits
        adapted = get_peft_model(model, LoraConfig(r=2, **settings))
        with recorded_routes(adapted) as passes:
            close(adapted(input_ids=ids, routes=routes).logits, expected)
        assert torch.equal(passes[0][routes >= 0], routes[routes >= 0])


def test_the_fused_head_of_trl():
    """Without the causal LM's own forward; log-probabilities, and gradients of a policy loss."""
    model, ids, routes = tiny_model().train(), random_ids(), random_routes()
    found = []
    for fused in (False, True):
        model.zero_grad()
        if fused:
            add_fused_lm_head(model)
            log_probs = model(input_ids=ids, labels=ids, fused_lm_head=True, routes=routes).log_probs
            log_probs = log_probs[:, -10:]
        else:
            logits = model(ids, routes=routes).logits[:, :-1]
            log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        log_probs.sum().backward()
        found.append((log_probs.detach(), {name: grad.clone() for name, grad in gradients(model).items()}))
    close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        close(found[1][1][name], gradient, atol=1e-4, rtol=1e-4)
    assert found[0][1]["model.layers.1.mlp.gate.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("model_class", [DeepSeekR1ForSequenceClassification, DeepSeekR1ForTokenClassification])
def test_classifiers_hand_routes_on(model_class):
    model, ids, routes = tiny_model(model_class), random_ids(), random_routes()
    with recorded_routes(model) as passes, torch.no_grad():
        model(ids)
        model(ids, routes=routes)
    assert torch.equal(passes[1][routes >= 0], routes[routes >= 0]) and not torch.equal(*passes)


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_documents_of_a_packed_row_take_their_own_routes(precision):
    """In bf16 too: fixed experts leave rounding errors only."""
    model, ids, routes = tiny_model(implementation="sdpa"), random_ids(1, 20), random_routes(1, 20, missing=0.0)
    model = model.bfloat16() if precision == "bf16" else model
    tolerance = 1e-5 if precision == "fp32" else 0.1
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        with recorded_routes(model) as passes:
            packed = model(ids, position_ids=positions, routes=routes, use_cache=False).logits
        parts = [model(ids[:, part], routes=routes[:, part]).logits for part in (slice(0, 8), slice(8, 20))]
    assert torch.equal(passes[0], routes)
    close(packed.float(), torch.cat(parts, dim=1).float(), atol=tolerance, rtol=tolerance)


def test_a_cached_pass_takes_the_routes_of_its_own_tokens():
    model, ids, routes = tiny_model(), random_ids(), random_routes()
    with torch.no_grad():
        expected = model(ids, routes=routes).logits
        first = model(ids[:, :6], routes=routes[:, :6], use_cache=True)
        rest = model(ids[:, 6:], routes=routes[:, 6:], past_key_values=first.past_key_values)
    close(torch.cat((first.logits, rest.logits), dim=1), expected)


# --- what is refused, and what is measured ---------------------------------------------------------------------------


def test_routes_that_cannot_be_meant_are_refused():
    model, ids, routes = tiny_model(), random_ids(), random_routes(missing=0.0)
    with pytest.raises(ValueError, match=r"shape \(2, 10, 2, 3\); these inputs need \(2, 11, 2, 3\).*append -1"):
        model(ids, routes=routes[:, :-1])
    for wrong in (routes[:1], routes[:, :, :1], routes[..., :2], routes[..., 0]):
        with pytest.raises(ValueError, match="these inputs need"):
            model(ids, routes=wrong)
    for wrong, message in ((EXPERTS, "name expert 8; the 8 experts are 0 to 7"), (-1, "name expert -1")):
        broken = routes.clone()
        broken[1, 3, 1, 2] = wrong
        with pytest.raises(ValueError, match=message):
            model(ids, routes=broken)
    with pytest.raises(ValueError, match="twice at one token"):
        model(ids, routes=torch.zeros_like(routes))
    with pytest.raises(ValueError, match="dtype torch.float32"):
        model(ids, routes=routes.float())
    with pytest.raises(ValueError, match="routes"):
        model.generate(ids, routes=routes, max_new_tokens=2)
    dense = tiny_model(n_routed_experts=None)
    with pytest.raises(ValueError, match="no layer of this model has experts"):
        dense(ids, routes=routes)
    with pytest.raises(ValueError, match="no layers with experts"), recorded_routes(dense):
        pass


def test_mismatch_is_free_of_order_and_counts_what_both_recorded():
    ours = torch.tensor([[[[0, 1, 2]], [[3, 4, 5]], [[-1, -1, -1]], [[0, 1, 2]]]], dtype=torch.int16)
    theirs = torch.tensor([[[[2, 0, 1]], [[5, 6, 7]], [[0, 1, 2]], [[4, 5, 6]]]])
    assert route_mismatch(ours, theirs) == pytest.approx({"tokens": 2 / 3, "experts": 5 / 9})
    mask = torch.tensor([[True, True, True, False]])
    assert route_mismatch(ours, theirs, mask) == pytest.approx({"tokens": 1 / 2, "experts": 2 / 6})
    assert route_mismatch(theirs, ours, mask) == pytest.approx({"tokens": 1 / 2, "experts": 2 / 6})
    assert route_mismatch(ours, ours) == {"tokens": 0.0, "experts": 0.0}
    with pytest.raises(ValueError, match="routes_a, routes_b and mask are of shapes"):
        route_mismatch(ours, theirs[:, 1:])


def test_a_failed_pass_leaves_the_recording_as_it_was():
    model, ids = tiny_model(), random_ids()
    with recorded_routes(model) as passes, torch.no_grad():
        with pytest.raises(ValueError):
            model(ids, routes=random_routes(1))
        model(ids)
        model(ids[:, :4])
    assert [tuple(routes.shape[:2]) for routes in passes] == [(2, 11), (2, 4)]


# --- the temperature of recorded log-probabilities -------------------------------------------------------------------


@pytest.mark.parametrize("rows, options", [
    (5, {}), (1, {}), (5, {"no_repeat_ngram_size": 9}), (5, {"top_k": 5, "repetition_penalty": 1.3}),
], ids=["on the device", "one row", "on the host", "processors"])  # fmt: skip
def test_log_probs_are_of_the_trainers_temperature(rows, options):
    torch.manual_seed(2)
    model = tiny_model(implementation="sdpa", initializer_range=0.1)
    ids = random_ids(rows, 9)
    expected = sample(model, rows, ids, temperature=0.7, **options)[0]
    model.decoding.log_prob_temperature = 0.7
    sequences, mask, record, routes = sample(model, rows, ids, temperature=0.7, **options)
    assert torch.equal(sequences, expected)  # it changes no choice
    log_probs, _ = trainer_log_probs(model, sequences, mask, temperature=0.7, routes=routes)
    close(record.log_probs, log_probs, atol=2e-5)
    assert (record.log_probs - trainer_log_probs(model, sequences, mask)[0]).abs().max() > 0.1


def test_temperature_in_batches_and_in_recorded_steps():
    model = tiny_model(max_position_embeddings=128)
    model.decoding.record_log_probs = True
    prompts, keys = [[4, 9, 7], [8, 3, 12, 40]], []
    for temperature in (1.0, 2.0):
        model.decoding.log_prob_temperature = temperature
        outputs = model.generate_batch(prompts, max_new_tokens=9, do_sample=True, temperature=0.5, eos_token_id=[VOCAB])
        keys.append(model.decoding_engine.step_key)
        for output in outputs.values():
            ids = torch.tensor([output.prompt_ids + output.generated_tokens])
            scores = model(ids).logits[0, len(output.prompt_ids) - 1 : -1] / temperature
            log_probs = scores.log_softmax(-1).gather(1, ids[0, len(output.prompt_ids) :, None])[:, 0]
            close(torch.tensor(output.logprobs), log_probs, atol=2e-5)
    assert keys[0] != keys[1]  # a recorded step keeps the number it was recorded with


@needs_kernels
def test_kernel_divides_by_the_temperature():
    logits = torch.randn(5, 150, device=DEVICE) * 9
    logits[0, 60:] = -torch.inf
    tokens, out, expected = torch.randint(60, (5,), device=DEVICE), *torch.empty(2, 5, device=DEVICE)
    kernels.token_log_probs(logits, tokens, out, 1.7)
    kernels.token_log_probs_reference(logits, tokens, expected, 1.7)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(expected, (logits / 1.7).log_softmax(-1)[range(5), tokens])


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("inf"), float("nan"), True, "1", None])
def test_a_temperature_has_to_be_a_number_above_zero(value):
    with pytest.raises(ValueError, match="log_prob_temperature=.* must be a number above 0"):
        DecodingOptions(log_prob_temperature=value)
