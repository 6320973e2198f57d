"""Optimizers that clip inside their update, Muon for the matrices, and the part of a trainer that uses them.

`Trainer` clips by multiplying every gradient in place, a read and a write of all of them, before AdamW reads them
again. Here the clip factor stays a number on the device that the update multiplies with (recipes/kernels_adamw.py).
States are laid out as torch.optim.AdamW's, so a checkpoint of either can be resumed with the other.
"""

import logging
from dataclasses import dataclass

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, muon

from modeling_deepseek_r1.expert_parallel_state import global_gradient_norm
from recipes.kernels_adamw import adamw_, adamw_lists_, coefficients, has_kernel
from recipes.optimizer_copies import WeightCopies
from recipes.run_settings import setting

logger = logging.getLogger(__name__)

OPTIMIZERS = ("auto", "torch", "fused", "muon")
ADJUSTMENTS = ("original", "match_rms_adamw")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's, torch's default
OWN_STATE = ("stochastic_rounding", "seed", "clip_factor", "options")  # beside torch's, of both optimizers
MUON_ELEMENTS = 1 << 26  # of expert matrices orthogonalised at a time


def gradient_norm(parameters):
    """2-norm of all gradients as one vector, () float32 (also of bf16 gradients, whose own norm has 8 bits)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    alike, norms = {}, [None] * len(gradients)
    for place, gradient in enumerate(gradients):
        alike.setdefault((gradient.device, gradient.dtype), []).append(place)
    for places in alike.values():
        found = torch._foreach_norm([gradients[place] for place in places], 2, dtype=torch.float32)
        for place, norm in zip(places, found):  # in the order of the parameters: their dtypes do not change the sum
            norms[place] = norm.to(gradients[0].device)
    return torch.linalg.vector_norm(torch.stack(norms))


def local_part(tensor):
    """What of a tensor lies in this process, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step multiplies gradients with a clip factor itself; amsgrad and tensor rates left out.

    `clip_gradients` before `step` measures the norm and leaves the factor for that step. `step` never waits for the
    device. With `stochastic_rounding`, bf16 weights are rounded at random, reproducibly from `seed` and the step.
    Of sharded parameters (DTensors) each process updates its part; their states are sharded alike.

    `compute_copies` is for fp32 weights that a deepseek_r1 model multiplies with in bf16, in one process: a step also
    writes the bf16 copies for the next forward pass, and gradients may be bf16, whose norm torch's own clipping would
    round (modeling_deepseek_r1/compute_copies.py). "gradients": without the copies, which take 2 bytes a weight.

    Raises:
        ValueError: for a rate that is a tensor, for copies of sharded parameters.
        RuntimeError: by `step`, some time after weights with copies were changed through `.data` (optimizer_copies.py).
    """

    copies = None

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, stochastic_rounding=False, seed=0,
        compute_copies=False,
    ):  # fmt: skip
        if isinstance(lr, torch.Tensor):
            raise ValueError("lr is a tensor; pass a float, or take torch.optim.AdamW (optimizer=torch)")
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)  # read where torch's AdamW loads our state
        # A GradScaler then unscales before the step, as for any optimizer, and does not hand us its scale.
        self._step_supports_amp_scaling = False
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        self.clip_factor = None
        if compute_copies:
            weights = [p for group in self.param_groups if not group.get("muon") for p in group["params"]]
            if any(isinstance(p, DTensor) for p in weights):
                raise ValueError("compute_copies=True needs whole parameters, these are sharded; leave it False")
            self.copies = WeightCopies(weights, resident=compute_copies != "gradients")

    @torch.no_grad()
    def clip_gradients(self, parameters, max_norm, norm=None):
        """The norm before clipping, () float32; the next `step` multiplies by min(1, max_norm / (norm + 1e-6)).

        `norm`: of all gradients, where those of `parameters` are not all.
        """
        norm = gradient_norm(parameters) if norm is None else norm
        self.clip_factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.copies:
            self.copies.begin()
        clip, self.clip_factor = self.clip_factor, None
        first = 0  # number of the group's first parameter: part of the seed of its rounding
        for group in self.param_groups:
            self._update_group(group, clip, first)
            first += len(group["params"])
        if self.copies:
            self.copies.finish()
        return loss

    def _update_group(self, group, clip, first):
        lists, numbers = {}, {}
        for number, weight in enumerate(group["params"], first):
            if weight.grad is None:
                continue
            state = self._adamw_state(weight)
            state["step"] += 1
            step = int(state["step"])  # on the CPU
            if step not in numbers:
                numbers[step] = coefficients(group["lr"], *group["betas"], group["eps"], group["weight_decay"], step)
            here = None if clip is None else clip.to(weight.device)
            tensors = [local_part(t) for t in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])]
            seed = self._seed(step, number) if self.stochastic_rounding else None
            copy = self.copies.take(weight) if self.copies else None
            if has_kernel(tensors[0]):
                watch = None if copy is None else (self.copies.flag(weight.device), step)
                adamw_(*tensors, here, seed, copy, watch, **numbers[step])
            else:
                lists.setdefault((step, weight.device), []).append((*tensors, seed, copy))
        for (step, device), entries in lists.items():
            *tensors, seeds, copies = (list(column) for column in zip(*entries))
            here = None if clip is None else clip.to(device)
            adamw_lists_(*tensors, here, seeds if self.stochastic_rounding else None, copies, **numbers[step])

    def _adamw_state(self, weight):
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)  # on the CPU: bias corrections need it there
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state

    def _seed(self, step, number):
        """Another 31 bits for each (seed, step, parameter); the kernel hashes them with the place."""
        return (self.seed * 0x9E3779B1 + step * 0x85EBCA77 + number * 0xC2B2AE3D) & 0x7FFFFFFF

    def __getstate__(self):
        """For copies and pickles, from which torch leaves out what it does not know."""
        own = {name: value for name, value in vars(self).items() if name in OWN_STATE}
        return super().__getstate__() | own

    def load_state_dict(self, state_dict):
        for name in ("amsgrad", "maximize"):
            if any(group.get(name) for group in state_dict["param_groups"]):
                raise ValueError(f"the checkpoint's AdamW has {name}=True, which optimizer=fused leaves out; use torch")
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["lr"] = float(group["lr"])  # a tensor where torch's AdamW was made with one
        for state in self.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu()


class MuonAdamW(FusedAdamW):
    """Muon for groups with `muon=True`, AdamW for the others; see `muon_groups`.

    Muon moves a matrix along the orthogonal factor of its momentum, found by five Newton-Schulz steps in bf16. 2-D
    weights go through torch.optim's function. A 3-D tensor of experts (E, n * A, B) is E * n matrices, n being the
    group's `stacked`, which are orthogonalised each for itself in batched products.
    Source: Jordan et al., kellerjordan.github.io/posts/muon; `match_rms_adamw` scales the rate by
    0.2 sqrt(max(A, B)), so that AdamW's rate and decay serve: Liu et al. (arXiv:2502.16982), Eq. 4.
    """

    def __init__(
        self, params, lr=1e-3, *, momentum=0.95, ns_steps=5, adjust_lr_fn="match_rms_adamw", **adamw
    ):
        if adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"muon_adjust_lr={adjust_lr_fn!r} must be one of {', '.join(ADJUSTMENTS)}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"muon_momentum={momentum} must lie in [0, 1), e.g. 0.95")
        super().__init__(params, lr, **adamw)
        self.options = {"momentum": momentum, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        for group in self.param_groups:
            wrong = [tuple(p.shape) for p in group["params"] if group.get("muon") and p.ndim not in (2, 3)]
            if wrong:
                raise ValueError(f"muon=True holds a parameter of shape {wrong[0]}; give 2-D or (experts, A, B)")
            if group.get("muon") and any(isinstance(p, DTensor) for p in group["params"]):
                raise ValueError("optimizer=muon needs whole matrices, these are sharded; use optimizer=auto")

    def _update_group(self, group, clip, first):
        if not group.get("muon"):
            return super()._update_group(group, clip, first)
        weights = [weight for weight in group["params"] if weight.grad is not None]
        matrices, experts = ([w for w in weights if w.ndim == ndim] for ndim in (2, 3))
        scaled = lambda weight: weight.grad if clip is None else weight.grad * clip.to(weight.device)
        common = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": 1e-7}
        common |= {"ns_coefficients": NEWTON_SCHULZ, **self.options}
        for weight in matrices:  # one by one: a clipped gradient lives no longer than its update
            muon([weight], [scaled(weight)], [self._momentum(weight)], nesterov=True, has_complex=False, **common)
        for weight in experts:
            muon_experts_(weight, scaled(weight), self._momentum(weight), group.get("stacked", 1), **common)

    def _momentum(self, weight):
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["step"] = torch.tensor(0.0)  # AdamW's loading looks for it
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        state["step"] += 1
        return state["momentum_buffer"]

    def load_state_dict(self, state_dict):
        kinds = [[bool(group.get("muon")) for group in groups]
                 for groups in (self.param_groups, state_dict["param_groups"])]  # fmt: skip
        if kinds[0] != kinds[1]:
            raise ValueError("the checkpoint's optimizer is not Muon with these groups; resume with its own optimizer")
        super().load_state_dict(state_dict)


def muon_experts_(
    weight, gradient, momentum_buffer, stacked, *, lr, weight_decay, momentum, ns_coefficients, eps, ns_steps,
    adjust_lr_fn,
):  # fmt: skip
    """torch.optim's Muon step (with Nesterov's momentum) on each of the E * stacked matrices of (E, stacked * A, B)."""
    (_, rows, width), shape = weight.shape, (weight.shape[1] // stacked, weight.shape[2])
    adjusted = _adjust_lr(lr, adjust_lr_fn, torch.Size(shape))
    each = max(1, MUON_ELEMENTS // (rows * width))
    for w, g, buffer in zip(weight.split(each), gradient.split(each), momentum_buffer.split(each)):
        buffer.lerp_(g, 1.0 - momentum)
        update = orthogonalise(g.lerp(buffer, momentum).reshape(-1, *shape), ns_steps, ns_coefficients, eps)
        w.mul_(1.0 - lr * weight_decay).add_(update.reshape(w.shape), alpha=-adjusted)


def orthogonalise(matrices, steps=5, coefficients=NEWTON_SCHULZ, eps=1e-7):
    """(N, A, B) -> (N, A, B) bf16 with the singular vectors of each matrix and singular values near 1.

    x <- a x + (b x x^T + c (x x^T)^2) x from x / |x|, so that no singular value starts above 1.
    """
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def decay_groups(model, decay_names, weight_decay):
    """Trainable parameters in two groups, with `weight_decay` and with none."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name in decay_names], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decay_names], "weight_decay": 0.0},
    ]


def muon_kinds(model):
    """{name of a trainable parameter: "matrix", "experts", "gate and up" (of experts, in one tensor) or "adamw"}.

    Muon's are the matrices of linear layers (of adapters too) and of experts; AdamW's embeddings, heads, norms, router.
    """
    ends = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    ends += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    apart = {id(module.weight) for module in ends if getattr(module, "weight", None) is not None}

    def kind(name, p):
        if p.ndim == 3 and "experts" in name:
            return "gate and up" if name.endswith("gate_up_proj") else "experts"
        matrix = p.ndim == 2 and min(p.shape) > 1  # a head for one value is a vector
        return "matrix" if matrix and id(p) not in apart and not name.endswith(".gate.weight") else "adamw"

    return {name: kind(name, p) for name, p in model.named_parameters() if p.requires_grad}


def muon_groups(model, decay_names, weight_decay, learning_rate):
    """Groups of Muon's matrices by `muon_kinds`, then `decay_groups` of what AdamW trains."""
    kinds, named = muon_kinds(model), dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in kinds if kinds[name] == wanted], "weight_decay": weight_decay,
         "lr": learning_rate, "muon": True, "stacked": 2 if wanted == "gate and up" else 1}
        for wanted in ("matrix", "experts", "gate and up")
    ]  # fmt: skip
    of_adamw = {id(named[name]) for name in kinds if kinds[name] == "adamw"}
    rest = [{**group, "params": [p for p in group["params"] if id(p) in of_adamw]}
            for group in decay_groups(model, decay_names, weight_decay)]  # fmt: skip
    return [group for group in groups + rest if group["params"]]


@dataclass
class OptimizerSettings:
    """Fields for a stage's config, in front of TrainingArguments."""

    optimizer: str = setting(
        "auto",
        "torch: what optim names. fused: AdamW that clips inside its update. auto: fused on GPUs, also under DDP and "
        "FSDP2, where optim is torch's AdamW, else torch. muon: Muon for matrices, AdamW else.",
    )
    muon_learning_rate: float | None = setting(None, "Rate of Muon's matrices. Default: learning_rate.")
    muon_momentum: float = setting(0.95, "Momentum of Muon (torch.optim.Muon's default).")
    muon_adjust_lr: str = setting(
        "match_rms_adamw", "How Muon's rate grows with a matrix: match_rms_adamw (AdamW's rates serve) or original."
    )
    stochastic_rounding: bool = setting(
        False, "Round the bf16 weights that our AdamW trains stochastically after each step (optimizer=fused or muon)."
    )
    compute_copies: bool = setting(
        True,
        "fp32 weights with bf16 compute in one process: our AdamW writes the next step's bf16 copies of the weights it "
        "trains and reads gradients in bf16 where they are. The same numbers, fewer casts.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
        if self.muon_adjust_lr not in ADJUSTMENTS:
            raise ValueError(f"muon_adjust_lr={self.muon_adjust_lr!r} must be one of {', '.join(ADJUSTMENTS)}")
        if self.optimizer in ("fused", "muon") and not names_torch_adamw(self):
            raise ValueError(f"optim={self.optim} is read with optimizer=torch only; leave one of the two out")
        if self.stochastic_rounding and self.optimizer in ("auto", "torch"):
            raise ValueError("stochastic_rounding=true needs optimizer=fused or muon")


def names_torch_adamw(args):
    """Whether `optim` is left at one of torch's AdamWs."""
    return str(getattr(args.optim, "value", args.optim)) in ("adamw_torch", "adamw_torch_fused")


def make_optimizer(args, kind, model, decay_names, compute_copies=False):
    """FusedAdamW ("fused") or MuonAdamW ("muon") with what `args` (`OptimizerSettings` and TrainingArguments) say."""
    options = {
        "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon,
        "stochastic_rounding": args.stochastic_rounding, "seed": args.seed, "compute_copies": compute_copies,
    }  # fmt: skip
    if kind == "fused":
        return FusedAdamW(decay_groups(model, decay_names, args.weight_decay), **options)
    rate = args.learning_rate if args.muon_learning_rate is None else args.muon_learning_rate
    groups = muon_groups(model, decay_names, args.weight_decay, rate)
    return MuonAdamW(groups, momentum=args.muon_momentum, adjust_lr_fn=args.muon_adjust_lr, **options)


class OptimizerMixin:
    """Put before `transformers.Trainer`: `args.optimizer` chooses, and our optimizers clip inside their step.

    The reported norm is the one that Trainer would report.
    """

    def create_optimizer(self, model=None):
        self.reshard_model()
        kind = getattr(self.args, "optimizer", "torch")
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled and not self._sharded_here
        if kind == "auto":
            kind = "torch" if sharded or not self._fused_adamw_serves(model) else "fused"
        if kind == "torch" or self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        if sharded:
            raise ValueError(f"optimizer={kind} does not know how this model is sharded; use optimizer=torch")
        model = self.model if model is None else model
        names, copies = self.get_decay_parameter_names(model), self._compute_copies()
        self.optimizer = make_optimizer(self.args, kind, model, names, copies)
        return self.optimizer

    def _compute_copies(self):
        """What FusedAdamW shall do beside the update; nothing where DDP puts gradients into buckets of its own."""
        args = self.args
        alone = self.accelerator.distributed_type == DistributedType.NO and args.n_gpu <= 1
        if not (args.compute_copies and args.bf16 and alone):
            return False
        # Full checkpointing saves memory: a layer's copies are made when it is its turn, as ever.
        return "gradients" if args.activation_checkpointing is True else True

    def _fused_adamw_serves(self, model):
        """Whether AdamW is asked for, no gradient scaler stands between, and the kernel takes most of the weights, or
        some are sharded and some are not, which torch's AdamW would have to part: other groups than on one process."""
        if not names_torch_adamw(self.args) or self.args.fp16:
            return False
        weights = [p for p in (self.model if model is None else model).parameters() if p.requires_grad]
        whole = not any(isinstance(p, DTensor) for p in weights)
        covered = sum(p.numel() for p in weights if has_kernel(p)) > 0.9 * sum(p.numel() for p in weights)
        return whole and covered or self._sharded_here

    def _clipping_optimizer(self):
        """Our optimizer inside accelerate's wrapper, or None."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, FusedAdamW) else None

    def _clip_grad_norm(self, model):
        optimizer = self._clipping_optimizer()
        if optimizer is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        norm = global_gradient_norm(model) if self.gradients_are_split else None
        return optimizer.clip_gradients(model.parameters(), self.args.max_grad_norm, norm)

    def _get_grad_norm(self, model, grad_norm=None):
        whole = self._clipping_optimizer() is not None and not self.gradients_are_split
        if grad_norm is None and whole:  # max_grad_norm=0: measured, not clipped
            self.accelerator.unscale_gradients()
            return gradient_norm(model.parameters())
        return super()._get_grad_norm(model, grad_norm)
