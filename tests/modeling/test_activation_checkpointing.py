"""What the backward pass computes again: the same step with less memory, in which no router chooses twice.

With the fused kernels: test_activation_checkpointing_fused.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM
from modeling_deepseek_r1.fused import set_fused_kernels
from recipes.pretrain_trainer import PretrainTrainer
from recipes.run_settings import checkpointing_mode
from tests.recipes.tiny_run import losses, tiny_config, tiny_trainer

from .helpers import close, gradients, random_ids, tiny_model

MODES = {
    "selective": {"mode": "selective"},
    "full": {"mode": "full"},
    "full, reentrant": {"mode": "full", "activation_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.fixture(autouse=True)
def restored():
    before = set_fused_kernels(None)
    yield
    set_fused_kernels(before)


def step(model, ids, between=lambda: None, **inputs):
    """-> loss, gradients by name, load counts. `between`: called after the forward pass, before the backward."""
    model.train().zero_grad()
    model.discard_expert_counts()
    torch.manual_seed(3)  # of dropout
    loss = model(ids, labels=ids, **inputs).loss
    between()
    loss.backward()
    return loss.detach(), gradients(model), {i: router.load_counts.clone() for i, router in model.routers.items()}


def assert_same_step(actual, expected):
    """Gradients may be summed in another order; the tolerance is that of `close`."""
    close(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        close(actual[1][name], gradient, msg=name)
    assert all(torch.equal(actual[2][layer], counts) for layer, counts in expected[2].items())


def calls_of(modules):
    """A list that grows by one with every call of one of them."""
    calls = []
    for module in modules:
        module.register_forward_pre_hook(lambda *_: calls.append(1))  # a recomputation stops where it can
    return calls


# ---- the same step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cpu_functions", [True, False])
def test_the_step_is_the_same(mode, cpu_functions):
    """Losses, gradients, load: with multi-token prediction, the balance loss, dropout, padding."""
    set_fused_kernels(None if cpu_functions else False)
    model = tiny_model(num_nextn_predict_layers=1, seq_aux_loss_alpha=0.1, hidden_dropout=0.1)
    ids, mask = random_ids(), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    expected = step(model, ids, attention_mask=mask)
    model.set_activation_checkpointing(**MODES[mode])
    assert_same_step(step(model, ids, attention_mask=mask), expected)
    # top-3 of 18 real tokens in two layers; the MTP layer leaves out each row's last token
    assert sum(int(counts.sum()) for counts in expected[2].values()) == 3 * (2 * 18 + 16)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_selective_calls_experts_and_mlps_twice_and_the_rest_once(experts):
    set_fused_kernels(False)
    model, ids = tiny_model(experts=experts), random_ids()
    expected = step(model, ids)
    layers, moe = model.model.layers, [layer.mlp for layer in model.model.layers[1:]]
    once = calls_of([m for layer in layers for m in (layer, layer.self_attn, layer.mlp)] + [m.gate for m in moe])
    twice = calls_of([m.experts for m in moe] + [m.shared_experts.down_proj for m in moe] + [layers[0].mlp.down_proj])
    model.set_activation_checkpointing("selective")
    assert_same_step(step(model, ids), expected)
    assert len(once) == 3 * 3 + 2 and len(twice) == 2 * (2 + 2 + 1)
    step(model, ids, output_router_logits=True)
    with torch.no_grad():
        model(ids)
    model.eval()(ids, labels=ids).loss.backward()  # gradients, but no training
    assert len(twice) == 2 * 2 * 5 + 2 * 5


@pytest.mark.parametrize("mode", MODES)
def test_no_router_chooses_twice(mode):
    """A routing bias that moves between the passes: every token still goes where it went, and is counted there."""
    model, ids = tiny_model(num_nextn_predict_layers=1, seq_aux_loss_alpha=0.1), random_ids()
    biases = [router.e_score_correction_bias for router in model.routers.values()]
    chosen = [bias.clone() for bias in biases]

    def move():
        for bias in biases:
            bias.copy_(-3.0 - bias.flip(0))

    expected = step(model, ids, between=move)
    moved = step(model, ids)
    assert not torch.equal(moved[2][1], expected[2][1])  # the bias does decide
    for bias, value in zip(biases, chosen):
        bias.copy_(value)
    model.set_activation_checkpointing(**MODES[mode])
    assert_same_step(step(model, ids, between=move), expected)
    assert_same_step(step(model, ids), moved)  # a new forward pass chooses anew


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_no_router_chooses_twice_under_fsdp(one_process_group):
    """FSDP2's hooks take the layers' arguments apart and put them together again: lists come out as other lists."""
    model, ids = tiny_model(num_nextn_predict_layers=1), random_ids()
    model.set_activation_checkpointing("full")
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    biases = [router.e_score_correction_bias for router in model.routers.values()]
    experts = {}  # {router: what it said in each pass}
    for layer, router in model.routers.items():
        select = router.select
        router.select = lambda scores, layer=layer, select=select: experts.setdefault(layer, []).append(
            select(scores)) or experts[layer][-1]  # fmt: skip
    counted = step(model, ids, between=lambda: [bias.copy_(-3.0 - bias.flip(0)) for bias in biases])[2]
    for layer, choices in experts.items():
        first, again = (torch.bincount(choice.flatten(), minlength=len(counted[layer])) for choice in choices)
        assert not torch.equal(first, again)  # alone it would choose others
        if layer < model.config.num_hidden_layers:  # an MTP layer leaves out each row's last token
            assert torch.equal(counted[layer], first)


def test_hooked_routers_are_not_replayed():
    """What a hook made of the choices, here other numbers for the experts, is nothing that the router could take."""
    model, ids = tiny_model(), random_ids()
    for router in model.routers.values():
        router.register_forward_hook(lambda module, given, output: (*output[:2], 7 - output[2]))
    expected = step(model, ids)
    model.set_activation_checkpointing("full")
    assert_same_step(step(model, ids), expected)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_compiled_step_is_the_same(mode):
    torch._dynamo.reset()
    model, ids = tiny_model(implementation="sdpa", seq_aux_loss_alpha=0.1), random_ids()
    expected = step(model, ids)
    model.set_activation_checkpointing(mode)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    model.discard_expert_counts()
    loss = compiled(ids, labels=ids).loss
    loss.backward()
    counts = {layer: router.load_counts.clone() for layer, router in model.routers.items()}
    assert_same_step((loss.detach(), gradients(model), counts), expected)


# ---- memory ----------------------------------------------------------------------------------------------------------


def kept_bytes(model, ids):
    """Bytes that a forward pass keeps for the backward, of storages that are not the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state.sum()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("cpu_functions", [True, False])
def test_memory(cpu_functions):
    """Without experts, the loss and the head: floats a token and layer, beside a count by hand."""
    set_fused_kernels(None if cpu_functions else False)
    sizes = dict(hidden_size=64, moe_intermediate_size=48, num_hidden_layers=4, first_k_dense_replace=0,
                 num_experts_per_tok=4, implementation="sdpa")  # fmt: skip
    model, ids = tiny_model(**sizes).model, random_ids(4, 32)
    kept = {}
    for mode in ("none", "selective", "full"):
        model.set_activation_checkpointing(mode)
        kept[mode] = kept_bytes(model, ids) / (4 * 32 * 4 * 4)  # floats a token and layer
    expert_part = 2 * 48 * (4 + 1)  # gate and up of the chosen experts and of the shared one
    assert kept["none"] - kept["selective"] > expert_part, kept
    assert kept["selective"] < 0.6 * kept["none"] and kept["full"] < 0.2 * kept["selective"], kept
    assert kept["full"] < 64 + 40, kept  # the layer's input, and a share of the final norm and the rotation


# ---- settings --------------------------------------------------------------------------------------------------------


def mode_of(model):
    recompute = {module.recompute for module in model.modules() if hasattr(module, "recompute")}
    checkpoints = {layer.gradient_checkpointing for layer in model.model.layers}
    assert len(recompute) == len(checkpoints) == 1
    return {(False, False): "none", (True, False): "selective", (False, True): "full"}[*recompute, *checkpoints]


def test_modes_follow_one_another():
    model = tiny_model()
    assert mode_of(model) == "none"
    for mode in ("selective", "full", "selective", "none", "full", "none"):
        model.set_activation_checkpointing(mode)
        assert mode_of(model) == mode
    model.activation_checkpointing_enable({"mode": "selective", "use_reentrant": True})
    assert mode_of(model) == "selective"
    model.gradient_checkpointing_enable({"use_reentrant": False})  # what TRL's trainers call
    assert mode_of(model) == "full"
    model.set_activation_checkpointing("selective")
    model.activation_checkpointing_disable()
    assert mode_of(model) == "none"
    model.activation_checkpointing_enable(every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True]


@pytest.mark.parametrize("arguments, message", [
    ({"mode": "some"}, "mode='some' must be one of none, selective, full"),
    ({"mode": "selective", "offload": True}, "offload=True are for the mode 'full'"),
    ({"mode": "selective", "every_n_layers": 2}, "every_n_layers=2"),
    ({"mode": "none", "activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
])  # fmt: skip
def test_errors_name_the_way_out(arguments, message):
    model = tiny_model()
    model.set_activation_checkpointing("selective")
    with pytest.raises(ValueError, match=message):
        model.set_activation_checkpointing(**arguments)
    assert mode_of(model) == "selective"


def test_a_saved_model_forgets_the_mode(tmp_path):
    model = tiny_model()
    model.set_activation_checkpointing("selective")
    model.save_pretrained(tmp_path)
    assert "checkpointing" not in (tmp_path / "config.json").read_text()
    assert mode_of(DeepSeekR1ForCausalLM.from_pretrained(tmp_path)) == "none"


@pytest.mark.parametrize("given, expected", [
    ("none", False), (False, False), ("selective", "selective"), ("full", True), (True, True), ("True", True),
])  # fmt: skip
def test_setting(given, expected, tmp_path):
    args = tiny_config(tmp_path, activation_checkpointing=given)
    assert args.activation_checkpointing == expected and args.gradient_checkpointing == expected
    again = type(args)(**{name: getattr(args, name) for name in ("activation_checkpointing",
                       "activation_checkpointing_kwargs", "model_config", "output_dir")}, use_cpu=True)  # fmt: skip
    assert again.activation_checkpointing == expected
    other = tiny_config(tmp_path, activation_checkpointing="full",
                        activation_checkpointing_kwargs=args.activation_checkpointing_kwargs)  # fmt: skip
    assert other.activation_checkpointing is True and not other.activation_checkpointing_kwargs


def test_setting_errors(tmp_path):
    with pytest.raises(ValueError, match="activation_checkpointing='some' must be none, selective or full"):
        checkpointing_mode("some")
    options = {"every_n_layers": 2}
    with pytest.raises(ValueError, match="'every_n_layers': 2.* have no effect with .*selective"):
        tiny_config(tmp_path, activation_checkpointing="selective", activation_checkpointing_kwargs=options)
    with pytest.raises(ValueError, match="SimpleNamespace knows only the library's"):
        PretrainTrainer(SimpleNamespace(), tiny_config(tmp_path, activation_checkpointing="selective"))


def test_runs_of_the_trainer_are_the_same(tmp_path):
    runs = {}
    for mode, setting in (("none", {}), ("selective", {"activation_checkpointing": "selective"}),
                          ("full", {"gradient_checkpointing": True})):  # fmt: skip
        trainer = tiny_trainer(tmp_path / mode, max_steps=2, save_strategy="no", eval_strategy="no", **setting)
        trainer.train()
        assert mode_of(trainer.model) == mode
        runs[mode] = losses(tmp_path / mode)
    assert len(runs["none"]) == 2
    for mode in ("selective", "full"):
        assert runs[mode] == pytest.approx(runs["none"], rel=1e-5)
