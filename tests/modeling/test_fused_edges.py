"""The fused training path where something else has a say: several GPUs, hooks, no gradients, context parallelism."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate.big_modeling import _attach_context_parallel_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_deepseek_r1 import (
    DeepSeekR1Model,
    documents,
    kernels_expert_rows,
    kernels_norms,
    kernels_rotary,
    kernels_training_routing,
    losses,
)
from modeling_deepseek_r1.fused import set_fused_kernels
from modeling_deepseek_r1.moe import DeepSeekR1MLP

from .helpers import tiny_config, tiny_model
from .kernel_tests import DEVICE, runs_elsewhere, runs_kernels, switch_restored  # noqa: F401  (the fixture acts by being here)


@runs_elsewhere
def test_in_the_interpreter(interpreted):
    interpreted(__file__)


class Watched:
    """A kernel that may be launched only while the device of its tensors is the current one."""

    def __init__(self, kernel, current, launched):
        self.kernel, self.current, self.launched = kernel, current, launched

    def __getitem__(self, grid):
        self.launched[self.kernel.__name__] = bool(self.current)
        return self.kernel[grid]


@runs_kernels
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """On the second of two GPUs a launch without `torch.cuda.device_of` would run on the first."""
    current, launched, guard = [], {}, torch.cuda.device_of

    class DeviceOf(guard):
        def __enter__(self):
            current.append(self)
            return super().__enter__()

        def __exit__(self, *error):
            current.pop()
            return super().__exit__(*error)

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    kernels = {
        kernels_expert_rows: ("_rank_pairs", "_place_pairs", "_gather_rows", "_gate_rows", "_gate_rows_backward",
                              "_sum_choices"),
        kernels_norms: ("_rms_norm_kernel", "_rms_norm_backward_kernel", "_sum_parts_kernel", "_swiglu_kernel",
                        "_swiglu_backward_kernel"),
        kernels_rotary: ("_assemble_kernel", "_assemble_backward_kernel"),
        kernels_training_routing: ("_logits", "_route", "_route_gradient", "_hidden_gradient", "_weight_gradient"),
    }  # fmt: skip
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Watched(getattr(module, name), current, launched))
    torch.manual_seed(0)
    model = tiny_model(implementation="sdpa", num_hidden_layers=2).to(DEVICE).train()
    ids = torch.randint(3, 97, (1, 5), device=DEVICE)
    set_fused_kernels(True)
    model(input_ids=ids, labels=ids).loss.backward()
    experts, states = model.model.layers[1].mlp.experts, torch.randn(5, 32, device=DEVICE, requires_grad=True)
    index, weights = ids.view(5, 1) % 8, torch.rand(5, 1, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        experts.fused(states, index, weights).sum().backward()
    assert set(launched) == {name for names in kernels.values() for name in names}
    assert all(launched.values()), [name for name, guarded in launched.items() if not guarded]


class Counted(TorchDispatchMode):
    """Operations that give a tensor with a dimension of `size`, by name."""

    def __init__(self, size):
        super().__init__()
        self.size, self.calls = size, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and self.size in output.shape:
            self.calls[function.overloadpacket.__name__] += 1
        return output


@runs_kernels
def test_no_gradient_is_summed_or_joined_in_a_pass_of_its_own():
    """What reads a tensor beside another adds its gradient in its own kernel: a backward pass has no bare sums, no
    copies of activations, one layer or several."""
    counts = []
    for layers in (1, 2):
        torch.manual_seed(0)
        model = tiny_model(
            implementation="sdpa", num_hidden_layers=layers, first_k_dense_replace=0, q_lora_rank=None,
            qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32,  # for these a GPU's attention is one kernel
        ).to(DEVICE, torch.bfloat16).train()  # fmt: skip
        set_fused_kernels(True)
        ids = torch.randint(3, 97, (1, 7), device=DEVICE)  # no width is 7
        loss = model(input_ids=ids, labels=ids).loss
        with Counted(7) as counted:
            loss.backward()
        counts.append(counted.calls)
    layer = counts[1] - counts[0]
    assert layer["mm"] >= 5  # it does look
    assert not {name: layer[name] for name in ("add", "add_", "cat", "sum", "_to_copy", "clone") if layer[name]}


@runs_kernels
def test_hooks_on_the_backward_are_called():
    torch.manual_seed(0)
    model = tiny_model(implementation="sdpa", num_hidden_layers=2).to(DEVICE).train()
    layer, seen = model.model.layers[1], []
    hook = lambda module, grad_inputs, grad_outputs: seen.append(type(module).__name__)
    for module in (layer.post_attention_layernorm, layer.mlp.experts, layer.mlp.shared_experts.gate_proj):
        module.register_full_backward_hook(hook)
    set_fused_kernels(True)
    ids = torch.randint(3, 97, (1, 5), device=DEVICE)
    model(input_ids=ids, labels=ids).loss.backward()
    assert sorted(seen) == ["DeepSeekR1Experts", "DeepSeekR1RMSNorm", "Linear"]


@runs_kernels
def test_without_gradients_the_mlp_copies_no_weights(monkeypatch):
    """A few tokens' forward pass is as long as its weights are read: twice as much traffic, twice the time."""
    torch.manual_seed(0)
    mlp, states = DeepSeekR1MLP(tiny_config()).to(DEVICE), torch.randn(1, 3, 32, device=DEVICE)
    set_fused_kernels(True)
    expected = mlp(states)
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, *args, **kwargs: joined.append(1) or cat(parts, *args, **kwargs))
    with torch.no_grad():
        torch.testing.assert_close(mlp(states), expected)
    assert not joined


def test_evaluation_makes_no_gradients_of_the_head(monkeypatch):
    """`needs_input_grad` says True for a trained weight also under no_grad."""
    wanted = []

    class Watch(losses._LinearCrossEntropy):
        @staticmethod
        def forward(ctx, *args):
            wanted.append(any(ctx.needs_input_grad))
            return losses_forward(ctx, *args)

    losses_forward = losses._LinearCrossEntropy.forward
    monkeypatch.setattr(losses, "_LinearCrossEntropy", Watch)
    model = tiny_model(implementation="sdpa").to(DEVICE)
    ids = torch.randint(3, 97, (1, 5), device=DEVICE)
    expected = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected.detach())
    assert wanted == [True, False]


def test_documents_go_through_a_mask_where_somebody_changes_the_attention(monkeypatch):
    """Context parallelism takes masks away and gives each process a part of the keys: attention by documents, of these
    keys alone, would be wrong and say nothing."""
    monkeypatch.setattr(documents, "runs_fused", lambda *tensors: True)
    monkeypatch.setattr(documents, "compute_dtype", lambda tensor: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    embeds = SimpleNamespace(is_cuda=True, device="cuda:0")
    model = DeepSeekR1Model(tiny_config(qk_nope_head_dim=12))  # 16 channels a head
    model.set_attn_implementation("sdpa")
    serves = lambda: documents.attends_to_documents(model, embeds)

    capability = (9, 0)
    assert serves()
    capability = (7, 5)
    assert not serves()  # Turing has no flash attention
    capability = (9, 0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not serves()
    with monkeypatch.context() as patched:
        patched.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *args, **kwargs: None)  # as sequence parallelism does
        assert not serves()
    assert serves()
    _attach_context_parallel_hooks(model)
    assert not serves()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_hook_on_the_feed_forward_block_sees_its_own_output(layer):
    model = tiny_model(implementation="sdpa").to(DEVICE)
    ids, seen = torch.randint(3, 97, (1, 5), device=DEVICE), {}
    expected, block = model(input_ids=ids, use_cache=False).logits, model.model.layers[layer].mlp
    block.register_forward_hook(lambda module, args, output: seen.update(args=args, output=output))
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    torch.testing.assert_close(seen["output"], block(seen["args"][0]))


def test_gradients_of_gradients_are_refused_where_a_term_would_be_missing():
    set_fused_kernels(False)
    model = tiny_model(experts="eager").to(DEVICE)
    ids = torch.randint(3, 97, (1, 5), device=DEVICE)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(model(inputs_embeds=embeds, labels=ids).loss, embeds, create_graph=True)
    assert torch.autograd.grad(model(inputs_embeds=embeds, labels=ids).loss, embeds)[0].any()
