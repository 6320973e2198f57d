"""bf16 copies of fp32 weights that live on from step to step, and gradients that stay bf16 until the optimizer.

With fp32 weights and bf16 compute a step casts every weight (4 bytes read, 2 written), casts the bf16 gradient that the
matrix product gives back to fp32 (2 read, 4 written), and reads the wide one for its norm and its update. An optimizer
that asks for copies (`keep_copies`) spares these: it writes the next step's copy while it has the new weight at hand,
and reads the gradient as it came. No number changes: what is rounded is rounded as before, and whatever is added to a
gradient, of another use of the weight or of another micro-batch, is added in fp32.

A copy serves training steps only, and only while its weight is what it was made from: the version counter tells, which
every change but one through `weight.data` increases. The copies live as long as the list of `keep_copies` does.
"""

import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_COPIES = weakref.WeakValueDictionary()  # {id(weight): KeptCopy}; a KeptCopy holds its weight, so ids stay unique


class KeptCopy:
    """The bf16 copy of one fp32 weight; `resident`: kept between steps, else made for each use as without it."""

    def __init__(self, weight, resident):
        self.weight, self.resident = weight, resident
        self.users = weakref.WeakSet()  # places in graphs that have given no gradient yet
        self._tensor = self._made_from = self._finalizer = None

    def current(self):
        """The copy, None where there is none or the weight has changed since."""
        return self._tensor if self._made_from == _identity(self.weight) else None

    def get(self):
        """The copy, made anew where it has to be."""
        copy = self.current()
        if copy is None:
            self._tensor = None  # not written over: a graph may still need it
            copy = self.weight.detach().to(torch.bfloat16)
            if self.resident:
                self._tensor = copy
                self.is_made()
        return copy

    def is_made(self):
        """Says that the copy was made from the weight as it is now."""
        self._made_from = _identity(self.weight)

    def keep_gradients_narrow(self):
        """From now on the weight's gradient is stored in the dtype it comes in, and added up in fp32."""
        if self._finalizer is None and self.weight.grad_dtype == self.weight.dtype:  # else somebody has other wishes
            self.weight.grad_dtype = None
            hook = self.weight.register_hook(_widening(weakref.ref(self.weight)))
            self._finalizer = weakref.finalize(self, _restore, self.weight, hook)
            self._finalizer.atexit = False


def _identity(weight):
    """Equal as long as the weight is the same memory with the same count of changes. `weight.data = other` counts none;
    a weak reference to a storage is never that of a later one at its address."""
    return weight._version, StorageWeakRef(weight.untyped_storage()), weight.storage_offset(), weight.stride()


def _widen(weight):
    if weight.grad is not None and weight.grad.dtype != weight.dtype:
        weight.grad = weight.grad.to(weight.dtype)


def _widening(reference):
    def before_a_gradient_is_added(_):
        _widen(reference())

    return before_a_gradient_is_added


def _restore(weight, hook):
    hook.remove()
    _widen(weight)
    weight.grad_dtype = weight.dtype


class _Narrow(torch.autograd.Function):
    """weight -> its copy. The gradient stays as it is where nothing can be added to it before it is stored."""

    @staticmethod
    def forward(ctx, weight, kept, copy):
        kept.users.add(ctx)
        ctx.kept = kept
        return copy.detach()  # shares the version counter: a copy written over before the backward is an error there

    @staticmethod
    def backward(ctx, grad):
        users = ctx.kept.users
        alone = ctx in users and len(users) == 1  # not in it: a graph's second backward
        users.discard(ctx)
        if not alone or torch.is_grad_enabled():
            grad = grad.to(ctx.kept.weight.dtype)
        return grad, None, None


def keep_copies(weights, resident=True):
    """For an optimizer that updates `weights` and reads their gradients: copies of those among them that are fp32.

    Their `.grad` may then be bf16: `weight.grad_dtype` is None. resident=False keeps no copies between steps, which
    spares 2 bytes a weight where activations are checkpointed, and leaves the gradients.
    Returns:
        [KeptCopy], to be held as long as the optimizer lives; when it is gone, all is as before.
    """
    found = []
    for weight in weights:
        if weight.dtype == torch.float32 and weight.requires_grad and type(weight) is torch.nn.Parameter:
            kept = _COPIES.get(id(weight)) or KeptCopy(weight, resident)
            kept.resident = resident
            _COPIES[id(weight)] = kept
            found.append(kept)
    return found


def has_copy(weight):
    """Whether an optimizer has asked for a copy of this weight. Compilers and tracers see none."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and id(weight) in _COPIES


def in_dtype(weight, dtype):
    """weight.to(dtype), in a training step by the copy that an optimizer keeps. Differentiable."""
    trains = torch.is_grad_enabled() and weight.requires_grad
    if weight.dtype == dtype or dtype != torch.bfloat16 or not trains or not has_copy(weight):
        return weight.to(dtype)
    kept = _COPIES[id(weight)]
    kept.keep_gradients_narrow()
    return _Narrow.apply(weight, kept, kept.get())
