"""Fewer bytes between data-parallel processes: hooks of DistributedDataParallel, counted and resumable.

`gradient_compression` names one of `COMPRESSIONS`; each is the state of a DDP communication hook and reduces a bucket
of gradients to their mean over the processes. Bytes are those that a process hands to the network in a ring:
2 (n - 1) / n of a buffer that is all-reduced, n - 1 times what it gives to an all-gather. So top_k with 5 % sends a
16th of fp32 on 2 processes, a quarter on 8, and more than fp32 on 64.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook


def run_hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP calls for each bucket."""
    return state.reduce(bucket)


class PlainReduction:
    """All-reduce of the gradients as they are, with its bytes counted; the base of the others.

    In the first `start` steps all of them reduce plainly: early gradients are the ones that matter most.
    """

    def __init__(self, start=0):
        self.start, self.iteration = start, 0
        self.bytes_sent, self.steps = 0, 0  # since the last reading
        self.group, self.device, self.names, self.parameter_bytes = None, None, {}, 0

    def attach(self, ddp):
        """Knows the model; DDP's own reduction does what `PlainReduction` would, so nothing is registered."""
        self.group, self.device = ddp.process_group, next(ddp.module.parameters()).device
        named = [(name, p) for name, p in ddp.module.named_parameters() if p.requires_grad]
        self.names = {id(p): name for name, p in named}
        self.parameter_bytes = sum(p.numel() * p.element_size() for _, p in named)

    def megabytes_per_step(self):
        """What a process sent in a step, the mean over those since the last reading; None without DDP."""
        return None if self.group is None else self._ring(self.parameter_bytes) / 1e6

    def _ring(self, size):
        """Bytes that a process sends for an all-reduce of `size` bytes."""
        world = self.group.size()
        return 2 * (world - 1) * size / world

    def _bucket_names(self, bucket):
        return [self.names[id(p)] for p in bucket.parameters()]

    def state_dict(self):
        return {"kind": type(self).__name__, "iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


class HookedReduction(PlainReduction):
    """The base of what replaces DDP's own reduction. `_compressed(bucket)` returns the future of the bucket's mean."""

    def attach(self, ddp):
        super().attach(ddp)
        ddp.register_comm_hook(self, run_hook)

    def reduce(self, bucket):
        future = self._plain(bucket) if self.iteration < self.start else self._compressed(bucket)
        if bucket.is_last():
            self.iteration, self.steps = self.iteration + 1, self.steps + 1
        return future

    def _plain(self, bucket):
        buffer = bucket.buffer()
        self.bytes_sent += self._ring(buffer.numel() * buffer.element_size())
        return default_hooks.allreduce_hook(self.group, bucket)

    def megabytes_per_step(self):
        if self.group is None:
            return None
        sent, self.bytes_sent, self.steps = self.bytes_sent / max(self.steps, 1) / 1e6, 0, 0
        return sent


class BF16Reduction(HookedReduction):
    """Summed in bf16: half of fp32's bytes, no state. bf16 gradients are sent as they are."""

    def _compressed(self, bucket):
        self.bytes_sent += self._ring(2 * bucket.buffer().numel())
        return default_hooks.bf16_compress_hook(self.group, bucket)


# ---------------------------------------------------------------- PowerSGD


class _MatrixBucket:
    """A bucket as torch's PowerSGD reads it: in fp32, and each expert's matrix for itself.

    torch flattens (experts, A, B) to (experts, A * B): a rank-r product would give all experts mixtures of the same r
    matrices, though their gradients come from different tokens. Here (experts, A, B) are that many (A, B).
    """

    def __init__(self, bucket):
        self.bucket, self.flat = bucket, bucket.buffer().float()
        parts = self.flat.split([p.numel() for p in bucket.parameters()])
        shaped = [part.view(p.shape) for part, p in zip(parts, bucket.parameters())]
        self.matrices = [m for tensor in shaped for m in (tensor.unbind(0) if tensor.ndim == 3 else [tensor])]

    def buffer(self):
        return self.flat

    def gradients(self):
        return self.matrices

    def index(self):
        return self.bucket.index()

    def is_last(self):
        return self.bucket.is_last()


class PowerSGDReduction(HookedReduction):
    """Gradients as products of rank `rank`, with error feedback: torch's powerSGD_hook, told of experts and resumable.

    Source: Vogels et al. (arXiv:1905.13727), Algs. 1 and 2. Sends rank (A + B) numbers for a matrix (A, B), so 1408 x
    1024 at rank 4 is 148 times less; vectors, and matrices that would not halve, go whole. Errors and both factors
    take about 4 bytes a parameter. torch's hook waits for the GPU once a bucket.
    The state belongs to a layout of the buckets. DDP lays them out anew after its first step; a step in which the
    layout is not the state's (the first after resuming) is reduced plainly.

    Raises:
        ValueError: unless rank >= 1 and start >= 2.
    """

    def __init__(self, rank=4, start=100, seed=0):
        super().__init__(start)
        if rank < 1:
            raise ValueError(f"powersgd_rank={rank} must be at least 1, e.g. 4")
        if start < 2:
            raise ValueError(
                f"gradient_compression_start={start} must be at least 2 with gradient_compression=powersgd: DDP lays "
                "out its buckets anew after the first step"
            )
        self.rank, self.seed, self.state, self.layout = rank, seed, None, {}

    def attach(self, ddp):
        if self.state is None:
            self.state = PowerSGDState(
                self.group, self.rank, start_powerSGD_iter=2, random_seed=self.seed, batch_tensors_with_same_shape=True,
                compression_stats_logging_frequency=1 << 60,
            )  # fmt: skip
            self.state.iter = 2  # `start` is ours: its own first plain steps are over
        super().attach(ddp)
        self.state.process_group = self.group

    def _compressed(self, bucket):
        names = self._bucket_names(bucket)
        if self.layout.setdefault(bucket.index(), names) != names:
            return self._plain(bucket)
        matrices, before = _MatrixBucket(bucket), self.state.total_numel_after_compression
        future = powerSGD_hook(self.state, matrices)
        self.bytes_sent += self._ring(4 * (self.state.total_numel_after_compression - before))
        buffer = bucket.buffer()
        if buffer.device.type == "cpu":
            future.wait()  # torch's callbacks wait on gloo's few threads: two buckets at a time can block each other
        return future.then(lambda done: buffer.copy_(done.value()))

    def state_dict(self):
        copied = lambda tensors: {index: tensor.detach().cpu().clone() for index, tensor in tensors.items()}
        words = self.state.rng.get_state()
        return super().state_dict() | {
            "layout": dict(self.layout), "errors": copied(self.state.error_dict),
            "p": copied(self.state.p_memory_dict), "q": copied(self.state.q_memory_dict),
            "rng": [words[0], torch.from_numpy(words[1].copy()), *words[2:]],
        }  # fmt: skip

    def load_state_dict(self, state):
        super().load_state_dict(state)
        moved = lambda name: {index: tensor.to(self.device, copy=True) for index, tensor in state[name].items()}
        self.layout, self.state.error_dict = dict(state["layout"]), moved("errors")
        self.state.p_memory_dict, self.state.q_memory_dict = moved("p"), moved("q")
        name, words, *rest = state["rng"]
        self.state.rng.set_state((name, words.numpy(), *rest))


# ---------------------------------------------------------------- the largest values


def quantise(values, block):
    """(N,) float32 -> codes (N,) int8 and scales (ceil(N / block),) float32: a value is code * scale / 127."""
    padded = F.pad(values, (0, -len(values) % block)).view(-1, block)
    scales = padded.abs().amax(1)
    steps = (scales / 127).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = (padded / steps).round().clamp(-127, 127).to(torch.int8)
    return codes.flatten()[: len(values)], scales


def dequantise(codes, scales, block):
    """The inverse of `quantise` up to half a step; what is not finite stays so."""
    steps = (scales / 127).unsqueeze(1)
    padded = F.pad(codes, (0, -len(codes) % block)).view(-1, block)
    return (padded * steps).flatten()[: len(codes)]


class TopKReduction(HookedReduction):
    """The largest share of each gradient tensor, in 8 bits, with error feedback.

    What is not sent (and what rounding took) is added to the next step's gradient. Source: Lin et al., Deep Gradient
    Compression (arXiv:1712.01887), Sec. 3, and Seide et al. (2014) for the feedback; no momentum correction.
    Each tensor of a bucket gives its own share, so that the choice does not depend on how DDP lays out buckets: a
    resumed run repeats an uninterrupted one to the bit. Tensors of up to `whole` elements (norms) are sent whole.
    All processes add up what all sent in the order of ranks: the same on each, and on each run.

    Per value sent: 4 bytes of index (int32), 1 of code, 4 / `block` of scale; with bits=32, 4 + 4. Errors take 4 bytes
    a parameter (float32).

    Raises:
        ValueError: unless 0 < fraction <= 1, bits is 8 or 32, block >= 1; for a tensor that int32 cannot index.
    """

    def __init__(self, fraction=0.05, bits=8, block=256, start=0, whole=1024):
        super().__init__(start)
        rules = (
            ("top_k_fraction", fraction, 0 < fraction <= 1, "in (0, 1], e.g. 0.05"),
            ("top_k_bits", bits, bits in (8, 32), "8 or 32 (not quantised)"),
            ("top_k_block", block, block >= 1, "at least 1, e.g. 256"),
        )
        for name, value, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name}={value} must be {allowed}")
        self.fraction, self.bits, self.block, self.whole = fraction, bits, block, whole
        self.residuals = {}  # parameter's name -> (elements,) float32

    def attach(self, ddp):
        for name, parameter in ddp.module.named_parameters():
            if parameter.numel() >= 2**31:
                raise ValueError(f"gradient_compression=top_k: {name} has {parameter.numel():,} elements, its indices "
                                 "need less than 2**31; use bf16 or none")  # fmt: skip
        super().attach(ddp)

    def _kept(self, numel):
        return numel if numel <= self.whole else math.ceil(self.fraction * numel)

    def _compressed(self, bucket):
        buffer, names = bucket.buffer(), self._bucket_names(bucket)
        sizes = [p.numel() for p in bucket.parameters()]
        pieces = []  # int32 words
        for name, gradient in zip(names, buffer.split(sizes)):
            pieces += self._encode(name, gradient)
        payload = torch.cat(pieces)
        world = self.group.size()
        self.bytes_sent += (world - 1) * 4 * payload.numel()
        received = [torch.empty_like(payload) for _ in range(world)]
        work = dist.all_gather(received, payload, group=self.group, async_op=True)

        def decode(_):
            del pieces[:]
            readers = [_Words(words) for words in received]
            for gradient, size in zip(buffer.split(sizes), sizes):
                total = torch.zeros(size, dtype=torch.float32, device=buffer.device)
                for reader in readers:
                    indices, values = self._read(reader, size)
                    values = values / world
                    total.add_(values) if indices is None else total.index_add_(0, indices, values)
                gradient.copy_(total)
            return buffer

        return work.get_future().then(decode)

    def _encode(self, name, gradient):
        """Words to send for one tensor; what they leave out becomes its residual."""
        residual = self.residuals.get(name)
        if residual is None:
            residual = self.residuals[name] = torch.zeros_like(gradient, dtype=torch.float32)
        residual += gradient
        kept, indices = self._kept(len(residual)), None
        if kept < len(residual):
            indices = residual.abs().topk(kept, sorted=False).indices.sort().values
        values = residual.clone() if indices is None else residual[indices]
        words = [] if indices is None else [indices.int()]
        if self.bits == 32:
            sent, words = values, [*words, values.view(torch.int32)]
        else:
            codes, scales = quantise(values, self.block)
            sent = dequantise(codes, scales, self.block)
            words += [scales.view(torch.int32), F.pad(codes, (0, -kept % 4)).view(torch.int32)]
        if indices is None:
            residual -= sent
        else:
            residual[indices] = values - sent
        return words

    def _read(self, reader, size):
        """(indices or None, values float32) of a tensor of `size` elements, as `_encode` wrote them."""
        kept = self._kept(size)
        indices = reader.take(kept).long() if kept < size else None
        if self.bits == 32:
            return indices, reader.take(kept).view(torch.float32)
        scales = reader.take(-(-kept // self.block)).view(torch.float32)
        codes = reader.take(-(-kept // 4)).view(torch.int8)[:kept]
        return indices, dequantise(codes, scales, self.block)

    def state_dict(self):
        residuals = {name: tensor.detach().cpu().clone() for name, tensor in self.residuals.items()}
        return super().state_dict() | {"residuals": residuals}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.residuals = {name: tensor.to(self.device, copy=True) for name, tensor in state["residuals"].items()}


class _Words:
    """Reads an int32 tensor from its start."""

    def __init__(self, words):
        self.words, self.position = words, 0

    def take(self, count):
        self.position += count
        return self.words[self.position - count : self.position]


# ---------------------------------------------------------------- by name

COMPRESSIONS = {
    "none": lambda args: PlainReduction(),
    "bf16": lambda args: BF16Reduction(args.gradient_compression_start),
    "powersgd": lambda args: PowerSGDReduction(args.powersgd_rank, args.gradient_compression_start, args.seed),
    "top_k": lambda args: TopKReduction(
        args.top_k_fraction, args.top_k_bits, args.top_k_block, args.gradient_compression_start
    ),
}
