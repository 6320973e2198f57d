"""Experts split over processes against one process with the joined batch; one start of processes runs all checks."""

import copy
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from modeling_deepseek_r1 import DeepSeekR1ForCausalLM, expert_parallel
from modeling_deepseek_r1.checkpoint_files import weight_files
from modeling_deepseek_r1.expert_parallel import (
    Route,
    expert_groups,
    is_expert_parallel,
    parallelise_experts,
    plan_route,
)
from modeling_deepseek_r1.expert_parallel_state import (
    clip_gradient_norm,
    dense_parameters,
    expert_parameters,
    gather_full_state_dict,
    global_gradient_norm,
    load_full_state_dict,
    reduce_dense_gradients,
    reduce_expert_gradients,
)
from modeling_deepseek_r1.fused import set_fused_kernels
from modeling_deepseek_r1.moe import DeepSeekR1MoE
from tests.modeling.helpers import VOCAB, close, tiny_config, tiny_model
from tests.recipes.processes import run_ranks

ROWS, LENGTH = 2, 6  # a process


def whole_model(**changes):
    torch.manual_seed(1)
    return tiny_model(**{"num_hidden_layers": 2, "seq_aux_loss_alpha": 0.01, **changes}).train()


def batches(seed=2):
    """The joined batch and this process' part."""
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(seed)
    joined = torch.randint(3, VOCAB, (ROWS * dist.get_world_size(), LENGTH), generator=generator)
    return joined, joined[rank * ROWS : (rank + 1) * ROWS]


def own_part(parameter, whole):
    """What of the whole tensor is this process'."""
    if not is_expert_parallel(parameter):
        return whole
    rank, local = dist.get_rank(parameter.expert_parallel_group), parameter.shape[0]
    return whole[rank * local : (rank + 1) * local]


def assert_same(model, whole, value=lambda parameter: parameter.grad, **tolerances):
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        try:
            close(value(parameter), own_part(parameter, value(expected[name])), **tolerances)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def step(model, ids, split=True):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if not split:
        return loss.detach()
    reduce_dense_gradients(model)
    reduce_expert_gradients(model)
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def equal_over_steps(expert_ranks=None, equal_rows=False, **changes):
    """Loss, every gradient, the norm, and after 3 clipped AdamW steps parameters, counts and biases."""
    whole = whole_model(**changes)
    model = parallelise_experts(copy.deepcopy(whole), *expert_groups(expert_ranks), equal_rows=equal_rows)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1) for part in (model, whole)]
    for number in range(3):
        joined, mine = batches(number)
        close(step(model, mine), step(whole, joined, split=False))
        assert_same(model, whole)
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
        close(global_gradient_norm(model), norm)
        close(clip_gradient_norm(model, 0.5), norm)
        assert_same(model, whole)
        for part, optimizer in zip((model, whole), optimizers):
            optimizer.step()
            optimizer.zero_grad()
        load = model.update_expert_bias()
        for index, router in whole.routers.items():  # its own update would sum over the processes
            assert torch.equal(load[index], router.load_counts) and load[index].sum() == joined.numel() * router.top_k
            error = router.load_counts.float().mean() - router.load_counts
            router.e_score_correction_bias.add_(error.sign() * whole.config.bias_update_speed)
            router.load_counts.zero_()
            assert torch.equal(model.routers[index].e_score_correction_bias, router.e_score_correction_bias)
    # An Adam step divides by the gradient's size, which magnifies rounding where that is small; hence eps above.
    assert_same(model, whole, lambda parameter: parameter.data)
    return model


def check_grouped(folder):
    equal_over_steps()


def check_equal_rows(folder):
    """Every token to both processes: the same numbers without asking how many rows come; in evaluation it asks."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "plan_route", lambda *args: asked.append(args) or plan_route(*args))
        model = equal_over_steps(equal_rows=True, experts="grouped_mm")
        equal_over_steps(equal_rows=True, experts="eager")
        for spread in ("first", "one", "random"):
            uneven_layer("grouped_mm", [5, 5], spread, equal_rows=True)
        assert not asked
        model.eval()(input_ids=batches()[1])
        assert asked


def check_gradient_scale(folder):
    """A power of two is a factor on the way to the experts and taken back after them, another one that of a hook."""
    found = []
    for scale in (0.25, 0.3):
        model = parallelise_experts(whole_model(), gradient_scale=scale)
        mine = batches()[1]
        model(input_ids=mine, labels=mine).loss.backward()
        found.append({name: p.grad / (scale if is_expert_parallel(p) else 1.0) for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        close(gradient, found[1][name])


def check_eager_without_fused_functions(folder):
    before = set_fused_kernels(False)
    equal_over_steps(experts="eager")
    equal_over_steps(n_shared_experts=0)
    set_fused_kernels(before)


def check_checkpointing(folder):
    whole = whole_model()
    for reentrant in (False, True):
        model = parallelise_experts(copy.deepcopy(whole), equal_rows=reentrant).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        joined, mine = batches()
        whole.zero_grad()
        close(step(model, mine), step(whole, joined, split=False))
        assert_same(model, whole)
    whole.zero_grad()
    model = parallelise_experts(copy.deepcopy(whole), equal_rows=True)
    model.set_activation_checkpointing("selective")
    close(step(model, mine), step(whole, joined, split=False))
    assert_same(model, whole)


def check_ddp(folder):
    """Two micro-batches, the first without synchronisation; DDP averages what is not an expert's."""
    whole = whole_model()
    model = parallelise_experts(copy.deepcopy(whole))
    wrapped = DistributedDataParallel(model)
    joined, mine = batches()
    other, mine_too = batches(3)
    with wrapped.no_sync():
        wrapped(input_ids=mine, labels=mine).loss.backward()
    wrapped(input_ids=mine_too, labels=mine_too).loss.backward()
    for ids in (joined, other):
        whole(input_ids=ids, labels=ids).loss.backward()
    assert_same(model, whole)


def check_fsdp(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = whole_model()
    model = parallelise_experts(copy.deepcopy(whole))
    mesh, experts = init_device_mesh("cpu", (dist.get_world_size(),)), set(expert_parameters(model))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=experts)
    fully_shard(model, mesh=mesh, ignored_params=experts)
    joined, mine = batches()
    model(input_ids=mine, labels=mine).loss.backward()
    whole(input_ids=joined, labels=joined).loss.backward()
    assert_same(model, whole, lambda p: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    close(clip_gradient_norm(model, 0.5), norm)
    assert_same(model, whole, lambda p: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
    state = gather_full_state_dict(model)
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items() if dist.get_rank() == 0)


def uneven_layer(experts, tokens, spread, dtype=torch.float32, equal_rows=False):
    """A layer's output and gradients, split and whole, for `tokens[rank]` tokens with choices as `spread` says."""
    config = tiny_config(n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1)
    config._experts_implementation = experts
    torch.manual_seed(5)
    whole = DeepSeekR1MoE(config)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole = whole.to(dtype)
    split = parallelise_experts(copy.deepcopy(torch.nn.ModuleList([whole])), equal_rows=equal_rows)[0]
    rank, total = dist.get_rank(), sum(tokens)
    states = torch.randn(total, config.hidden_size)
    weights = torch.rand(total, 2)
    scores = torch.rand(total, 8)
    first = scores[:, :2].topk(2).indices
    index = {"random": scores.topk(2).indices, "first": first, "last": 6 + first,
             "one": torch.tensor([3, 5]).expand(total, 2)}[spread]  # fmt: skip
    begin = sum(tokens[:rank])
    mine = slice(begin, begin + tokens[rank])
    inputs = [states.to(dtype).requires_grad_(), weights.requires_grad_()]
    target = torch.randn(total, config.hidden_size)
    expected = whole.experts(inputs[0], index, inputs[1])
    ((expected * target).sum() + sum(part[:0].sum() for part in inputs)).backward()  # eager, no tokens: no graph
    parts = [part[mine].detach().clone().requires_grad_() for part in inputs]
    output = split.experts(parts[0], index[mine], parts[1])
    (output * target[mine]).sum().mul(len(tokens)).backward()  # sums, so that 1 / W is undone
    tolerance = {"atol": 3e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    close(output, expected[mine], **tolerance)
    for part, full in zip(parts, inputs):
        close(part.grad / len(tokens), full.grad[mine], **tolerance)
    for name in ("gate_up_proj", "down_proj"):
        full, part = getattr(whole.experts, name), getattr(split.experts, name)
        grad = torch.zeros_like(full) if full.grad is None else full.grad
        close(part.grad, own_part(part, grad), **tolerance)


def check_uneven_loads(folder):
    world = dist.get_world_size()
    for experts in ("grouped_mm", "eager"):
        for spread in ("first", "last", "one", "random"):
            uneven_layer(experts, [5] * world, spread)
        uneven_layer(experts, [0] + [7] * (world - 1), "random")
        uneven_layer(experts, [3] + [0] * (world - 1), "first")
        uneven_layer(experts, [0] * world, "random")


def check_bfloat16(folder):
    """bf16 sums of 2 to 4 terms of size 1 to 10 and their gradients: a rounding of 2**-8 each."""
    uneven_layer("grouped_mm", [9] * dist.get_world_size(), "random", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        whole = whole_model()
        model = parallelise_experts(copy.deepcopy(whole))
        joined, mine = batches()
        close(step(model, mine), step(whole, joined, split=False), atol=0.05, rtol=0.01)


def check_a_token_goes_once_to_a_process(folder):
    owners = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0]])
    route = plan_route(owners, dist.group.WORLD)
    assert route.sent[:2] == [2, 2] and sum(route.sent) == 4
    assert route.received == [2 if dist.get_rank() < 2 else 0] * dist.get_world_size()
    assert (route.order // route.back.shape[1]).tolist() == [0, 2, 0, 1]


def check_frozen_parts(folder):
    """Only experts, or all but experts, are trained: the others get no gradient, and nobody waits for ever."""
    for train_experts in (True, False):
        whole = whole_model()
        for name, parameter in whole.named_parameters():
            parameter.requires_grad_(("experts.gate_up" in name or "experts.down_proj" in name) is train_experts)
        whole.model.embed_tokens.weight.requires_grad_(not train_experts)
        model = parallelise_experts(copy.deepcopy(whole), equal_rows=train_experts)
        joined, mine = batches()
        step(model, mine), step(whole, joined, split=False)
        for parameter, (name, other) in zip(model.parameters(), whole.named_parameters()):
            assert (parameter.grad is None) == (other.grad is None), name
            if other.grad is not None:
                close(parameter.grad, own_part(parameter, other.grad))


def check_evaluation_and_generation(folder):
    whole = whole_model().eval()
    model = parallelise_experts(copy.deepcopy(whole))
    joined, mine = batches()
    rows = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    with torch.no_grad():
        close(model(input_ids=mine).logits, whole(input_ids=joined).logits[rows])
    expected = whole.generate(joined, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(mine, max_new_tokens=4, min_new_tokens=4, do_sample=False), expected[rows])
    longer = 2 + 3 * dist.get_rank()  # each waits for the last
    ids = model.generate(mine, max_new_tokens=longer, min_new_tokens=longer, do_sample=False)
    assert torch.equal(ids[:, : LENGTH + 2], expected[rows][:, : LENGTH + 2]) and ids.shape[1] == LENGTH + longer


def check_copies(folder):
    """A copy is split alike: its experts are each process' own, and their gradients are scaled once."""
    whole = whole_model()
    model = copy.deepcopy(parallelise_experts(copy.deepcopy(whole)))
    assert len(expert_parameters(model)) == 2
    joined, mine = batches()
    close(step(model, mine), step(whole, joined, split=False))
    assert_same(model, whole)


def check_checkpoints(folder):
    """Gathered and saved by rank 0, loaded by one process and split again, from both layouts."""
    whole = whole_model(num_nextn_predict_layers=1)
    model = parallelise_experts(copy.deepcopy(whole))
    state = gather_full_state_dict(model)
    if dist.get_rank() == 0:
        assert set(state) == set(whole.state_dict())
        assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
        model.save_pretrained(f"{folder}/split", state_dict=state)
        whole.save_pretrained(f"{folder}/whole")
        assert set(weight_files(f"{folder}/split")) == set(weight_files(f"{folder}/whole"))
    else:
        assert state == {}
    dist.barrier()
    again = DeepSeekR1ForCausalLM.from_pretrained(f"{folder}/split")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))
    on_disk = {}
    for name, value in whole.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, matrices in enumerate(value):
                for kind, matrix in zip(("gate", "up"), matrices.chunk(2)):
                    on_disk[f"{name.removesuffix('gate_up_proj')}{expert}.{kind}_proj.weight"] = matrix
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(value):
                on_disk[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = matrix
        else:
            on_disk[name] = value
    assert len(on_disk) > len(whole.state_dict())
    for layout in (whole.state_dict(), on_disk):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        load_full_state_dict(model, layout)
        assert_same(model, whole, lambda parameter: parameter.data, atol=0.0, rtol=0.0)
    with pytest.raises(ValueError, match="another number of experts than n_routed_experts=8"):
        load_full_state_dict(model, model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        load_full_state_dict(model, {})


def check_refusals(folder):
    world = dist.get_world_size()
    with pytest.raises(ValueError, match=rf"n_routed_experts={world * 2 + 1} of model.layers.1.mlp must be a multiple"):
        parallelise_experts(whole_model(n_routed_experts=world * 2 + 1, n_group=1, topk_group=1))
    with pytest.raises(ValueError, match=f"expert_ranks={world + 1} must divide the {world} processes"):
        expert_groups(world + 1)
    waits = lambda group: group._get_backend(torch.device("cpu")).options._timeout
    assert [waits(group) for group in expert_groups(1, timedelta(seconds=33))] == [timedelta(seconds=33)] * 2
    with pytest.raises(ValueError, match="no layer with experts"):
        parallelise_experts(whole_model(first_k_dense_replace=9))
    model = parallelise_experts(whole_model())
    with pytest.raises(ValueError, match="ExpertParallelMoE"):
        parallelise_experts(model)
    assert all(p.global_shape[0] == 8 and p.shape[0] == 8 // world for p in expert_parameters(model))
    assert len(expert_parameters(model)) == 2 and len(dense_parameters(model)) == len(list(model.parameters())) - 2


def check_one_layer_under_checkpoint(folder):
    """A checkpointed layer where no rows come to some processes: the recomputation still meets the others."""
    whole = whole_model(experts="eager")
    model = parallelise_experts(copy.deepcopy(whole))
    states = torch.randn(1, 4, 32, requires_grad=True)
    experts = model.model.layers[1].mlp.experts
    index = torch.tensor([[0, 1]]).expand(4, 2)
    run = lambda states: experts(states.flatten(0, 1), index, torch.ones(4, 2))
    gradients = []
    for output in (checkpoint(run, states, use_reentrant=False), run(states)):
        gradients.append(torch.autograd.grad(F.silu(output).sum(), (states, experts.down_proj)))
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def check_shared_experts_overlap(folder):
    """They run between the start of the exchange and the wait for it, backward too."""
    model = parallelise_experts(whole_model())
    shared, events, start, finish = model.model.layers[1].mlp.shared_experts, [], Route.start, Route.finish
    shared.register_forward_hook(lambda *_: events.append("shared"))
    shared.up_proj.weight.register_hook(lambda _: events.append("shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "start", lambda *args, **kwargs: events.append("start") or start(*args, **kwargs))
        patch.setattr(Route, "finish", lambda route: events.append("wait") or finish(route))
        loss = model(input_ids=batches()[1], labels=batches()[1]).loss
        assert events == ["start"] * 2 + ["shared", "wait", "start", "wait"]
        events.clear()
        loss.backward()
    assert events == ["start", "wait", "start", "start", "shared", "wait"]


def check_kernels(folder):
    """The fused kernels on the rows that came, in Triton's interpreter; nothing is computed for others' pairs."""
    from modeling_deepseek_r1 import experts as module

    seen, fused = [], module.fused_experts

    def spy(hidden, weights, order, back, *rest):
        seen.append((order.numel(), back.numel()))
        return fused(hidden, weights, order, back, *rest)

    before, module.fused_experts = set_fused_kernels(True), spy
    for spread in ("first", "random"):
        uneven_layer("grouped_mm", [9, 4, 6, 5][: dist.get_world_size()], spread, torch.bfloat16)
    split = seen[1::2]  # between them the whole layer's
    computed = torch.tensor([order for order, _ in split])
    dist.all_reduce(computed)
    assert len(split) == 2 and computed.tolist() == [2 * 13] * 2 and split[1][0] < split[1][1]
    uneven_layer("grouped_mm", [6, 6], "random", torch.bfloat16, equal_rows=True)
    assert seen[-1] == (24, 24)  # room for all choices of both
    set_fused_kernels(before)


def test_a_route_made_in_inference_serves_training():
    """It is kept for all layers and steps."""
    expert_parallel._everywhere.cache_clear()
    with torch.inference_mode():
        expert_parallel._everywhere(3, 2, torch.device("cpu"))
    assert not any(part.is_inference() for part in expert_parallel._everywhere(3, 2, torch.device("cpu")))


TWO = [
    check_a_token_goes_once_to_a_process, check_refusals, check_uneven_loads, check_grouped, check_equal_rows,
    check_gradient_scale, check_eager_without_fused_functions, check_checkpointing, check_one_layer_under_checkpoint,
    check_ddp, check_fsdp, check_shared_experts_overlap, check_bfloat16, check_frozen_parts,
    check_evaluation_and_generation, check_checkpoints, check_copies,
]  # fmt: skip


def check_replicas(folder):
    """Two pairs of processes, each pair with all experts."""
    model = equal_over_steps(expert_ranks=2)
    assert expert_parameters(model)[0].shape[0] == 4
    state = gather_full_state_dict(model)
    assert dist.get_rank() != 0 or state["model.layers.1.mlp.experts.down_proj"].shape[0] == 8


def work(rank, world, folder, checks):
    torch.set_num_threads(1)
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=wait)
    for check in checks:
        try:
            check(folder)
        except BaseException:
            raise AssertionError(f"{check.__name__} on rank {rank}:\n{traceback.format_exc()}") from None
        dist.barrier()
    dist.destroy_process_group()


def run_checks(world, folder, checks):
    run_ranks(world, lambda rank: work(rank, world, str(folder), checks), folder)


def test_two_processes_equal_one(tmp_path):
    run_checks(2, tmp_path, TWO)


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path):
    checks = [check_refusals, check_uneven_loads, check_grouped, check_checkpoints, check_replicas, check_ddp]
    run_checks(4, tmp_path, checks)


@pytest.mark.slow
def test_two_processes_with_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which is read where triton is imported: no forks
    mp.spawn(work, (2, str(tmp_path), [check_kernels]), nprocs=2)


def test_without_a_process_group_it_says_how_to_get_one():
    with pytest.raises(ValueError, match="torchrun or accelerate launch"):
        parallelise_experts(whole_model())
