"""What a model keeps from one `generate` to the next: the step it decodes by, and CUDA graphs of it.

A graph depends on the batch size, the tokens a step gives each row, and how tokens are chosen; never on lengths, on
the cache's place or size, or on the numbers in the generation config. Weights are read where they lie, so that an
optimizer may change them in place; when they have moved, or other adapters act, the graphs are recorded anew.

The model owns the engine, which points back weakly: otherwise `del model` would free no memory before the next
garbage collection.
"""

import logging
import threading
import weakref

import torch

from .decoding_cache import LatentCache
from .decoding_step import ModuleStep, StepInputs
from .linear_weights import is_plain

try:
    import triton
except ImportError:
    triton = None
else:
    from .decoding_fused import KernelStep

logger = logging.getLogger(__name__)

# Batches are filled up to one of these sizes, so that few graphs serve all.
SIZES = (*range(1, 9), 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256)


def batch_size_for(rows):
    """The smallest recorded size that holds `rows`; beyond the list, multiples of 64."""
    return next((size for size in SIZES if size >= rows), -(-rows // 64) * 64)


def adapter_state(model):
    """What decides which of PEFT's adapters act, and how strongly; hashable."""
    fields = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
    adapted = [vars(module) for module in model.modules() if "_disable_adapters" in vars(module)]
    return tuple(tuple(str(found.get(field)) for field in fields) for found in adapted)


class CallLock:
    """A re-entrant lock on a model that may still be copied and pickled: the copy gets one of its own."""

    def __init__(self):
        self.lock = threading.RLock()

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()

    def __deepcopy__(self, memo):
        return CallLock()

    def __reduce__(self):
        return (CallLock, ())


class StepBatch:
    """Static tensors of one batch size, and the step over them.

    Shapes (B rows, S new tokens a row): tokens (B, S) int64; lengths (B,) int32, tokens in the cache before the step;
    rows (B,) int32, cache rows; finished (B,) bool. `outputs` holds what the body returned at its last run.
    """

    def __init__(self, engine, size, steps):
        device = engine.device
        self.engine, self.size, self.steps = weakref.proxy(engine), size, steps
        self.tokens = torch.zeros(size, steps, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(size, dtype=torch.int32, device=device)
        self.rows = torch.zeros(size, dtype=torch.int32, device=device)
        self.finished = torch.ones(size, dtype=torch.bool, device=device)
        self.extra, self.body, self.graph, self.outputs = {}, None, None, None

    def inputs(self, routes=None):
        return StepInputs(self.engine.cache, self.lengths, self.rows, self.steps, routes)

    def idle(self):
        """Every row as padding: it writes to the cache's scratch row."""
        self.tokens.zero_()
        self.lengths.zero_()
        self.rows.fill_(self.engine.cache.scratch_row)
        self.finished.fill_(True)

    def load(self, tokens, lengths, rows, finished=None):
        """Sets the first rows of the batch; the rest is padding."""
        self.idle()
        count = len(rows)
        self.tokens[:count] = tokens.view(count, -1)
        self.lengths[:count] = torch.as_tensor(lengths, dtype=torch.int32).to(self.lengths.device)
        self.rows[:count] = torch.as_tensor(rows, dtype=torch.int32).to(self.rows.device)
        self.finished[:count] = False if finished is None else finished

    def record(self, body):
        """Sets what `run` does: `body(batch)`, as a CUDA graph where the engine records graphs."""
        self.body = body
        if not self.engine.records:
            return
        self.idle()
        state = torch.cuda.get_rng_state(self.engine.device)
        stream = torch.cuda.Stream(self.engine.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and lets libraries allocate; neither may happen while recording
                body(self)
        torch.cuda.current_stream().wait_stream(stream)
        self.idle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.engine.pool):
                self.outputs = body(self)
            self.graph = graph
        except RuntimeError as error:  # a layer that waits for the host, for instance
            logger.warning("decoding without a CUDA graph, which is slower: %s", str(error).splitlines()[0])
        torch.cuda.set_rng_state(state, self.engine.device)

    def run(self):
        if self.graph is None:
            self.outputs = self.body(self)
        else:
            self.graph.replay()
        return self.outputs


class DecodingEngine:
    """Steps, graphs and the table of the cache, of one model. `busy`: while a call decodes."""

    def __init__(self, model):
        self.owner, self.options, self.busy = weakref.ref(model), model.decoding, False
        self.device = model.model.embed_tokens.weight.device
        layers = len(model.model.layers)
        self.table = torch.zeros(layers + 1, dtype=torch.int64, device=self.device)
        self.cache, self.step, self.step_key, self.batches, self.pool = None, None, None, {}, None

    def __deepcopy__(self, memo):
        return None  # graphs and buffers belong to this very model; a copy makes its own

    def __reduce__(self):
        return (type(None), ())

    @property
    def model(self):
        return self.owner()

    @property
    def records(self):
        return self.step.kernels and self.options.graphs and self.device.type == "cuda"

    def open(self, dtype, cache_rows, capacity):
        """A new cache for `cache_rows` rows, and the step that reads it."""
        self.prepare(dtype)
        config = self.model.config
        fp8 = self.options.cache_dtype == "fp8"
        layers = len(self.model.model.layers)
        self.cache = LatentCache(config, layers, cache_rows, capacity, dtype, self.device, fp8, self.table)
        return self.cache

    @torch.no_grad()
    def prepare(self, dtype):
        """Chooses the step, or keeps it, and reads what is derived from the weights."""
        options = self.options
        key = (dtype, options.kernels, options.graphs, options.cache_dtype, options.record_routes,
               options.record_log_probs and options.log_prob_temperature, self.addresses(), adapter_state(self.model),
               tuple(is_plain(layer.self_attn.kv_b_proj) for layer in self.model.model.layers))
        if key != self.step_key:
            self.batches, self.pool, self.step_key = {}, None, key
            served = triton is not None and KernelStep.serves(self.model, dtype, options)
            self.step = (KernelStep if served else ModuleStep)(self.model, dtype, options)
            if self.records:
                self.pool = torch.cuda.graph_pool_handle()
        self.step.refresh()

    def addresses(self):
        """Where weights and buffers lie and which modules hold them: what a graph has to be recorded anew for."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        # A set: PEFT's adapters on parameters take these out and put them back in another order.
        return frozenset((name, tensor.data_ptr(), tensor.dtype) for name, tensor in named)

    def outdated(self):
        """Whether weights have moved since the step was made, which keeps the memory where they lay."""
        return self.step_key is not None and self.addresses() not in self.step_key

    def batch(self, rows, steps, kind, make_body):
        """The StepBatch for `rows` rows; `kind` names what its body does, `make_body(batch)` returns the body."""
        size = batch_size_for(rows) if self.records else rows
        key = (size, steps, kind)
        if not self.records:
            batch = StepBatch(self, size, steps)
            batch.record(make_body(batch))
            return batch
        if key not in self.batches:
            batch = StepBatch(self, size, steps)
            batch.record(make_body(batch))
            self.batches[key] = batch
        return self.batches[key]

    def close(self):
        """Lets go of the cache; graphs stay."""
        self.cache, self.busy = None, False
