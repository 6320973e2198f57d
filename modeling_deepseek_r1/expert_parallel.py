"""Expert parallelism: each of W processes holds E / W experts of every layer, and tokens travel to them and back.

Every process has a batch of its own. A token's row goes once to each process that holds any of its experts (not once
per expert), with its gate values; there the experts run as if nothing were split, their weighted sum goes back, and the
sums of all processes are added up. No token is dropped and no capacity is set: loads may be as uneven as they come.
While rows and gate values are on their way the shared experts run, and their backward while the gradients are.
How many rows come is known only by the sender, so that each layer waits once for the device, for 4 W numbers. Where two
processes share the experts and have equally many tokens (`equal_rows`), every token goes to both, and nobody waits:
of 6 choices among 64 experts, 98 % of the tokens have one on either side, so hardly more travels. What is allocated for
rows by expert is then enough for any routing, twice the mean; what no pair needs is not computed.

Source: GShard (arXiv:2006.16668), Sec. 3.2, without its capacity; a row once per destination: DeepSeek-V3
(arXiv:2412.19437), Sec. 3.2.2.

Gradients. A process' experts receive those of all W losses, summed; other parameters those of their own process' loss.
The loss of a step is the mean of the processes' losses, as under DDP: gradients are multiplied by 1 / W on their way
to the experts and by W on their way on, the others' are averaged by DDP, FSDP or `reduce_dense_gradients`. Then all
equal one process' gradients on the joined batch, if each loss is a mean over equally many tokens or, as in trainers, a
sum over the joined number / W.

What transformers 5.23 has: `DistributedConfig(fsdp_size=W, ep_size=W)`, an all-to-all too, with equal gradients on
different batches (measured on two processes). It serves where all weights are sharded by FSDP2 and are loaded by
`from_pretrained`. It sends a row per (token, choice) pair, in the dtype of the hidden states, and nothing overlaps.
Here the dense parameters may lie as one likes (whole, under DDP, or FSDP2 with the experts as `ignored_params`), a
model just built or loaded can be split, rows travel in the dtype of the matmuls, and the kernels of training run.

What a recipe calls:
    group, replicas = expert_groups(expert_ranks)       # once a process; default: all ranks hold different experts
    parallelise_experts(model, group, replicas)         # after building or loading, before DDP and the optimizer
    loss.backward()                                     # under DDP; or by hand then reduce_dense_gradients(model)
    reduce_expert_gradients(model)                      # only needed with replicas
    clip_gradient_norm(model, max_norm)                 # not torch's: that one sees a process' own experts
    optimizer.step(); model.update_expert_bias()        # counts are summed over all processes, as ever
    state = gather_full_state_dict(model)               # all ranks; then on rank 0:
    model.save_pretrained(folder, state_dict=state, is_main_process=rank == 0)
All processes must run the same layers equally often, in evaluation and generation too: a forward is collective.
"""

import copy
import functools
import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from .experts import DeepSeekR1Experts, compute_dtype
from .fused import runs_fused
from .linear_weights import is_intercepted
from .moe import DeepSeekR1MoE
from .recomputation import computed_again
from .training_experts import KERNELS, sort_pairs

KINDS = ("gate_up_proj", "down_proj")  # the parameters of a layer's experts

# ---- the exchange --------------------------------------------------------------------------------------------------


@dataclass
class Route:
    """Where the rows of one layer's tokens go. Shapes (T tokens, W processes): back (T, W) int32, the place of token
    t's row for process w among the S rows sent, S or more if there is none; order (S,) int32 the entries t * W + w by
    place; ends (W,) int32 ends of the processes' runs. `sent`, `received`: rows to and from each process; `pairs`:
    (token, choice) pairs of this process' experts among those received.

    `scale`: factor on the experts' gradients, a power of two, so that undoing it is exact.
    `pending`: the exchanges under way, each with the tensor that is being read until it ends; `gradients`: of what was
    sent, on their way back, from `_Arrive` to `_Dispatch`.
    """

    group: object
    order: torch.Tensor
    back: torch.Tensor
    ends: torch.Tensor
    sent: list
    received: list
    pairs: int | None = None
    scale: float = 1.0
    pending: list = field(default_factory=list)
    gradients: tuple = ()

    def start(self, rows, reverse=False):
        """Begins to send `rows`, to the processes or (reverse) back -> what will have come after `finish`."""
        come, go = (self.sent, self.received) if reverse else (self.received, self.sent)
        rows = rows.contiguous()
        result = rows.new_empty(sum(come), *rows.shape[1:])
        work = dist.all_to_all_single(result, rows, come, go, group=self.group, async_op=True)
        self.pending.append((work, rows))
        return result

    def finish(self):
        while self.pending:
            self.pending.pop(0)[0].wait()

    def exchange(self, rows, reverse=False):
        result = self.start(rows, reverse)
        self.finish()
        return result


@torch.no_grad()
def plan_route(owners, group):
    """owners (T, K), the process in `group` that holds each choice -> Route. Waits for the device and the others."""
    size = dist.get_world_size(group)
    ranks = torch.arange(size, device=owners.device)
    chosen = owners.unsqueeze(-1) == ranks
    order, back, ends = sort_pairs(torch.where(chosen.any(1), ranks, size), size)
    sent = torch.stack((ends.diff(prepend=ends.new_zeros(1)), chosen.sum((0, 1), dtype=torch.int32)), -1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    (sent, _), (received, pairs) = torch.stack((sent, received)).transpose(1, 2).tolist()
    return Route(group, order[: sum(sent)], back.view(-1, size), ends, sent, received, sum(pairs))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # else the first call's mode would stay: autograd saves no inference tensors
def _everywhere(tokens, size, device):
    """order, back and ends of a route on which every token goes to every process."""
    back = torch.arange(size * tokens, dtype=torch.int32, device=device).view(size, tokens)
    entries = torch.arange(size * tokens, dtype=torch.int32, device=device).view(tokens, size)
    return entries.t().flatten(), back.t().contiguous(), back[:, -1] + 1


def plan_route_everywhere(owners, group, experts):
    """As `plan_route` where each process has as many tokens as this one, of whose choices at most `experts`, those that
    it has, are its own. Waits for nobody."""
    (tokens, choices), size = owners.shape, dist.get_world_size(group)
    order, back, ends = _everywhere(tokens, size, owners.device)
    rows = [tokens] * size
    return Route(group, order, back, ends, rows, rows, size * tokens * min(choices, experts))


def _take_rows(source, route, dtype):
    """source (T, D) -> the rows to send (S, D)."""
    size = route.back.shape[1]
    if runs_fused(source):
        return KERNELS.gather_rows(source.contiguous(), route.back.flatten(), route.ends, route.order.numel(), dtype)
    return source.index_select(0, route.order // size).to(dtype)


def _add_rows(rows, route, dtype, residual=None, shared=None):
    """rows (S, D) -> for each token the sum of its rows, in fp32 and in the processes' order, plus residual and shared
    (T, D) -> (T, D)."""
    parts = [part for part in (residual, shared) if part is not None]
    if runs_fused(rows, *parts):
        residual, shared = (part if part is None else part.contiguous() for part in (residual, shared))
        flat = route.back.flatten()
        return KERNELS.sum_choices(rows, flat, route.ends, route.back.shape[1], dtype, residual, shared)
    rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))  # the last for processes that a token did not go to
    places = route.back.clamp(max=rows.shape[0] - 1)
    total = rows.index_select(0, places[:, 0]).float()
    for column in places.unbind(1)[1:]:
        total = total + rows.index_select(0, column).float()
    for part in parts:
        total = total + part.float()
    return total.to(dtype)


def _scaled(tensor, factor):
    return tensor if factor == 1.0 else tensor * factor


class _Dispatch(torch.autograd.Function):
    """Starts to send hidden (T, D), weights and index (T, K) -> rows (R, D), weights (R, K) float32 and index (R, K)
    int32, not to be read before `_Arrive`. Its backward waits for the gradients, which come by way of `route`: their
    number of rows is another than that of what they are gradients of, and autograd would refuse them."""

    @staticmethod
    def forward(ctx, hidden, weights, index, owners, route, dtype):
        ctx.route, ctx.dtypes = route, (hidden.dtype, weights.dtype)
        ctx.save_for_backward(owners)
        rows = route.start(_take_rows(hidden, route, dtype))
        choices = torch.cat((index.int(), weights.float().view(torch.int32)), -1)  # in one exchange: they are small
        choices = route.start(choices.index_select(0, route.order // route.back.shape[1]))
        index, weights = choices.chunk(2, -1)
        ctx.mark_non_differentiable(index)
        return rows, weights.view(torch.float32), index

    @staticmethod
    @once_differentiable
    def backward(ctx, *_):
        route, (owners,) = ctx.route, ctx.saved_tensors
        route.finish()
        (grad_rows, grad_weights), route.gradients = route.gradients, ()
        hidden_dtype, weights_dtype = ctx.dtypes
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_hidden = _scaled(_add_rows(grad_rows, route, hidden_dtype), 1.0 / route.scale)
        # A gate value acts only where its expert is: one row of gradients holds it, nothing is summed.
        places = route.back.gather(1, owners).long()
        choice = torch.arange(owners.shape[1], device=owners.device)
        grad_weights = _scaled(grad_weights[places, choice].to(weights_dtype), 1.0 / route.scale)
        return grad_hidden, grad_weights, None, None, None, None


class _Arrive(torch.autograd.Function):
    """Waits for what `_Dispatch` sent; its backward starts to send the gradients back. What lies between the two in the
    forward, the shared experts, overlaps with the exchange in both directions: autograd runs the latest node first."""

    @staticmethod
    def forward(ctx, rows, weights, route):
        ctx.route = route
        route.finish()
        return rows.view_as(rows), weights.clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_weights):
        ctx.route.gradients = tuple(ctx.route.start(grad, reverse=True) for grad in (grad_rows, grad_weights))
        return grad_rows, grad_weights, None


class _Resume(torch.autograd.Function):
    """Identity on rows whose backward asks for a saved tensor: under activation checkpointing this is where a layer is
    computed again. Without it a process to which no rows came may ask for its first saved tensor later than the others,
    and its exchanges of the second computation would meet those of the others' gradients."""

    @staticmethod
    def forward(ctx, rows, ends):
        ctx.save_for_backward(ends)
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        assert ctx.saved_tensors
        return grad, None


class _Combine(torch.autograd.Function):
    """rows (R, D), the sums of this process' experts -> residual + shared + the tokens' sums over processes (T, D)."""

    @staticmethod
    def forward(ctx, rows, route, dtype, residual, shared):
        ctx.route, ctx.dtype = route, rows.dtype
        ctx.added_dtypes = [None if part is None else part.dtype for part in (residual, shared)]
        return _add_rows(route.exchange(rows, reverse=True), route, dtype, residual, shared)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        narrow = grad.to(ctx.dtype)
        added = [(narrow if dtype == ctx.dtype else grad.to(dtype)) if wanted else None
                 for wanted, dtype in zip(ctx.needs_input_grad[3:], ctx.added_dtypes)]  # fmt: skip
        rows = _take_rows(_scaled(narrow, ctx.route.scale), ctx.route, ctx.dtype)
        return ctx.route.exchange(rows), None, None, *added


# ---- the modules ---------------------------------------------------------------------------------------------------


class ExpertParallelExperts(DeepSeekR1Experts):
    """`DeepSeekR1Experts` of which this process holds `num_experts` of `global_num_experts`, from `first_expert` on.

    Shapes as there, `top_k_index` with the numbers of all experts. Which implementation runs on the rows that have come
    is the config's `_experts_implementation`, as on one process.
    """

    def dispatch(self, hidden_states, top_k_index, top_k_weights):
        """Starts the exchange -> what `combine` needs."""
        dtype = compute_dtype(hidden_states)
        owners = top_k_index.long() // self.num_experts
        if self.equal_rows and self.training and owners.shape[0]:
            route = plan_route_everywhere(owners, self.expert_parallel_group, self.num_experts)
        else:
            route = plan_route(owners, self.expert_parallel_group)
        route.scale = self.gradient_scale
        return route, *_Dispatch.apply(hidden_states, top_k_weights, top_k_index, owners, route, dtype)

    def combine(self, flight, dtype, residual=None, shared=None, recompute=False):
        """What `dispatch` began -> residual + shared + the experts' sums (T, D) in `dtype`."""
        route, rows, weights, index = flight
        rows, weights = _Arrive.apply(rows, weights, route)
        index = index.long() - self.first_expert
        index = torch.where((index < 0) | (index >= self.num_experts), self.num_experts, index)
        output = self._with_gradients(self._own_sums(rows, index, weights, route.pairs, recompute), rows, weights)
        output = _Resume.apply(output, route.ends)
        return _Combine.apply(output, route, dtype, residual, shared)

    def _own_sums(self, rows, index, weights, pairs, recompute):
        if self.runs_fused(rows):
            return self.fused(rows, index, weights, recompute=recompute, pairs=pairs)
        if recompute:
            return computed_again(self, super().forward, rows, index, weights)
        return super().forward(rows, index, weights)

    def _with_gradients(self, output, rows, weights):
        """An implementation to which no rows came may return zeros without a graph; the others would wait for ever for
        this process' part in the backward, and the parameters would miss the zero gradients of unused experts."""
        inputs = (rows, weights, self.gate_up_proj, self.down_proj)
        if output.requires_grad or not torch.is_grad_enabled() or not any(part.requires_grad for part in inputs):
            return output
        return output + sum(part[:0].sum() for part in inputs).to(output.dtype)

    def __deepcopy__(self, memo):
        """A copy that is split alike: process groups are not copied, and parameters lose what they were marked with."""
        memo[id(self.expert_parallel_group)] = self.expert_parallel_group
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for kind in KINDS:
            own = getattr(self, kind)
            _marked(getattr(twin, kind), own.expert_parallel_group, own.expert_replica_group, own.global_shape,
                    own.expert_gradient_scale)  # fmt: skip
        return twin

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.combine(self.dispatch(hidden_states, top_k_index, top_k_weights), hidden_states.dtype)


class ExpertParallelMoE(DeepSeekR1MoE):
    """`DeepSeekR1MoE` over `ExpertParallelExperts`; the shared experts run while the tokens travel.

    With `recompute` each process computes its experts' part again from the rows that came: nothing travels twice.
    """

    def forward(
        self, hidden_states, token_mask=None, segment_ids=None, routes=None, kept_routes=None, residual=None
    ):
        _, weights, indices = self.gate(hidden_states, token_mask, segment_ids, routes)
        if kept_routes == [] and not is_intercepted(self.gate):
            kept_routes.append(indices)
        tokens = hidden_states.flatten(0, -2)
        flight = self.experts.dispatch(tokens, indices, weights)
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        dtype, added = tokens.dtype, [None if part is None else part.flatten(0, -2) for part in (residual, shared)]
        for part in added:
            dtype = dtype if part is None else torch.promote_types(dtype, part.dtype)
        recompute = self.recompute and self.training
        return self.experts.combine(flight, dtype, *added, recompute=recompute).view(hidden_states.shape)


# ---- splitting a model ---------------------------------------------------------------------------------------------


def expert_groups(expert_ranks=None, timeout=None):
    """The groups of this process: `group`, `expert_ranks` consecutive ranks (None: all) that together hold all experts,
    and `replicas`, the ranks with the same experts as this one, None if there are no others. Called by all ranks.

    Both are communicators of their own, so that the exchanges do not queue behind DDP's reductions. `timeout`: their
    timedelta; None: the backend's, whatever the group of all ranks has.
    Raises ValueError if the number of processes is no multiple of `expert_ranks`, or there is no process group.
    """
    world = _world_size()
    ranks = world if expert_ranks is None else expert_ranks
    if not isinstance(ranks, int) or ranks < 1 or world % ranks:
        raise ValueError(f"expert_ranks={expert_ranks} must divide the {world} processes; "
                         f"use one of {_divisors(world)}")  # fmt: skip
    groups = [list(range(first, first + ranks)) for first in range(0, world, ranks)]
    group = dist.new_subgroups_by_enumeration(groups, timeout)[0]
    if ranks == world:
        return group, None
    return group, dist.new_subgroups_by_enumeration([list(members) for members in zip(*groups)], timeout)[0]


def _world_size():
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("expert parallelism needs a process group: launch with torchrun or accelerate launch, or call "
                         "torch.distributed.init_process_group first")  # fmt: skip
    return dist.get_world_size()


def _divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@torch.no_grad()
def parallelise_experts(model, group=None, replicas=None, gradient_scale=None, equal_rows=False):
    """Leaves each process its share of every layer's experts, in place, and lets tokens travel; returns `model`.

    Every process gives the same whole model (the same seed or checkpoint), rank i of `group` keeps the i-th of W equal
    runs of experts. The parameters keep their names; each expert parameter has the attributes
    `expert_parallel_group`, `expert_replica_group` and `global_shape`, and DDP leaves them alone. Fast generation is
    turned off, as it reads whole experts.

    Args:
        group, replicas: as from `expert_groups`, which is called without arguments if group is None.
        gradient_scale: factor on the expert gradients; None: 1 / W, what a mean over processes needs (see above).
        equal_rows: promises that in training all processes pass equally many tokens in each forward, as with packed
            rows of one length. Then two processes exchange them without waiting for the device; more of them ignore
            it, as room for any routing would take W times the memory.
    Raises:
        ValueError: if there is no process group, W does not divide the experts, or the experts are not this package's
            own, whole and unwrapped: adapters, quantisation, other sharding, or split already.
    """
    _world_size()
    if group is None:
        group, replicas = expert_groups()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DeepSeekR1MoE)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with experts: first_k_dense_replace and moe_layer_freq "
                         "say which have; train it under DDP or FSDP instead")  # fmt: skip
    for name, layer in layers.items():
        _check_experts(name, layer, size)
    for layer in layers.values():
        _split_experts(layer, group, replicas, size, rank, 1.0 / size if gradient_scale is None else gradient_scale)
        layer.experts.equal_rows = equal_rows and size == 2
    for module in model.modules():  # whichever of them a trainer hands to DDP
        ignored = [name for name, parameter in module.named_parameters() if is_expert_parallel(parameter)]
        if ignored and (module is model or hasattr(module, "_ddp_params_and_buffers_to_ignore")):
            kept = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
            module._ddp_params_and_buffers_to_ignore = [*kept, *ignored]
    if hasattr(model, "decoding"):
        model.decoding.enabled = False
    model._is_fsdp_managed_module = True  # the library's mark: `generate` goes on until all processes are done
    return model


def _check_experts(name, layer, size):
    experts = layer.experts
    if type(layer) is not DeepSeekR1MoE or type(experts) is not DeepSeekR1Experts:
        raise ValueError(f"{name} is a {type(layer).__name__} with {type(experts).__name__}: split the experts of a "
                         "plain model, once, before adapters, quantisation or wrappers")  # fmt: skip
    for kind in KINDS:
        parameter = getattr(experts, kind)
        if type(parameter.data) is not torch.Tensor or parameter.shape[0] != experts.num_experts:
            raise ValueError(f"{name}.experts.{kind} is a {type(parameter.data).__name__} of shape "
                             f"{tuple(parameter.shape)}: it is sharded already; split the experts first")  # fmt: skip
    if experts.num_experts % size:
        allowed = [ranks for ranks in _divisors(experts.num_experts) if dist.get_world_size() % ranks == 0]
        raise ValueError(f"n_routed_experts={experts.num_experts} of {name} must be a multiple of the {size} "
                         f"processes that share them; use expert_groups with one of {allowed}")  # fmt: skip


def _split_experts(layer, group, replicas, size, rank, scale):
    experts = layer.experts
    local, exact = experts.num_experts // size, abs(math.frexp(scale)[0]) == 0.5  # a power of two
    experts.gradient_scale = scale if exact else 1.0
    for kind in KINDS:
        whole = getattr(experts, kind)
        part = nn.Parameter(whole.data[rank * local : (rank + 1) * local].clone(), requires_grad=whole.requires_grad)
        setattr(experts, kind, _marked(part, group, replicas, whole.shape, 1.0 if exact else scale))
    experts.global_num_experts, experts.first_expert, experts.num_experts = experts.num_experts, rank * local, local
    experts.expert_parallel_group = group
    experts._is_expert_parallel = size > 1  # the library's mark: indices may be another process' experts
    experts.__class__, layer.__class__ = ExpertParallelExperts, ExpertParallelMoE


def _marked(part, group, replicas, shape, scale):
    """`part` with what tells it from a whole parameter, and its gradient times `scale`, in a pass of its own."""
    part.expert_parallel_group, part.expert_replica_group, part.global_shape = group, replicas, shape
    part.expert_gradient_scale = scale
    if part.requires_grad and scale != 1.0:
        part.register_hook(lambda grad: grad * scale)
    return part


def is_expert_parallel(parameter):
    """Whether `parallelise_experts` made this parameter: each process' is its own."""
    return hasattr(parameter, "expert_parallel_group")
