"""Settings of the fast generation path, one object a model."""

from dataclasses import dataclass

CACHE_DTYPES = ("auto", "fp8")


@dataclass
class DecodingOptions:
    """How `generate` decodes; set them on `model.decoding`, for instance `model.decoding.cache_dtype = "fp8"`.

    Attributes:
        enabled: False leaves the decoding to the library's own loop (in evaluation mode, as here).
        kernels: Triton kernels on CUDA; False: plain torch operations.
        graphs: record CUDA graphs of the decoding step; False: launch every kernel anew.
        cache_dtype: "auto", the compute dtype; "fp8": latents as e4m3 with one fp32 scale per 128 channels, rotary
            keys in bf16, 656 instead of 1,152 bytes a token and layer at R1's sizes.
        prefill_tokens: tokens that one pass of the prefill takes at most; longer prompts are read in chunks.
        drafts: tokens drafted a step by `generate(..., use_mtp=True)`; the layers of the checkpoint are used in
            turn, the last one again for what is left.
        record_routes: keep the experts chosen for every token in `model.decoding_record.routes`.
        record_log_probs: keep the chosen tokens' log-probabilities, before any processor, in
            `model.decoding_record.log_probs`.
        log_prob_temperature: those are of softmax(logits / log_prob_temperature), the distribution that a trainer with
            this temperature sees. It changes no choice.
        batch_slots: rows that `generate_batch` decodes at once at most; None: 256.
        batch_tokens: tokens that its cache holds in all rows together; None: on CUDA what 0.6 of the free memory
            holds, elsewhere 65,536.
    """

    enabled: bool = True
    kernels: bool = True
    graphs: bool = True
    cache_dtype: str = "auto"
    prefill_tokens: int = 32768
    drafts: int = 1
    record_routes: bool = False
    record_log_probs: bool = False
    log_prob_temperature: float = 1.0
    batch_slots: int | None = None
    batch_tokens: int | None = None

    def __setattr__(self, name, value):
        if name not in self.__dataclass_fields__:
            raise ValueError(f"{name}={value!r} is no decoding option; known: {sorted(self.__dataclass_fields__)}")
        if name == "cache_dtype" and value not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={value!r} is unknown; known: {list(CACHE_DTYPES)}")
        if name in ("prefill_tokens", "drafts") and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if name in ("batch_slots", "batch_tokens") and value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1, or None for the default")
        if name == "log_prob_temperature":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a number above 0; 1.0 leaves the logits as they are")
        super().__setattr__(name, value)
