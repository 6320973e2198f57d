"""Activation checkpointing where the fused kernels run: the step to the bit, and what it keeps.

On a GPU the kernels run as they are, elsewhere in Triton's interpreter (see `interpreted` in tests/conftest.py).
"""

import torch

from modeling_deepseek_r1.fused import set_fused_kernels
from modeling_deepseek_r1.training_linear import fused_gated_mlp

from .helpers import random_ids, tiny_model
from .kernel_tests import DEVICE, runs_elsewhere, runs_kernels, switch_restored  # noqa: F401  (the fixture acts by being here)
from .test_activation_checkpointing import MODES, step


@runs_elsewhere
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


@runs_kernels
def test_kernel_gated_mlp_keeps_its_inputs_only():
    torch.manual_seed(0)
    shapes = (5, 16), (24, 16), (24, 16), (16, 24)
    inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    results = []
    for recompute in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            output = fused_gated_mlp(*inputs, recompute)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        own = {tensor.data_ptr() for tensor in inputs}
        assert {tensor.data_ptr() for tensor in saved} <= own if recompute else len(saved) == 4
    assert all(torch.equal(first, second) for first, second in zip(*results))
    output = fused_gated_mlp(inputs[0].detach(), *(weight.detach() for weight in inputs[1:3]), inputs[3], True)
    assert torch.equal(torch.autograd.grad(output.square().sum(), inputs[3])[0], results[0][-1])


@runs_kernels
def test_kernel_step_is_the_same_to_the_bit():
    """In every mode. bf16 compute on fp32 weights; the bias moves between the passes."""
    set_fused_kernels(True)
    # The interpreter takes milliseconds a row of a layer.
    sizes = {} if DEVICE == "cuda" else {"num_hidden_layers": 2}
    model = tiny_model(implementation="sdpa", seq_aux_loss_alpha=0.1, **sizes).to(DEVICE)
    ids = random_ids(2, 6).to(DEVICE)
    biases = [router.e_score_correction_bias for router in model.routers.values()]
    values = [bias.clone() for bias in biases]
    results = []
    for arguments in ({"mode": "none"}, *MODES.values()):
        model.set_activation_checkpointing(**arguments)
        for bias, value in zip(biases, values):
            bias.copy_(value)
        assert model.model.layers[1].mlp.experts.runs_fused(ids.float()) is False  # fp32 is not what is tested
        with torch.autocast(DEVICE, torch.bfloat16):
            assert model.model.layers[1].mlp.experts.runs_fused(ids.float())
            results.append(step(model, ids, lambda: [bias.neg_() for bias in biases]))
    loss, whole, loads = results[0]
    for mode, (again, gradients, counts) in zip(MODES, results[1:], strict=True):
        assert torch.equal(again, loss), mode
        for name, gradient in whole.items():
            assert torch.equal(gradients[name], gradient), (mode, name)
        assert all(torch.equal(counts[layer], load) for layer, load in loads.items()), mode
