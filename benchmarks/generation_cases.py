"""What `bench_generate.py` measures: sizes, models and the cases, each a function of a `Bench` that yields results.

A decoding time is the difference of two calls of `model.generate` with different numbers of new tokens, over that
difference: prompts, compilation and recording drop out. Every prompt of a batch is different.
"""

import statistics
import time
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.bench_train import REFERENCE, library_model, our_model
from benchmarks.generation_profile import bytes_of_a_step, decode_profile, experts_crossover, experts_touched
from modeling_deepseek_r1 import DeepSeekR1Config, DeepSeekR1ForCausalLM
from recipes.sizing import count_parameters, device_peak_flops, flops_per_token

SHORT = 8   # new tokens of the shorter of two calls

# PEERS.md's row for 2 CPU cores gives hidden size, layers and dtype; the other fields are chosen so that the library's
# times have the same shape: about half its time at a context of 256 grows with the context.
CPU_SMALL = dict(
    vocab_size=4096, hidden_size=512, intermediate_size=1536, moe_intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=8, n_shared_experts=1, n_routed_experts=16, num_experts_per_tok=4, kv_lora_rank=256,
    q_lora_rank=None, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64, n_group=1, topk_group=1,
    first_k_dense_replace=1, routed_scaling_factor=2.5, max_position_embeddings=8192,
    pad_token_id=0, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
TOY = CPU_SMALL | dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16,
)  # fmt: skip
FIELDS = {"reference": REFERENCE | dict(max_position_embeddings=65536), "cpu": CPU_SMALL, "toy": TOY}


@dataclass
class Bench:
    """One run: the two models of one size with the same weights, each built at its first use.

    Attributes:
        size: a name of `FIELDS`. repeats: timed calls, of which the median counts. shrink: divides contexts, batches
            and numbers of requests (for tests). model: folder of a trained model, for the `mtp` case.
    """

    size: str
    device: str
    dtype: torch.dtype
    repeats: int = 3
    shrink: int = 1
    model: str | None = None
    cache_dtype: str = "auto"
    profile: bool = False
    built: dict = field(default_factory=dict)

    @property
    def fields(self):
        return FIELDS[self.size]

    @property
    def ours(self):
        if "ours" not in self.built:
            torch.manual_seed(0)
            with torch.device(self.device):
                self.built["ours"] = our_model(self.fields).to(self.dtype).eval()
            self.built["ours"].decoding.cache_dtype = self.cache_dtype
        return self.built["ours"]

    @property
    def library(self):
        """The library's class over the very same tensors."""
        if "library" not in self.built:
            with torch.device("meta"):
                theirs = library_model(self.fields).to(self.dtype)
            missing = theirs.load_state_dict(self.ours.state_dict(), assign=True)
            assert not missing.missing_keys and not missing.unexpected_keys, missing
            with torch.device(self.device):  # its buffers of rotary frequencies are in no state dict
                theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
            self.built["library"] = theirs.eval()
        return self.built["library"]

    def scaled(self, number, least=1):
        return max(number // self.shrink, least)

    def prompts(self, rows, width, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, self.fields["vocab_size"], (rows, width), generator=generator).to(self.device)

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call):
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def median(self, call):
        return statistics.median(self.seconds(call) for _ in range(self.repeats))

    def start_memory(self):
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self):
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None


def generate(model, ids, tokens, **settings):
    settings = {"do_sample": False, "pad_token_id": 0} | settings
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **settings
    )


def through_generate(bench, model, batch, context, tokens, **settings):
    """Decoding of `batch` prompts of `context` tokens, `tokens` new ones against `SHORT`."""
    ids = bench.prompts(batch, context)
    bench.start_memory()
    first = bench.seconds(lambda: generate(model, ids, tokens, **settings))
    generate(model, ids, SHORT, **settings)
    long = bench.median(lambda: generate(model, ids, tokens, **settings))
    short = bench.median(lambda: generate(model, ids, SHORT, **settings))
    step = (long - short) / (tokens - SHORT)
    return {
        "ms_per_token": step * 1e3, "tokens_per_second": batch / step, "first_call_s": first, "call_s": long,
        "peak_gib": bench.peak_gib(),
    }  # fmt: skip


def forward_loop(bench, model, batch, context, experts=None):
    """One token a forward pass over the library's DynamicCache, filled with random numbers."""
    if experts:
        model.set_experts_implementation(experts)
    config = model.config
    bench.start_memory()
    cache, random = DynamicCache(config=config), {"device": bench.device, "dtype": bench.dtype}
    for layer in range(config.num_hidden_layers):
        cache.update(
            torch.randn(batch, 1, context, config.kv_lora_rank, **random),
            torch.randn(batch, 1, context, config.qk_rope_head_dim, **random),
            layer,
        )
    token = bench.prompts(batch, 1)

    @torch.inference_mode()
    def step():
        model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    for _ in range(3):
        step()
    seconds = statistics.median(bench.seconds(step) for _ in range(3 * bench.repeats))
    return {
        "ms_per_token": seconds * 1e3, "tokens_per_second": batch / seconds, "peak_gib": bench.peak_gib(),
    }  # fmt: skip


# ---------------------------------------------------------------- decoding

# name: (batch, context, tokens of the longer call, peer: "static" generate or "loop" of forward passes)
DECODE = {
    "b1-1k": (1, 1024, 520, "static"), "b1-16k": (1, 16384, 520, "loop"), "b1-48k": (1, 49152, 520, "loop"),
    "b32-1k": (32, 1024, 264, "static"), "b32-8k": (32, 8192, 264, "loop"),
}  # fmt: skip


def decode(bench, who, name):
    batch, context, tokens, peer = DECODE[name]
    context, tokens = bench.scaled(context, 16), max(bench.scaled(tokens), SHORT + 4)
    if who == "library" and peer == "loop":
        errors = {}
        for experts in ("batched_mm", "grouped_mm"):
            try:
                result = forward_loop(bench, bench.library, batch, context, experts)
                yield {"how": f"forward loop, {experts}", **result, "failed": errors or None}
                return
            except torch.OutOfMemoryError as error:
                errors[experts] = str(error)[:150]
                bench.start_memory()
        raise RuntimeError(f"out of memory both ways: {errors}")
    if who == "library":
        bench.library.set_experts_implementation("grouped_mm")
        torch._dynamo.reset()
        result = through_generate(bench, bench.library, batch, context, tokens, cache_implementation="static")
        yield {"how": "generate, static cache, grouped_mm", **result}
        return
    result = through_generate(bench, bench.ours, batch, context, tokens)
    touched = experts_touched(bench.ours, bench.prompts(batch, 1))
    read = bytes_of_a_step(bench.ours, batch, context + tokens // 2, touched)
    seconds = result["ms_per_token"] / 1e3
    yield {"how": "generate", **result, "experts_touched": touched, "read_gb": read / 1e9,
           "read_tb_per_second": read / seconds / 1e12}  # fmt: skip
    if bench.profile:
        yield from decode_profile(bench.ours, bench.prompts(batch, 1), context, bench.dtype)


# ---------------------------------------------------------------- rollouts, prefill, requests of any length


def rollouts(bench, who, name):
    """Sampling for many prompts; ours again after an in-place update of all weights."""
    rows, width, tokens = bench.scaled(256, 2), bench.scaled(128, 8), bench.scaled(256, 8)
    ids, model = bench.prompts(rows, width), bench.library if who == "library" else bench.ours
    if who == "library":
        model.set_experts_implementation("grouped_mm")
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": None}

    def call():
        torch.manual_seed(0)
        generate(model, ids, tokens, **settings)

    def line(how, seconds):
        return {"how": how, "tokens_per_second": rows * tokens / seconds, "call_s": seconds,
                "peak_gib": bench.peak_gib()}  # fmt: skip

    bench.start_memory()
    yield line("first call", bench.seconds(call))
    yield line("again", bench.median(call) if who == "ours" else bench.seconds(call))
    if who == "ours":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
        yield line("first call after an update", bench.seconds(call))


def forward_flops(bench, length):
    """FLOPs of a token's forward pass without the head, which a prefill makes for one position only."""
    config = DeepSeekR1Config(**bench.fields, num_nextn_predict_layers=0)
    parameters = count_parameters(config)
    return flops_per_token(config, length, parameters) / 3 - 2 * parameters.head


def prefill(bench, who, name):
    """A long prompt through `generate`, beside the training forward (no gradients, no head) in the same run."""
    peak, _ = device_peak_flops(bench.device)
    length, model = bench.scaled(16384, 32), bench.library if who == "library" else bench.ours
    if who == "library":
        model.set_experts_implementation("grouped_mm")
    batch, width = (4, bench.scaled(4096, 16))

    @torch.no_grad()
    def forward(ids=bench.prompts(batch, width)):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    calls = {
        f"generate, one token after {length}": (lambda: generate(model, bench.prompts(1, length), 1), length, length),
        f"forward pass, {batch} x {width}": (forward, batch * width, width),
        f"generate, one token after {width // 4}": (
            lambda: generate(model, bench.prompts(1, width // 4), 1), width // 4, width // 4
        ),
    }
    first = None
    for how, (call, tokens, context) in calls.items():
        bench.start_memory()
        call()
        seconds = bench.median(call)
        mfu = 100 * forward_flops(bench, context) * tokens / seconds / peak
        first = mfu if first is None else first
        yield {"how": how, "tokens_per_second": tokens / seconds, "call_s": seconds, "mfu_percent": mfu,
               "prefill_over_forward": None if first is mfu else first / mfu, "peak_gib": bench.peak_gib()}  # fmt: skip


def requests(bench, who, name):
    """`generate_batch` over prompts and answers of random lengths."""
    generator = torch.Generator().manual_seed(3)
    count, longest = bench.scaled(512, 6), bench.scaled(1024, 12)
    lengths = torch.randint(4, longest, (count,), generator=generator).tolist()
    inputs = [bench.prompts(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    tokens, model = bench.scaled(256, 6), bench.library if who == "library" else bench.ours
    config = GenerationConfig(max_new_tokens=tokens, do_sample=True, temperature=1.0, pad_token_id=0, eos_token_id=1)
    if who == "library":
        model.set_attn_implementation("paged|sdpa")
    outputs = {}

    def call():
        outputs.update(model.generate_batch(inputs=inputs, generation_config=config))

    try:
        bench.start_memory()
        for how in ("first call", "again"):
            seconds = bench.seconds(call)
            new = [len(output.generated_tokens) for output in outputs.values()]
            if len(new) != count or not all(new):
                errors = sorted({str(output.error) for output in outputs.values() if output.error})
                raise RuntimeError(f"{sum(map(bool, new))} of {count} requests were answered; errors: {errors[:2]}")
            yield {"how": how, "tokens_per_second": sum(new) / seconds, "call_s": seconds, "requests": count,
                   "peak_gib": bench.peak_gib()}  # fmt: skip
    finally:
        if who == "library":
            model.set_attn_implementation("sdpa")


# ---------------------------------------------------------------- the cache, exactness, drafts


def cache_bytes(bench, who, name):
    """Bytes of the cache of one token in one layer."""
    config = bench.ours.config
    if who == "library":
        cache = DynamicCache(config=bench.library.config)
        with torch.no_grad():
            bench.library(input_ids=bench.prompts(1, 16), past_key_values=cache, use_cache=True)
        layer = cache.layers[0]
        yield {"how": "default cache", "bytes": (layer.keys.nbytes + layer.values.nbytes) // 16}
        return
    from modeling_deepseek_r1.decoding_cache import LatentCache

    for kind in ("auto", "fp8") if config.kv_lora_rank % 128 == 0 else ("auto",):
        cache = LatentCache(config, 1, 1, 64, bench.dtype, bench.device, fp8=kind == "fp8")
        yield {"how": f"cache_dtype={kind}", "bytes": cache.buffers[0].nbytes // (cache.cache_rows * cache.capacity)}


def relative_error(found, wanted):
    found, wanted = found.float(), wanted.float()
    return float((found - wanted).norm() / wanted.norm())


def exact(bench, who, name):
    """Greedy tokens of both classes, and the absorbed step after a long context against the expanded forward."""
    if who == "library":
        return
    ids, new = bench.prompts(8, bench.scaled(256, 16)), 16
    pair = [generate(model, ids, new)[:, ids.shape[1]:] for model in (bench.ours, bench.library)]
    same = (pair[0] == pair[1]).float()
    yield {"how": f"greedy, 8 prompts, {new} tokens, ours = library", "share_equal": float(same.mean()),
           "equal_before_the_first_difference": float(same.cumprod(-1).mean())}  # fmt: skip
    ids = bench.prompts(1, bench.scaled(32768, 64), seed=5)
    output = generate(bench.ours, ids, 2, output_logits=True, return_dict_in_generate=True)
    absorbed, ids = output.logits[1][0].clone(), output.sequences[:, : ids.shape[1] + 1]
    with torch.no_grad():
        expanded = bench.ours(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        yield {"how": f"logits after {ids.shape[1]} tokens, absorbed against expanded",
               "relative_error": relative_error(absorbed, expanded)}  # fmt: skip
        precise = our_model(bench.fields).to(bench.device)
        precise.load_state_dict(bench.ours.state_dict())
        wanted = precise.eval()(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    for how, logits in {"absorbed": absorbed, "expanded": expanded}.items():
        yield {"how": f"the same, {how} against fp32", "relative_error": relative_error(logits, wanted)}


def experts(bench, who, name):
    """Where the experts' decoding kernels stop being faster than the grouped matmul of training and prefill."""
    if who == "ours":
        yield from experts_crossover(bench.ours, (1, 4, 8, 32, 128, 256, 512, 1024, 2048, 4096))


TEXTS = (
    "Janet has 3 apples and buys 4 more. How many apples does she have?",
    "Write a function that returns the larger of two numbers.",
    "The history of the steam engine begins",
    "Once upon a time there was",
    "Solve for x: 2x + 6 = 14.",
    "Question: how many legs do 5 dogs and 2 birds have?",
    "def fibonacci(n):",
    "It was a bright cold day and",
)


def mtp(bench, who, name):
    """Drafting with the MTP layers of a trained model, greedy, batch 1, over `TEXTS`; reading the prompts drops out of
    the times as in the decoding cases."""
    if who == "library":
        return
    if bench.model is None:
        raise ValueError("model=None: the mtp case needs a trained model with MTP layers; give --model FOLDER")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    model = DeepSeekR1ForCausalLM.from_pretrained(bench.model, dtype=bench.dtype).to(bench.device).eval()
    prompts = [mtp_prompt(tokenizer, text).to(bench.device) for text in TEXTS]
    room = model.config.max_position_embeddings - max(ids.shape[1] for ids in prompts)
    tokens, outputs, plain = min(bench.scaled(264, SHORT + 4), room), {}, None
    for drafts in (0, 1, 2, 3):
        model.decoding.drafts = max(drafts, 1)
        settings = {"use_mtp": True} if drafts else {}

        def call(new):
            found = [(generate(model, ids, new, **settings), dict(model.decoding_statistics)) for ids in prompts]
            outputs[drafts] = [tokens for tokens, _ in found]
            return {key: sum(counts.get(key, 0) for _, counts in found) for key in ("drafted", "accepted", "steps")}

        call(SHORT)
        counted = call(tokens)
        long = bench.median(lambda: call(tokens))
        seconds = long - bench.median(lambda: call(SHORT))
        call(tokens)
        new = (tokens - SHORT) * len(prompts)
        plain = plain or new / seconds
        line = {"how": f"{drafts} drafts" if drafts else "no drafts", "tokens_per_second": new / seconds,
                "ms_per_token": 1e3 * seconds / new, "call_s": long / len(prompts)}  # fmt: skip
        if drafts:
            pairs = list(zip(outputs[0], outputs[drafts]))
            line |= {"times_no_drafts": new / seconds / plain, "steps": counted["steps"],
                     "acceptance": counted["accepted"] / max(counted["drafted"], 1),
                     "equal_outputs": f"{sum(torch.equal(*pair) for pair in pairs)} of {len(pairs)}"}  # fmt: skip
        yield line


def mtp_prompt(tokenizer, text):
    """(1, S) ids of a text, as a user's turn where the model knows a conversation's form."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                             tokenize=False)  # fmt: skip
    return tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids


# ---------------------------------------------------------------- a CPU


class TokenClock(BaseStreamer):
    """Times between the tokens of one `generate` call."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def token_ms(self):
        """Median, without the prompt, the first token (after it) and a step that warms up."""
        gaps = [b - a for a, b in zip(self.times[2:], self.times[3:])]
        return statistics.median(gaps) * 1e3


def cpu(bench, who, name):
    """Batch 1 at three contexts, ours and the library's calls in turn, times between tokens."""
    if who == "library":
        return  # measured in turn with ours
    models = {"ours": bench.ours, "library": bench.library}
    for context in (256, 1024, 4096):
        ids, times = bench.prompts(1, bench.scaled(context, 8)), {"ours": [], "library": []}
        for _ in range(bench.repeats):
            for label, model in models.items():
                clock = TokenClock()
                generate(model, ids, 32 if label == "ours" else 16, streamer=clock)
                times[label].append(clock.token_ms())
        ratio = statistics.median(a / b for a, b in zip(times["library"], times["ours"]))
        yield {"how": f"generate, context {context}", "ms_per_token": statistics.median(times["ours"]),
               "library_ms": statistics.median(times["library"]), "library_over_ours": ratio}  # fmt: skip
        loops = {label: [] for label in models}
        for _ in range(bench.repeats):
            for label, model in models.items():
                loops[label].append(forward_loop(bench, model, 1, ids.shape[1])["ms_per_token"])
        ratio = statistics.median(a / b for a, b in zip(loops["library"], loops["ours"]))
        yield {"how": f"forward with DynamicCache, {context}", "ms_per_token": statistics.median(loops["ours"]),
               "library_ms": statistics.median(loops["library"]), "library_over_ours": ratio}  # fmt: skip


# Every entry: function(bench, "ours" or "library", name of the case), a generator of dicts.
CASES = {name: decode for name in DECODE} | {
    "rollouts": rollouts, "prefill": prefill, "cache": cache_bytes, "requests": requests, "exact": exact,
    "experts": experts, "mtp": mtp, "cpu": cpu,
}  # fmt: skip
