"""FP8 checkpoints as released: block-scaled `weight` with `weight_scale_inv`, dequantised on load."""

from contextlib import contextmanager

import torch
from torch.nn.functional import pad
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

# Released FP8 files keep the projection of the multi-token-prediction layers in bf16.
NOT_IN_FP8 = ("eh_proj",)


def whole_blocks_only(dequantise):
    """Wraps the library's dequantisation of one matrix: pads it to whole blocks first and crops the result."""

    def any_blocks(self, quantized, scales, output_dtype=None):
        if scales.dim() < 2:
            return dequantise(self, quantized, scales, output_dtype)
        rows, columns = quantized.shape[-2:]
        height, width = self.hf_quantizer.quantization_config.weight_block_size or (1, 1)
        missing_rows, missing_columns = -rows % height, -columns % width
        blocks = ((rows + missing_rows) // height, (columns + missing_columns) // width)
        if tuple(scales.shape[-2:]) != blocks or missing_rows == missing_columns == 0:
            return dequantise(self, quantized, scales, output_dtype)
        padded = pad(quantized.float(), (0, missing_columns, 0, missing_rows))
        return dequantise(self, padded, scales, output_dtype)[..., :rows, :columns]

    return any_blocks


@contextmanager
def released_fp8():
    """Lets the library (transformers 5.23) load released FP8 folders as they are, on hardware with and without FP8.

    It refuses to dequantise matrices whose size is no multiple of the block, as R1's own `kv_a_proj_with_mqa` with 576
    rows in blocks of 128, and leaves them random (or, where the sizes happen to divide, spreads the scales over the
    wrong rows). And it expects every linear layer of the file in FP8, but `eh_proj` is not.
    """
    dequantise = Fp8Dequantize._dequantize_one
    skipped = FineGrainedFP8HfQuantizer.get_modules_to_not_convert
    Fp8Dequantize._dequantize_one = whole_blocks_only(dequantise)
    FineGrainedFP8HfQuantizer.get_modules_to_not_convert = staticmethod(
        lambda *args, **kwargs: [*skipped(*args, **kwargs), *NOT_IN_FP8]
    )
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = dequantise
        del FineGrainedFP8HfQuantizer.get_modules_to_not_convert


def forget_dequantised_source(model, dtype=None):
    """A model loaded from FP8 weights into another dtype is a plain model of that dtype from then on.

    The library would refuse to save it, because its record of the conversion cannot be reversed, and it dequantises to
    bf16 whatever `dtype` (a torch dtype, its name, "auto" or None) was asked for.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    if not any(isinstance(op, Fp8Dequantize) for each in conversions for op in getattr(each, "operations", [])):
        return
    del model._weight_conversions
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
