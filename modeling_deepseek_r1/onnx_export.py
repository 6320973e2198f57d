"""A language model as one ONNX graph for both prefill and decoding, checked against the model itself.

    python -m modeling_deepseek_r1.onnx_export FOLDER OUT     # needs: pip install onnx onnxscript onnxruntime

OUT becomes a folder with `model.onnx`, its weights `model.onnx.data` (float32) and the tokenizer files of FOLDER.
Shapes (B batch, S new tokens, P tokens in the cache, V vocabulary; all of them dynamic, S > 0, P may be 0):
    input_ids, position_ids (B, S) int64; attention_mask (B, P + S) int64, 0 for padding (on the left in a batch);
    past_key_values.<layer>.key (B, 1, P, kv_lora_rank), the latent that Multi-head Latent Attention caches, and
    past_key_values.<layer>.value (B, 1, P, qk_rope_head_dim), the rotary key
    -> logits (B, S, V) and present.<layer>.{key,value}, the same with P + S tokens: the next step's past.
Multi-token-prediction layers are left out: decoding does not use them. Each token's experts are gathered as weights, so
prefill needs memory for S * num_experts_per_tok expert matrices a row: meant for small models or short prompts.
"""

import argparse
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy
import torch
from torch import nn

from .modeling_deepseek_r1 import DeepSeekR1ForCausalLM

MODEL = "model.onnx"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


def onnx_packages():
    """-> (onnx, onnxruntime); ImportError with the way out where one that the export needs is not installed."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx uses it)
    except ImportError as error:
        raise ImportError(f"{error}; the ONNX export needs: pip install onnx onnxscript onnxruntime") from error
    return onnx, onnxruntime


class TensorCache:
    """The cache as plain tensors: what was there before, and what is there after this step."""

    def __init__(self, past):
        self.past, self.present = past, {}

    def get_seq_length(self, layer_idx=0):
        return self.past[0].shape[2]

    def update(self, key, value, layer_idx, *args, **kwargs):
        past_key, past_value = self.past[2 * layer_idx : 2 * layer_idx + 2]
        self.present[layer_idx] = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
        return self.present[layer_idx]


class DecodingStep(nn.Module):
    """The model as a function of tensors; shapes: see the head of this file."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = TensorCache(past)
        new, total = input_ids.shape[1], attention_mask.shape[1]
        places = torch.arange(total, device=input_ids.device)
        # A query sees itself and what lies before it; its place counts from the end, whatever the padding on the left.
        seen = places <= torch.arange(new, device=input_ids.device)[:, None] + (total - new)
        seen = seen & attention_mask.bool()[:, None, None, :]
        # Not -inf: padding that sees nothing must not become NaN.
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        outputs = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        present = [tensor for layer in range(len(past) // 2) for tensor in cache.present[layer]]
        return outputs.logits, *present


def cache_names(config, prefix):
    return [f"{prefix}.{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")]


def empty_cache(config, rows, length=0):
    """[(rows, 1, length, width), ...]: latent and rotary key of each layer in turn."""
    widths = (config.kv_lora_rank, config.qk_rope_head_dim)
    return [torch.zeros(rows, 1, length, width) for _ in range(config.num_hidden_layers) for width in widths]


def check_exportable(config):
    """Raises ValueError naming the field for a model whose computation depends on more than the graph's inputs."""
    kinds = set(config.attention_types or ["latent"])
    if kinds != {"latent"}:
        raise ValueError(f"attention_types holds {sorted(kinds)}; only 'latent' attention has an ONNX export")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type={rope_type!r} takes other angles as the sequence grows, which a fixed graph cannot; "
            "use one of 'default', 'linear', 'yarn', 'llama3'"
        )


def write_graph(model, path):
    """Writes `model` (float32, on the CPU) as `path` and `path`.data. Changes its attention and experts functions."""
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")  # the one that has a fixed graph made of ONNX operators
    config = model.config
    rows, past, new = 2, 3, 4  # none is 0 or 1: the exporter would take those for constants
    example = {
        "input_ids": torch.full((rows, new), 3), "attention_mask": torch.ones(rows, past + new, dtype=torch.int64),
        "position_ids": torch.arange(past, past + new).expand(rows, new).contiguous(),
        "past": empty_cache(config, rows, past),
    }  # fmt: skip
    dynamic = {
        "input_ids": {0: "batch", 1: "new"}, "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "new"}, "past": [{0: "batch", 2: "past"} for _ in example["past"]],
    }  # fmt: skip
    inputs = ["input_ids", "attention_mask", "position_ids", *cache_names(config, "past_key_values")]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's own deprecations and names of equal dimensions
        torch.onnx.export(
            DecodingStep(model), kwargs=example, f=path, input_names=inputs,
            output_names=["logits", *cache_names(config, "present")], dynamic_shapes=dynamic, dynamo=True,
            external_data=True, verbose=False,
        )  # fmt: skip
    remove_traces(path)


def remove_traces(path):
    """Takes the exporter's notes (stack traces with this machine's paths, most of a small file) out of the graph."""
    onnx, _ = onnx_packages()
    graph_file = onnx.load(str(path), load_external_data=False)
    graph = graph_file.graph
    for part in (graph_file, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    onnx.save(graph_file, str(path))


class OnnxDecoder:
    """The graph in onnxruntime on the CPU, with its cache: call it with all new tokens, then with one at a time."""

    def __init__(self, folder):
        _, onnxruntime = onnx_packages()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(Path(folder) / MODEL), options, providers=["CPUExecutionProvider"]
        )
        self.cache_inputs = [entry for entry in self.session.get_inputs() if entry.name.startswith("past_key_values.")]
        self.past = None

    def __call__(self, input_ids, attention_mask, position_ids):
        """(B, S), (B, P + S) and (B, S) int64 tensors -> logits (B, S, V). P = 0 on the first call."""
        if self.past is None:
            rows = input_ids.shape[0]
            self.past = [numpy.zeros((rows, 1, 0, entry.shape[3]), numpy.float32) for entry in self.cache_inputs]
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        feed = {name: tensor.numpy() for name, tensor in feed.items()}
        feed |= {entry.name: past for entry, past in zip(self.cache_inputs, self.past)}
        logits, *self.past = self.session.run(None, feed)
        return torch.from_numpy(logits)


@torch.no_grad()
def largest_difference(model, folder, rows=3, length=7, steps=5, seed=0):
    """Largest absolute difference of the logits at real tokens between `model` and the graph in `folder`.

    A prompt of random tokens, row r with r of them padding on the left, then `steps` tokens one by one, each the
    model's likeliest. The model decodes with the library's cache and masks, the graph with its own.
    -> (prefill, decoding) differences; NaN where either has one.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
    mask = (torch.arange(length) >= torch.arange(rows)[:, None] % length).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    decoder, cache, differences, real = OnnxDecoder(folder), None, [], mask.bool()
    for _ in range(steps + 1):
        theirs = decoder(ids, mask, positions)
        ours = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = ours.past_key_values
        differences.append((theirs - ours.logits)[real].abs().max())
        ids = ours.logits[:, -1:].argmax(-1)
        mask, positions = torch.cat((mask, torch.ones_like(ids)), 1), positions[:, -1:] + 1
        real = torch.ones_like(ids, dtype=torch.bool)
    return differences[0].item(), torch.stack(differences[1:]).max().item()


def export(source, target, tolerance=1e-3):
    """Writes the language model in folder `source` as the ONNX folder `target`; all of it or nothing.

    Returns the largest absolute differences of the logits (prefill, decoding) between the two. Raises FileExistsError
    if `target` exists, ImportError without the packages, ValueError if the model cannot be exported, or if the graph's
    logits are further than `tolerance` from the model's.
    """
    onnx, _ = onnx_packages()
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or name another folder")
    model = DeepSeekR1ForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    check_exportable(model.config)
    implementations = model.config._attn_implementation, model.config._experts_implementation
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as partial:
        partial = Path(partial) / "out"
        partial.mkdir()
        write_graph(model, partial / MODEL)
        onnx.checker.check_model(str(partial / MODEL))
        model.set_attn_implementation(implementations[0])
        model.set_experts_implementation(implementations[1])
        differences = largest_difference(model, partial)
        if not all(difference <= tolerance for difference in differences):  # NaN is none of both
            raise ValueError(
                f"the graph's logits differ from the model's by {differences[0]:.3g} (prefill) and "
                f"{differences[1]:.3g} (decoding), not <= tolerance={tolerance}; a larger --tolerance accepts it, if "
                "logits of this model are that imprecise in float32"
            )
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        partial.rename(target)
    return differences


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_deepseek_r1.onnx_export", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="FOLDER", help="a folder of a DeepSeek-R1 or deepseek_v3 language model")
    parser.add_argument("target", metavar="OUT", help="the folder to make")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of logits (default 1e-3)")
    args = parser.parse_args(argv)
    try:
        prefill, decoding = export(args.source, args.target, args.tolerance)
    except (ImportError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in Path(args.target).iterdir()) / 2**20
    print(f"{args.target}: {size:.1f} MiB; largest difference of logits: prefill {prefill:.2e}, "
          f"5 decoding steps {decoding:.2e}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
