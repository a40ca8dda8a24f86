"""GPT-2's other heads on the backbone with memory: their losses and outputs are GPT-2's."""

from transformers import GPT2ForQuestionAnswering, GPT2ForSequenceClassification, GPT2ForTokenClassification

try:
    from .configuration_dnc_gpt2 import DNCGPT2Config
    from .modeling_dnc_gpt2 import DNCGPT2Model, DNCGPT2PreTrainedModel
except ImportError:
    from configuration_dnc_gpt2 import DNCGPT2Config
    from modeling_dnc_gpt2 import DNCGPT2Model, DNCGPT2PreTrainedModel


class _OnMemory(DNCGPT2PreTrainedModel):
    """Puts the backbone with memory in the place of GPT-2's."""

    def __init__(self, config: DNCGPT2Config):
        checkpointing = getattr(config, "gradient_checkpointing", False)
        super().__init__(config)
        self.transformer = DNCGPT2Model(config)
        if checkpointing:  # which was GPT-2's backbone's, and is used up
            self.config.gradient_checkpointing = True
        self.post_init()


class DNCGPT2ForSequenceClassification(_OnMemory, GPT2ForSequenceClassification):
    """A class, or a number, for the whole input, from its last token."""


class DNCGPT2ForTokenClassification(_OnMemory, GPT2ForTokenClassification):
    """A class for every token."""


class DNCGPT2ForQuestionAnswering(_OnMemory, GPT2ForQuestionAnswering):
    """Where the answer starts and ends."""


DNCGPT2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
DNCGPT2ForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
DNCGPT2ForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")

__all__ = ["DNCGPT2ForQuestionAnswering", "DNCGPT2ForSequenceClassification", "DNCGPT2ForTokenClassification"]
