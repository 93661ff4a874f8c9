"""Text from a Llama language model, every attention layer and every drawn token through headway.

>>> import headway.lm
>>> model = headway.lm.load()
>>> model.generate("In the beginning God created the heaven and the", max_tokens=1, temperature=0)
' earth'
"""

from .checkpoint import Config
from .model import DEFAULTS, Model, TextOptions, TextStream, load
from .session import Session

__all__ = ["DEFAULTS", "Config", "Model", "Session", "TextOptions", "TextStream", "load"]
