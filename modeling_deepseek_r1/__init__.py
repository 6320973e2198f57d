"""DeepSeek-R1 for transformers. Importing this package registers every class with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from .configuration_deepseek_r1 import DeepSeekR1Config
from .modeling_deepseek_r1 import (
    DeepSeekR1ForCausalLM,
    DeepSeekR1ForSequenceClassification,
    DeepSeekR1ForTokenClassification,
    DeepSeekR1Model,
    DeepSeekR1PreTrainedModel,
)

AutoConfig.register("deepseek_r1", DeepSeekR1Config, exist_ok=True)
AutoModel.register(DeepSeekR1Config, DeepSeekR1Model, exist_ok=True)
AutoModelForCausalLM.register(DeepSeekR1Config, DeepSeekR1ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DeepSeekR1Config, DeepSeekR1ForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(DeepSeekR1Config, DeepSeekR1ForTokenClassification, exist_ok=True)
AutoTokenizer.register(DeepSeekR1Config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)

__version__ = "0.1.0"
__all__ = [
    "DeepSeekR1Config",
    "DeepSeekR1ForCausalLM",
    "DeepSeekR1ForSequenceClassification",
    "DeepSeekR1ForTokenClassification",
    "DeepSeekR1Model",
    "DeepSeekR1PreTrainedModel",
]
