"""Cross-entropy of a chunk of logits and its gradient in one Triton kernel, and the chunks' matmuls around it.

One program serves a token. A first sweep over its row of logits keeps the maximum and the sum of exponentials as it
goes (Milakov and Gimelshein, arXiv:1805.02867), for each place of a load by itself, so that no thread waits for another
before the end. A second one, which finds the row in the second-level cache, writes softmax(logits) - (1 - e) * onehot -
e / V over the logits, in their dtype. So a logit of the compute dtype costs main memory one read and one write;
arithmetic is fp32.

Names in shapes: T tokens, D width, V vocabulary.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch forms serve then
    triton = None

CHUNK_BYTES = 1 << 29  # of logits in the compute dtype at a time: 4,096 tokens of 65,536 logits in bf16
ROWS_MULTIPLE = 128  # tokens a chunk, where there are several: whole tiles for the matmuls


if triton is not None:

    @triton.jit
    def _cross_entropy_row(
        logits, labels, losses, row_stride, vocab_size, ignore_index, smoothing, share,
        GRADIENT: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        each: tl.constexpr = 8  # adjacent logits of a lane
        lanes: tl.constexpr = BLOCK // each
        row = tl.program_id(0).to(tl.int64)
        line = logits + row * row_stride
        column = tl.arange(0, BLOCK)
        target = tl.load(labels + row).to(tl.int64)
        if target == ignore_index:
            tl.store(losses + row, 0.0)
            if GRADIENT:
                nothing = tl.zeros((BLOCK,), logits.dtype.element_ty)
                for start in range(0, vocab_size, BLOCK):
                    tl.store(line + start + column, nothing, mask=start + column < vocab_size)
        else:
            # A label outside the vocabulary gives a loss that is not a number; it must not be read.
            known = (target >= 0) & (target < vocab_size)
            chosen = tl.load(line + target, mask=known, other=float("nan")).to(tl.float32)
            place = tl.where(known, target, -1).to(tl.int32)
            place_of = tl.arange(0, lanes)[:, None] * each + tl.arange(0, each)[None, :]
            largest = tl.full((lanes,), -3.0e38, tl.float32)  # finite: logits of -inf leave a sum of 0, not nan
            sums, total = tl.zeros((lanes,), tl.float32), tl.zeros((lanes,), tl.float32)
            for start in range(0, vocab_size, BLOCK):
                inside = start + place_of < vocab_size
                x = tl.load(line + start + place_of, mask=inside, other=-float("inf")).to(tl.float32)
                larger = tl.maximum(largest, tl.max(x, 1))
                sums = sums * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger[:, None]), 1)
                largest = larger
                if SMOOTH:
                    total += tl.sum(tl.where(inside, x, 0.0), 1)
            highest = tl.max(largest, 0)
            normaliser = highest + tl.log(tl.sum(sums * tl.exp(largest - highest), 0))
            loss = normaliser - (1.0 - smoothing) * chosen
            if SMOOTH:
                loss -= share * tl.sum(total, 0)
            tl.store(losses + row, loss)
            if GRADIENT:
                for start in range(0, vocab_size, BLOCK):
                    inside = start + column < vocab_size
                    x = tl.load(line + start + column, mask=inside, other=-float("inf")).to(tl.float32)
                    gradient = tl.exp(x - normaliser)
                    if SMOOTH:
                        gradient -= share
                    gradient = tl.where(start + column == place, gradient - (1.0 - smoothing), gradient)
                    tl.store(line + start + column, gradient.to(logits.dtype.element_ty), mask=inside)

    @triton.jit
    def _scale(source, factor, result, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
        tl.store(result + at, value.to(result.dtype.element_ty), mask=at < count)


def has_kernels(tensor):
    """Whether the Triton kernels serve this tensor: on CUDA, outside of torch.compile, which makes its own."""
    return triton is not None and tensor.is_cuda and not torch.compiler.is_compiling()


def cross_entropy_rows(logits, labels, losses, gradient, label_smoothing=0.0, ignore_index=-100):
    """Losses (T,) float32 of logits (T, V) and labels (T,) int64, written to `losses`; 0 at `ignore_index`.

    With `gradient` the logits are overwritten with d loss / d logits in their dtype (rows ignored: 0); rows may be a
    slice, columns must be contiguous. A label outside [0, V) gives nan, where the torch forms raise.
    """
    rows, vocab_size = logits.shape
    if rows == 0:
        return
    label_smoothing = float(label_smoothing)  # an integer would be another kernel
    block = max(64, min(8192, triton.next_power_of_2(vocab_size)))
    _cross_entropy_row[(rows,)](
        logits, labels, losses, logits.stride(0), vocab_size, ignore_index, label_smoothing,
        label_smoothing / vocab_size, GRADIENT=bool(gradient), SMOOTH=label_smoothing > 0, BLOCK=block,
        num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip


def cross_entropy_rows_twin(logits, labels, losses, gradient, label_smoothing=0.0, ignore_index=-100):
    """`cross_entropy_rows` in torch, for labels inside the vocabulary."""
    kept = (labels != ignore_index).unsqueeze(-1)
    column = labels.masked_fill(~kept.squeeze(-1), 0).unsqueeze(-1)
    scores = logits.float()
    normaliser = scores.logsumexp(-1, keepdim=True)
    loss = normaliser - (1.0 - label_smoothing) * scores.gather(-1, column)
    if label_smoothing:
        loss = loss - label_smoothing * scores.mean(-1, keepdim=True)
    losses.copy_(torch.where(kept, loss, 0.0).squeeze(-1))
    if gradient:
        grad = (scores - normaliser).exp() - label_smoothing / logits.shape[1]
        grad = grad.scatter_add(1, column, torch.full_like(column, label_smoothing - 1.0, dtype=grad.dtype))
        logits.copy_(grad.masked_fill(~kept, 0.0))


def scaled(source, factor, dtype):
    """source * factor in fp32, rounded to `dtype`, in one pass; factor () of any dtype, on the same device."""
    if not source.is_contiguous():
        raise ValueError(f"source has strides {source.stride()}; pass a contiguous tensor")
    result, block = torch.empty_like(source, dtype=dtype), 4096
    if source.numel():
        _scale[(triton.cdiv(source.numel(), block),)](
            source, factor, result, source.numel(), BLOCK=block, num_warps=8
        )
    return result


def scaled_twin(source, factor, dtype):
    """`scaled` in torch."""
    return (source.float() * factor.float()).to(dtype)


def fused_chunk_rows(tokens, vocab_size, element_size):
    """Tokens a chunk: as few chunks as `CHUNK_BYTES` allows, nearly equal ones, of at least 64 tokens."""
    most = max(64, CHUNK_BYTES // (vocab_size * element_size))
    if tokens <= most:
        return max(1, tokens)
    each = -(-tokens // -(-tokens // most))
    return min(most, -(-each // ROWS_MULTIPLE) * ROWS_MULTIPLE)


def fused_linear_cross_entropy(hidden, weight, labels, label_smoothing, ignore_index, needs_hidden, needs_weight):
    """Losses of `hidden @ weight.T` and the gradients of their sum.

    Shapes: hidden (T, D) any dtype, weight (V, D) in the compute dtype, labels (T,) int64 -> losses (T,) float32,
    grad_hidden (T, D) in hidden's dtype or None, grad_weight (V, D) float32 or None.
    Memory beside the results: one chunk of logits. Gradients of the weight are summed in fp32.
    """
    (tokens, _), vocab_size = hidden.shape, weight.shape[0]
    rows = fused_chunk_rows(tokens, vocab_size, weight.element_size())
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    grad_hidden, grad_weight = hidden.new_empty(hidden.shape) if needs_hidden else None, None
    labels = labels.contiguous()
    buffer = weight.new_empty(rows, vocab_size)
    for start in range(0, tokens, rows):
        part = slice(start, min(start + rows, tokens))
        states, logits = hidden[part].to(weight.dtype), buffer[: part.stop - start]
        torch.mm(states, weight.t(), out=logits)
        cross_entropy_rows(
            logits, labels[part], losses[part], needs_hidden or needs_weight, label_smoothing, ignore_index
        )
        if needs_hidden and hidden.dtype == weight.dtype:
            torch.mm(logits, weight, out=grad_hidden[part])
        elif needs_hidden:
            grad_hidden[part] = logits @ weight
        if needs_weight:
            grad_weight = _add_product(grad_weight, logits.t(), states)
    if needs_weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    return losses, grad_hidden, grad_weight


def _add_product(total, first, second):
    """total + first @ second in fp32 (in place; total None: the product alone), without a pass for the sum on CUDA."""
    if first.dtype == torch.float32:
        return torch.mm(first, second) if total is None else total.addmm_(first, second)
    if first.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
        if total is None:
            return torch.mm(first, second, out_dtype=torch.float32)
        return torch.addmm(total, first, second, out_dtype=torch.float32, out=total)
    product = torch.mm(first, second)  # rounded to the narrow dtype, then summed in fp32
    return product.float() if total is None else total.add_(product)
