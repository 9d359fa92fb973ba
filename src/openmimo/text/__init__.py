"""Tokenizer, chat template and parsers."""

from openmimo.text.template import ChatTemplate, recommended_system_prompt
from openmimo.text.tokenizer import IncrementalDecoder, Tokenizer, train_tokenizer

__all__ = ["ChatTemplate", "IncrementalDecoder", "Tokenizer", "recommended_system_prompt", "train_tokenizer"]
