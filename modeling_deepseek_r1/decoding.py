"""The fast path inside `model.generate`: greedy search and sampling over the latent cache.

`generate` calls `_sample` for both; the class's own method is looked up there, so that plain `generate`, pipelines,
PEFT and TRL's trainers all come here. What is not served goes to the library's loop, with one message that says why:
the steps do not call every module, drop rows that have finished and read a repeated prompt once, so that whatever
listens at modules (hooks, a changed `forward`) or comes with one entry per row would see something else.
"""

import contextlib
import inspect
import logging

import torch
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import DeepSeekR1LatentAttention
from .decoding_batch import run_batch
from .decoding_engine import CallLock, DecodingEngine
from .decoding_loop import DecodingLoop
from .decoding_mtp import MTPDecodingLoop
from .decoding_options import DecodingOptions
from .decoding_requests import batch_config
from .decoding_sampling import split_criteria
from .linear_weights import is_intercepted

logger = logging.getLogger(__name__)
_told = set()

SERVED_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
# Their frequencies depend on how long the longest sequence of a call is.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Methods by which a subclass changes what a step computes; the steps go past them.
PASSED_METHODS = ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


def tell_once(message):
    if message not in _told:
        _told.add(message)
        logger.warning(message)


@contextlib.contextmanager
def evaluating(model):
    """Every module in evaluation mode meanwhile: trainers sample from models in training mode, where dropout would
    act and checkpointing would turn the cache off."""
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def sharded(model):
    """The name of a parameter that lies on several processes, or None. ZeRO-3 leaves an empty one until it gathers."""
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or not parameter.numel():
            return name
    return None


def gathered(model):
    """Whether ZeRO-3 has spread the model and gathered it again, as trainers do around `generate`."""
    return sharded(model) is None and any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def changed_method(model):
    """The name of a method that a subclass, or the instance itself, has of its own and a step would not call, or None.

    Wrappers of `forward` that say what they wrap (functools.wraps) are no change: accelerate's autocast, TRL's head.
    """
    own = next(kind for kind in type(model).__mro__ if FastGenerationMixin in kind.__bases__)
    for name in PASSED_METHODS:
        method = vars(model).get(name, getattr(type(model), name))
        if inspect.unwrap(getattr(method, "__func__", method)) is not inspect.unwrap(getattr(own, name)):
            return name
    return None


def changed_module(model):
    """Why the modules are not those that a step computes: a message, or None."""
    for name, module in model.named_modules():
        if module is not model and is_intercepted(module, trained=False):
            return f"{name} has hooks or a forward of its own"
    hooks = (*model._forward_hooks.values(), *model._forward_pre_hooks.values())
    # DeepSpeed's on the whole model keep its books; those by which it gathers parameters are on the modules, too.
    if any(not str(getattr(hook, "__module__", "")).startswith("deepspeed.") for hook in hooks):
        return "the model has hooks"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are forward hooks on all modules"
    for index, layer in enumerate(model.model.layers):
        if type(layer.self_attn) is not DeepSeekR1LatentAttention:
            return f"layer {index} has a {type(layer.self_attn).__name__}, which has no absorbed form here"
        if any(part.split(".")[-1] == "bias" for part, _ in layer.self_attn.kv_b_proj.named_parameters()):
            return f"kv_b_proj of layer {index} has a bias"
    name = model.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if function is not None and "/" not in name and not function.__module__.startswith("transformers."):
        return f"attn_implementation={name!r} is registered by the caller"
    return None


def left_padding(input_ids, attention_mask, position_ids):
    """Whether the mask is left padding (or none) and the positions are those that `generate` gives by itself."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape or not input_ids.numel():
        return False
    real = attention_mask.bool()
    regular = (real[:, 1:] >= real[:, :-1]).all() & real[:, -1].all()
    if position_ids is not None:
        expected = attention_mask.long().cumsum(-1) - 1
        if position_ids.shape[-1] != expected.shape[-1]:
            return False
        regular = regular & ((position_ids.expand_as(expected) == expected) | ~real).all()
    return bool(regular)


class FastGenerationMixin:
    """Overrides of transformers' `GenerationMixin` that decode over the latent cache."""

    @property
    def decoding(self):
        """Settings of the fast path: see `DecodingOptions`."""
        if "_decoding" not in self.__dict__:
            self.__dict__["_decoding"] = DecodingOptions()
        return self.__dict__["_decoding"]

    @decoding.setter
    def decoding(self, options):
        if not isinstance(options, DecodingOptions):
            raise ValueError(f"decoding={options!r} must be a DecodingOptions; or set one of its fields, as in "
                             "model.decoding.enabled = False")
        self.__dict__["_decoding"] = options
        self.__dict__.pop("_decoding_engine", None)

    @property
    def decoding_engine(self):
        """Step and graphs of this model; made at first use, made anew on another device and for a shallow copy."""
        engine = self.__dict__.get("_decoding_engine")
        if engine is None or engine.model is not self or engine.device != self.model.embed_tokens.weight.device:
            engine = self.__dict__["_decoding_engine"] = DecodingEngine(self)
        return engine

    def _apply(self, fn, recurse=True):
        """Also what `to`, `cpu` and `half` call: lets go of the memory in which weights lay that have moved."""
        super()._apply(fn, recurse)
        engine = self.__dict__.get("_decoding_engine")
        if engine is not None and not engine.busy and engine.outdated():
            del self.__dict__["_decoding_engine"]
        return self

    @contextlib.contextmanager
    def _decoding_turn(self):
        """What a call runs in. Calls of several threads take turns; one from within another, as in a streamer that
        generates, has an engine of its own. Tensors made here outlive the call, so none is an inference tensor."""
        lock = self.__dict__.setdefault("_decoding_lock", CallLock())
        with lock, evaluating(self), torch.inference_mode(False), torch.no_grad():
            outer = self.__dict__.get("_decoding_engine")
            if outer is not None and outer.busy:
                del self.__dict__["_decoding_engine"]
            engine = self.decoding_engine
            engine.busy, self.__dict__["_decoding_record"] = True, None
            try:
                yield
            finally:
                engine.close()
                if outer is not None and outer.busy:
                    self.__dict__["_decoding_engine"] = outer

    @contextlib.contextmanager
    def _library_turn(self):
        """What the library's loop runs in."""
        with self.__dict__.setdefault("_decoding_lock", CallLock()), evaluating(self):
            self.__dict__["_decoding_record"] = None
            yield

    @property
    def decoding_record(self):
        """What the last `generate` kept besides its tokens: a `DecodingRecord`; see `DecodingOptions`. None if nothing
        was asked for, or the library's loop decoded."""
        return self.__dict__.get("_decoding_record")

    def decoding_refusal(self, input_ids, generation_config, synced_gpus, model_kwargs):
        """Why the fast path cannot serve a call of `_sample`: a message, "" to be silent, or None where it can."""
        config, cache = self.config, model_kwargs.get("past_key_values")
        if not self.decoding.enabled or generation_config.use_cache is False:
            return ""
        unknown = sorted(k for k, v in model_kwargs.items() if v is not None and k not in SERVED_INPUTS)
        if unknown:
            return f"it takes no {', '.join(unknown)}"
        if getattr(cache, "_is_user_defined", False) or type(cache) not in (DynamicCache, StaticCache, type(None)):
            return f"it keeps its own cache, and {type(cache).__name__} was given or asked for"
        if generation_config.cache_implementation == "offloaded":
            return "it keeps its cache on the device, and an offloaded one was asked for"
        if generation_config.output_attentions or generation_config.output_hidden_states:
            return "it returns neither attentions nor hidden states"
        # The library asks for steps in common wherever ZeRO-3 is on; a gathered model takes its own.
        if sharded(self) or synced_gpus and not gathered(self):
            return "the parameters are sharded over processes"
        changed = changed_method(self)
        if changed is not None:
            return f"{type(self).__name__}.{changed} is not this package's"
        changed = changed_module(self)
        if changed is not None:
            return changed
        if self.model.embed_tokens.weight.device.type == "meta":
            raise ValueError("the weights are on the meta device and have no values; load them with from_pretrained, "
                             "or fill them after model.to_empty(device=...), before generating")
        if any(kind != "latent" for kind in config.attention_types or ()):
            return f"attention_types={config.attention_types} has kinds without an absorbed form"
        if config.rope_parameters.get("rope_type", "default") in LENGTH_DEPENDENT_ROPE:
            return f"rope_type={config.rope_parameters['rope_type']!r} changes its frequencies with the length"
        if not left_padding(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")):
            return "the prompts are not left-padded, or have positions of their own"
        return None

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False,
                streamer=None, **model_kwargs):
        """Greedy search and sampling, as the library's method of this name; see there for the arguments."""
        refusal = self.decoding_refusal(input_ids, generation_config, synced_gpus, model_kwargs)
        max_length, end_tokens, criteria = split_criteria(stopping_criteria)
        if refusal is None and max_length is None:
            refusal = "there is no max_length"
        if refusal is not None:
            if refusal:
                tell_once(f"{type(self).__name__} decodes by the library's loop: {refusal}")
            with self._library_turn():
                return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config,
                                       synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        max_length = max(max_length, input_ids.shape[1] + 1)  # one token at least, as in the library
        with self._decoding_turn():
            return DecodingLoop(self, input_ids, model_kwargs.get("attention_mask"), logits_processor, criteria,
                                generation_config, max_length, end_tokens, streamer).run()

    def _beam_search(self, input_ids, *args, **kwargs):
        """The library's, which says so once: its beams reorder a cache at every step."""
        if self.decoding.enabled:
            tell_once(f"{type(self).__name__} decodes by the library's loop: it searches no beams")
        with self._library_turn():
            return super()._beam_search(input_ids, *args, **kwargs)

    def generate_batch(self, inputs, generation_config=None, continuous_batching_config=None, record_timestamps=False,
                       progress_bar=False, persistent_manager=False, warmup=True, **kwargs):
        """Generates for many prompts at once, in bounded memory, as the library's method of this name.

        Args:
            inputs: list of lists of token ids, of any lengths.
            generation_config: greedy search or sampling; like the library's method it takes nothing but the end token
                from the model's own. Without max_new_tokens and max_length only max_position_embeddings limits.
            continuous_batching_config: see `decoding_requests.check_library_config` for what acts here.
            record_timestamps: keep when the host received each token (they come in blocks).
            persistent_manager, warmup: nothing to keep or to warm up: graphs stay with the model as it is.
            **kwargs: fields of the generation config, such as max_new_tokens.
        Returns:
            {request id: the library's GenerationOutput}, in the order of the inputs; end tokens are among
            `generated_tokens`, `logprobs` are filled with `decoding.record_log_probs` (before any processor) or with
            `return_logprobs` of the library's config (after them).
        Raises:
            ValueError: before anything runs, for what is not served and for requests that are empty or too long.
        """
        if not inputs:
            return {}
        config = generation_config or self.generation_config
        refusal = self.decoding_refusal(torch.zeros(1, 1, dtype=torch.int64), config, False, {})
        if refusal is not None:
            if refusal:
                tell_once(f"{type(self).__name__} batches by the library's method: {refusal}")
            return super().generate_batch(
                inputs, generation_config, continuous_batching_config, record_timestamps, progress_bar,
                persistent_manager, warmup, **kwargs,
            )  # fmt: skip
        config = batch_config(self, generation_config, kwargs)
        with self._decoding_turn():
            return run_batch(self, inputs, config, continuous_batching_config, record_timestamps, progress_bar)

    @property
    def decoding_statistics(self):
        """What drafting did in the last `generate(..., use_mtp=True)`, {} before any.

        steps: of the batch; drafted, accepted: drafts of unfinished rows, without those that the longest length left no
        room for, and those of them that became tokens; tokens: what the steps gave, the first of each row comes from
        its prompt; acceptance: accepted / drafted, and acceptance_by_depth for each draft of a step; tokens_per_step:
        tokens a step gave an unfinished row.
        """
        return self.__dict__.get("_decoding_statistics", {})

    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False,
                           streamer=None, inputs_tensor=None, assistant_model=None, assistant_tokenizer=None,
                           tokenizer=None, **model_kwargs):
        """With `use_mtp`: drafts by the model's own layers, any batch; see the library's method for the arguments.

        Raises:
            ValueError: if the model has no multi-token-prediction layers.
        """
        config = generation_config
        if assistant_model is not None or config.prompt_lookup_num_tokens or config.assistant_early_exit:
            if self.decoding.enabled:
                tell_once(f"{type(self).__name__} decodes by the library's loop: drafts come from elsewhere than its "
                          "own multi-token-prediction layers")
            return super()._assisted_decoding(
                input_ids, logits_processor, stopping_criteria, config, synced_gpus=synced_gpus, streamer=streamer,
                inputs_tensor=inputs_tensor, assistant_model=assistant_model, assistant_tokenizer=assistant_tokenizer,
                tokenizer=tokenizer, **model_kwargs,
            )
        if not self.config.num_nextn_predict_layers:
            raise ValueError(
                f"use_mtp={config.use_mtp} needs multi-token-prediction layers, but num_nextn_predict_layers="
                f"{self.config.num_nextn_predict_layers}; load a checkpoint with them, or leave use_mtp out"
            )
        max_length, end_tokens, criteria = split_criteria(stopping_criteria)
        refusal = self.decoding_refusal(input_ids, config, synced_gpus, model_kwargs)
        if refusal == "":
            refusal = "model.decoding.enabled or use_cache is False"
        if refusal is None and max_length is None:
            refusal = "there is no max_length"
        self.__dict__["_decoding_statistics"] = {}
        if refusal is None:
            max_length = max(max_length, input_ids.shape[1] + 1)  # one token at least, as in the library
            with self._decoding_turn():
                loop, refusal = MTPDecodingLoop.prepare(
                    self, input_ids, model_kwargs.get("attention_mask"), logits_processor, criteria, config,
                    max_length, end_tokens, streamer,
                )
                if loop is not None:
                    output = loop.run()
                    self.__dict__["_decoding_statistics"] = loop.statistics()
                    return output
        tell_once(f"{type(self).__name__} decodes without drafts: {refusal}")
        return self._sample(input_ids, logits_processor, stopping_criteria, config, synced_gpus=synced_gpus,
                            streamer=streamer, **model_kwargs)
