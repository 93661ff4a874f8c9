"""Text from a Llama language model, every attention layer and every drawn token through headway.

>>> import headway.lm
>>> model = headway.lm.load()
>>> model.generate("In the beginning God created the heaven and the", max_tokens=1, temperature=0)
' earth'
"""

from .checkpoint import Config
from .model import Model, Session, TextStream, load

__all__ = ["Config", "Model", "Session", "TextStream", "load"]
