"""AdamW in one pass over a tensor: clipping, decay, both moments and the weight, as a Triton kernel and in torch.

    g = clip * gradient,  m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
    weight = (1 - lr * weight_decay) weight - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

Source: Loshchilov and Hutter (arXiv:1711.05101), Algorithm 2, as in torch.optim.AdamW. `clip` is a number on the
device, so nobody waits for it and no pass over the gradients is needed to apply it: 28 bytes a weight in fp32 (read
four tensors, write three), 14 in bf16. Arithmetic is fp32; what is stored is rounded once. Of an fp32 weight the kernel
can also write the bf16 copy that the next forward pass computes with: 28 bytes then too, the gradient being bf16.

Stochastic rounding of bf16 weights: the 16 bits that bf16 drops are compared with a random number, so that small
updates survive in the mean (Gupta et al., arXiv:1502.02551, Sec. 3). The number is a hash of (seed, place).
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch form serves then
    triton = None

BLOCK, WARPS = 2048, 8  # 16 bytes a load in bf16, eight loads of 16 bytes under way in fp32
LEAST_ELEMENTS = 1 << 16  # smaller fp32 tensors go through torch's list operations, all of them in a dozen launches
CHECKED = 64  # of so many blocks one is looked at for weights that were changed without a trace
MIX = ((16, 0x7FEB352D), (15, 0x846CA68B))  # shifts and factors of a 32-bit hash with little bias, as in `_hash`


if triton is not None:

    @triton.jit
    def _hash(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _to_bf16(x):
        """To nearest even in integers, as torch rounds; Triton's interpreter would cut off. NaN as it is."""
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)

    @triton.jit(do_not_specialize=["seed", "turn"])
    def _adamw(
        weight, gradient, exp_avg, exp_avg_sq, copy, edited, clip, count, decay, rest1, beta2, rest2, eps, step_size,
        root, seed, turn, CLIP: tl.constexpr, ROUND: tl.constexpr, COPY: tl.constexpr, CHECKED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        if CHECKED > 0:
            if tl.program_id(0) % CHECKED == turn % CHECKED:
                before = tl.load(copy + at, mask=inside, other=0.0).to(tl.float32)
                differs = inside & (w == w) & (before != _to_bf16(w).to(tl.float32))
                if tl.max(differs.to(tl.int32), 0) > 0:
                    tl.store(edited, 1)
        if CLIP:
            g = g * tl.load(clip).to(tl.float32)
        m = m + rest1 * (g - m)
        v = v * beta2 + rest2 * g * g
        w = w * decay - step_size * (m / (tl.sqrt(v) / root + eps))
        if ROUND:
            # Low half of the bits plus a random number: it carries into the high half as often as it should.
            noise = _hash(_hash(at.to(tl.uint32)) ^ seed.to(tl.uint32)) & 0xFFFF
            bits = (w.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
            w = tl.where(tl.abs(w) < float("inf"), bits.to(tl.float32, bitcast=True), w)
        tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
        if COPY:
            tl.store(copy + at, _to_bf16(w), mask=inside)


def has_kernel(weight):
    """Whether `adamw_` serves this weight: large or narrow, whole, on CUDA. Others are for `adamw_lists_`, which casts
    narrow tensors one by one, four launches for the kernel's one."""
    least = LEAST_ELEMENTS if weight.element_size() >= 4 else 1
    return triton is not None and weight.is_cuda and weight.numel() >= least and weight.is_contiguous()


def coefficients(lr, beta1, beta2, eps, weight_decay, step):
    """The numbers of a step, made in double precision: keyword arguments of the functions below."""
    return {
        "decay": 1.0 - lr * weight_decay, "rest1": 1.0 - beta1, "beta2": float(beta2), "rest2": 1.0 - beta2,
        "eps": float(eps), "step_size": lr / (1.0 - beta1**step), "root": (1.0 - beta2**step) ** 0.5,
    }  # fmt: skip


def adamw_(weight, gradient, exp_avg, exp_avg_sq, clip=None, seed=None, copy=None, watch=None, **numbers):
    """One step in place on contiguous tensors of one shape; dtypes are free. `numbers`: see `coefficients`.

    clip: () on the device, or None. seed: an int below 2^31 rounds bf16 weights stochastically, None to nearest. copy:
    bf16, takes the new weight, which is fp32, rounded. watch: (flag, turn); the flag, (1,) int32 on the device, becomes
    1 if in the blocks whose turn it is the copy was not the old weight rounded.
    """
    count = weight.numel()
    round_randomly = seed is not None and weight.dtype == torch.bfloat16
    flag, turn = (weight, 0) if watch is None else watch
    mixed = copy is not None or gradient.dtype != weight.dtype
    block = BLOCK // 2 if mixed else BLOCK  # 8 numbers a thread would take one layout in bf16 and another in fp32
    order = ("decay", "rest1", "beta2", "rest2", "eps", "step_size", "root")
    with torch.cuda.device_of(weight):
        _adamw[(triton.cdiv(count, block),)](
            weight, gradient.contiguous(), exp_avg, exp_avg_sq, weight if copy is None else copy, flag,
            weight if clip is None else clip, count, *(numbers[name] for name in order),
            seed if round_randomly else 0, turn, CLIP=clip is not None, ROUND=round_randomly, COPY=copy is not None,
            CHECKED=0 if watch is None else CHECKED, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    for changed in (weight,) if copy is None else (weight, copy):
        torch.autograd.graph.increment_version(changed)  # as torch's own in-place operations do


def adamw_lists_(
    weights, gradients, exp_avgs, exp_avg_sqs, clip=None, seeds=None, copies=None, *,
    decay, rest1, beta2, rest2, eps, step_size, root,
):  # fmt: skip
    """The same on lists of tensors of one device, in torch: `adamw_`'s twin, and what serves small tensors and CPUs.

    seeds and copies: lists too, or None for none; of copies single ones may be None.
    """
    w, m, v = _wide(weights), _wide(exp_avgs), _wide(exp_avg_sqs)
    g = _wide(gradients) if clip is None else torch._foreach_mul(_wide(gradients), clip.float())
    torch._foreach_lerp_(m, g, rest1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, rest2)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_div_(denominators, root)
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(w, decay)
    torch._foreach_addcdiv_(w, m, denominators, -step_size)
    if seeds is not None:
        w = [_rounded(x, seed) if y.dtype == torch.bfloat16 else x for x, y, seed in zip(w, weights, seeds)]
    for stored, computed in ((weights, w), (exp_avgs, m), (exp_avg_sqs, v)):
        if any(x is not y for x, y in zip(stored, computed)):
            torch._foreach_copy_(stored, computed)
    pairs = [(copy, weight) for copy, weight in zip(copies or (), weights) if copy is not None]
    if pairs:
        torch._foreach_copy_(*zip(*pairs))


def _wide(tensors):
    """At least fp32; tensors that are so already are returned themselves."""
    return [x if x.dtype in (torch.float32, torch.float64) else x.float() for x in tensors]


def _hash_twin(x):
    for shift, factor in MIX:
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF  # int64 wraps, its low half is right
    return x ^ (x >> 16)


def _rounded(values, seed):
    """fp32 values with the low half of their bits rounded away stochastically: exact in bf16."""
    place = torch.arange(values.numel(), device=values.device).view(values.shape)
    noise = (_hash_twin(_hash_twin(place) ^ seed) & 0xFFFF).to(torch.int32)
    bits = (values.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(values.isfinite(), bits.view(torch.float32), values)
