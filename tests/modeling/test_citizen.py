"""A first-class transformers model: what the library's users and trainers rely on."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM
from modeling_deepseek_r1.norms import DropPath

from .helpers import close, gradients, library_twin, padded, random_ids, tiny_config, tiny_model


def step(model, ids, **kwargs):
    """One training step from zero -> loss, gradients, load counts."""
    model.train().zero_grad()
    model.discard_expert_counts()
    loss = model(ids, labels=ids, **kwargs).loss
    loss.backward()
    counts = {layer: router.load_counts.clone() for layer, router in model.routers.items()}
    return loss.detach(), {k: v.clone() for k, v in gradients(model).items()}, counts


def assert_same_step(actual, expected, **tolerances):
    (loss, grads, counts), (expected_loss, expected_grads, expected_counts) = actual, expected
    close(loss, expected_loss, **tolerances)
    assert grads.keys() == expected_grads.keys()
    for name, gradient in expected_grads.items():
        close(grads[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerances)
    assert counts.keys() == expected_counts.keys()
    for layer, count in expected_counts.items():
        assert torch.equal(counts[layer], count), f"layer {layer}: {counts[layer]} for {count}"


# --- inputs and outputs --------------------------------------------------------------------------------------------


def test_inputs_embeds_equal_input_ids():
    model, ids = tiny_model(), random_ids()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_recorded_outputs_equal_the_librarys():
    """Shapes and values, without those of the MTP layers, in evaluation and in a training step with labels."""
    model, ids = tiny_model(num_nextn_predict_layers=1), random_ids()
    twin = library_twin(model)
    flags = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    for train, arguments in ((False, flags), (True, flags | {"labels": ids})):
        ours, theirs = model.train(train)(ids, **arguments), twin.train(train)(ids, **arguments)
        expected_shapes = {
            "hidden_states": [(2, 11, 32)] * 4, "attentions": [(2, 4, 11, 11)] * 3, "router_logits": [(22, 8)] * 2
        }  # fmt: skip
        for name, shapes in expected_shapes.items():
            assert [tuple(x.shape) for x in getattr(ours, name)] == shapes
            close(getattr(ours, name), getattr(theirs, name))
    model.config.output_router_logits = True
    close(model.eval()(ids).router_logits, theirs.router_logits)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep(keep):
    model, ids = tiny_model(), random_ids()
    expected = model(ids).logits[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
    close(model(ids, logits_to_keep=keep).logits, expected)


def test_tuple_output():
    model, ids = tiny_model(), random_ids()
    loss, logits = model(ids, labels=ids, return_dict=False, use_cache=False)[:2]
    close(logits, model(ids).logits)
    close(loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_causality(implementation):
    """Changing a token changes nothing before it, and something at every position after it."""
    model, ids = tiny_model(implementation=implementation), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 97
    different = (model(ids).logits - model(changed).logits).abs().amax(-1)[0] > 1e-5  # rounding is below that
    assert not different[:6].any() and different[6:].all()


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_invariance(side, implementation, experts):
    model = tiny_model(implementation=implementation, experts=experts)
    ids, mask, _ = padded(random_ids(3, 12), side, (0, 5, 2))
    logits = model(ids, attention_mask=mask).logits
    other_pads = torch.where(mask == 0, 50, ids)  # what stands under the padding does not matter
    close(logits[mask.bool()], model(other_pads, attention_mask=mask).logits[mask.bool()])
    for row, real, expected in zip(ids, mask.bool(), logits, strict=True):
        close(model(row[real][None]).logits[0], expected[real])


@pytest.mark.slow  # compiles
def test_flex_attention_equals_eager():
    model = tiny_model()
    ids, mask, _ = padded(random_ids(2, 16), "left")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    close(logits[mask.bool()], expected)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    """Loss, gradients and load counts, with dropout and DropPath drawing the same numbers in the recomputation."""
    model, ids = tiny_model(num_nextn_predict_layers=1, hidden_dropout=0.1, drop_path_rate=0.3), random_ids(4, 11)
    torch.manual_seed(3)
    expected = step(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    forwards = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    torch.manual_seed(3)
    assert_same_step(step(model, ids), expected)
    assert len(forwards) == 2  # it did recompute
    assert sum(int(c.sum()) for c in expected[2].values()) == 3 * (
        2 * 4 * 11 + 4 * 10
    )  # top-3; the MTP layer skips one


def test_accumulation_with_num_items_in_batch_equals_the_big_batch():
    model = tiny_model(num_nextn_predict_layers=2)
    ids, mask, labels = padded(random_ids(4, 12), "right", (0, 7, 2, 9))
    items = (labels[:, 1:] != -100).sum()
    model.train().balance_loss_scale = 0.0
    whole = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items)
    whole.loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    close(whole.loss, model(ids, attention_mask=mask, labels=labels).loss)  # the default divides by the same number
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        model(ids[part], attention_mask=mask[part], labels=labels[part], num_items_in_batch=items).loss.backward()
    for name, gradient in gradients(model).items():
        close(gradient, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step_equals_eager(backend):
    """One whole graph, with MTP, balance losses and load counting."""
    torch._dynamo.reset()
    sizes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}  # one layer of each kind
    model, ids = tiny_model(**sizes, implementation="sdpa", seq_aux_loss_alpha=0.01), random_ids(4, 16)
    expected = step(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):  # the second run uses what was compiled
        model.zero_grad()
        model.discard_expert_counts()
        loss = compiled(ids, labels=ids).loss
        loss.backward()
        counts = {layer: router.load_counts.clone() for layer, router in model.routers.items()}
        assert_same_step((loss.detach(), gradients(model), counts), expected)


@pytest.mark.slow
def test_compiled_forward_equals_eager():
    torch._dynamo.reset()
    model, ids = tiny_model(num_hidden_layers=2, implementation="sdpa"), random_ids()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True)(ids).logits, model(ids).logits)


def test_every_regulariser_off_is_the_identity():
    """Rates of 0: training and evaluation agree exactly."""
    model, ids = tiny_model(), random_ids()
    evaluated = model(ids).logits
    assert torch.equal(model.train()(ids).logits, evaluated)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout", "drop_path_rate"])
def test_regularisers_act_in_training_only(field, implementation):
    model, ids = tiny_model(implementation=implementation, **{field: 0.5}), random_ids()
    plain = tiny_model(implementation=implementation)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_drop_path_grows_with_depth_and_keeps_the_expectation():
    model = tiny_model(num_hidden_layers=5, drop_path_rate=0.4, num_nextn_predict_layers=1)
    rates = [layer.branch[1].rate for layer in model.model.layers]
    close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.4]))
    branch = torch.ones(20_000, 2, 3)
    dropped = DropPath(0.4).train()(branch)
    kept = dropped[:, 0, 0] != 0
    assert torch.equal(dropped, (kept / 0.6).float()[:, None, None].expand_as(branch))  # whole sequences
    assert abs(dropped.mean() - 1) < 5 * (0.4 / 0.6 / 20_000) ** 0.5  # five standard errors
    assert DropPath(0.0).train()(branch) is branch and DropPath(0.4).eval()(branch) is branch


# --- loading, resizing, placing ------------------------------------------------------------------------------------


def test_device_map_auto(tmp_path):
    model, ids = tiny_model(num_nextn_predict_layers=1), random_ids()
    model.save_pretrained(tmp_path)
    loaded = DeepSeekR1ForCausalLM.from_pretrained(tmp_path, device_map="auto", attn_implementation="eager").to("cpu")
    close(loaded(ids).logits, model(ids).logits)
    close(loaded.train()(ids, labels=ids).loss, model.train()(ids, labels=ids).loss)


def test_offloaded_weights_are_fetched_for_the_loss_too():
    """With offloading, a weight is there only while its module's own forward runs."""
    from accelerate import cpu_offload

    model, ids = tiny_model(num_nextn_predict_layers=1), random_ids()
    with torch.no_grad():
        expected = model(ids, labels=ids)
        cpu_offload(model, torch.device("cpu"))
        assert model.lm_head.weight.is_meta
        output = model(ids, labels=ids)
    close(output.logits, expected.logits)
    close(output.loss, expected.loss)


def test_a_copy_is_independent_and_equal():
    model, ids = tiny_model(num_nextn_predict_layers=1), random_ids()
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    assert torch.equal(twin(ids).logits, expected) and not torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [120, 80])
def test_resizing_embeddings(size, tied, tmp_path):
    model, ids = tiny_model(num_nextn_predict_layers=1, tie_word_embeddings=tied), random_ids() % 80
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size and model.lm_head.out_features == size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    kept = min(size, 97)
    close(model(ids).logits[..., :kept], before[..., :kept])
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    model.eval().save_pretrained(tmp_path)
    loaded = DeepSeekR1ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    close(loaded(ids).logits, model(ids).logits)
    close(loaded.train()(ids, labels=ids).loss, loss)
    if size > 97:
        new = torch.full_like(ids, size - 1)
        assert loaded(new, labels=new).loss.isfinite()


def test_parallel_plans_name_what_exists():
    """Every pattern of every plan matches a module or parameter, and every layer's matrices are matched by TP."""
    modules = {}
    for changes in ({}, {"q_lora_rank": None}):  # together they have every projection
        model = tiny_model(**changes)
        modules |= dict(model.named_modules()) | dict(model.named_parameters())
    config = model.config

    def matches(pattern):
        expression = re.escape(pattern).replace(r"\*", r"\d+")
        return [name for name in modules if re.fullmatch(expression, name)]

    for plan in (config.base_model_tp_plan, config.base_model_pp_plan, config.base_model_ep_plan):
        for pattern in plan:
            assert matches(f"model.{pattern}"), pattern
    for plan in (model._tp_plan, model._pp_plan, model._fsdp_plan):
        for pattern in plan:
            assert matches(pattern) or matches(f"model.{pattern}"), pattern
    planned = {name for pattern in config.base_model_tp_plan for name in matches(f"model.{pattern}")}
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear) and ".layers." in name}
    replicated = {name for name in linears if name.endswith("q_a_proj")}  # its output is normalised whole
    assert linears - planned == replicated
    classes = {type(module).__name__ for module in tiny_model(num_nextn_predict_layers=1).modules()}
    assert classes.issuperset(model._no_split_modules)


def test_experts_and_attention_dispatch_as_asked():
    """The library greps a file for its interfaces; ours lie in other files. A silent fall-back to eager is slow."""
    model = DeepSeekR1ForCausalLM(tiny_config())
    assert model.config._experts_implementation == "grouped_mm" and model.config._attn_implementation == "sdpa"
    with pytest.raises((KeyError, ValueError)):
        model.set_attn_implementation("no_such_attention")


def test_frozen_backbone_trains_the_head_alone():
    model, ids = tiny_model(num_nextn_predict_layers=1).train(), random_ids()
    model.model.requires_grad_(False)
    output = model(ids, labels=ids)
    output.loss.backward()
    expected = F.cross_entropy(
        model.lm_head(model.model(ids).last_hidden_state)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    close(model.lm_head.weight.grad, torch.autograd.grad(expected, model.lm_head.weight)[0])
    assert output.mtp_loss is None and not any(router.load_counts.any() for router in model.routers.values())
