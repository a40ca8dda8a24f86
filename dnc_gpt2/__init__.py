"""GPT-2 with a differentiable external memory for transformers: importing this registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from configuration_dnc_gpt2 import DNCGPT2Config
from heads_dnc_gpt2 import (
    DNCGPT2ForQuestionAnswering,
    DNCGPT2ForSequenceClassification,
    DNCGPT2ForTokenClassification,
)
from memory_dnc_gpt2 import DNCMemory, MemoryState
from modeling_dnc_gpt2 import DNCGPT2LMHeadModel, DNCGPT2Model

from .inspection import Inspection, inspect

AutoConfig.register("dnc_gpt2", DNCGPT2Config)
AutoModel.register(DNCGPT2Config, DNCGPT2Model)
AutoModelForCausalLM.register(DNCGPT2Config, DNCGPT2LMHeadModel)
AutoModelForSequenceClassification.register(DNCGPT2Config, DNCGPT2ForSequenceClassification)
AutoModelForTokenClassification.register(DNCGPT2Config, DNCGPT2ForTokenClassification)
AutoModelForQuestionAnswering.register(DNCGPT2Config, DNCGPT2ForQuestionAnswering)

__version__ = "0.1.0"

__all__ = [
    "DNCGPT2Config",
    "DNCGPT2ForQuestionAnswering",
    "DNCGPT2ForSequenceClassification",
    "DNCGPT2ForTokenClassification",
    "DNCGPT2LMHeadModel",
    "DNCGPT2Model",
    "DNCMemory",
    "Inspection",
    "MemoryState",
    "inspect",
]
