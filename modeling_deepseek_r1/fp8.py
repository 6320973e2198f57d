"""FP8 checkpoints as released: block-scaled `weight` with `weight_scale_inv`, dequantised on load."""

from contextlib import contextmanager

from torch.nn.functional import pad
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


@contextmanager
def partial_fp8_blocks():
    """Lets the library dequantise matrices whose size is no multiple of the block.

    R1's own `kv_a_proj_with_mqa` has 576 rows in blocks of 128; transformers 5.23 wants equal blocks, refuses, and
    leaves the weight random (or, where the sizes happen to divide, spreads the scales over the wrong rows). Inside this context such a matrix is padded to whole blocks and cropped afterwards.
    """
    whole_blocks = Fp8Dequantize._dequantize_one

    def any_blocks(self, quantized, scales, output_dtype=None):
        if scales.dim() < 2:
            return whole_blocks(self, quantized, scales, output_dtype)
        rows, columns = quantized.shape[-2:]
        height, width = self.hf_quantizer.quantization_config.weight_block_size or (1, 1)
        missing_rows, missing_columns = -rows % height, -columns % width
        blocks = ((rows + missing_rows) // height, (columns + missing_columns) // width)
        if tuple(scales.shape[-2:]) != blocks or missing_rows == missing_columns == 0:
            return whole_blocks(self, quantized, scales, output_dtype)
        padded = pad(quantized.float(), (0, missing_columns, 0, missing_rows))
        return whole_blocks(self, padded, scales, output_dtype)[..., :rows, :columns]

    Fp8Dequantize._dequantize_one = any_blocks
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = whole_blocks


def forget_dequantised_source(model):
    """A model loaded from FP8 weights into bf16 is a plain bf16 model from then on; the library would refuse to save it,
    because its record of the conversion cannot be reversed."""
    conversions = getattr(model, "_weight_conversions", None) or []
    if any(isinstance(op, Fp8Dequantize) for conversion in conversions for op in getattr(conversion, "operations", [])):
        del model._weight_conversions
