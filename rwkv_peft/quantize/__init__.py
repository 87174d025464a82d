"""A frozen weight in 8 or 4 bits: quantise(weight, mode), and the two layers that compute with one.

Nothing here is ever saved or trained: adapters lie on top of a QuantLinear, and merging goes to the original weight.
"""

from .base import Quantised, codes_as_parameters
from .linear import QuantEmbedding, QuantLinear
from .modes import MODES, Mode, quantise

__all__ = ["MODES", "Mode", "QuantEmbedding", "QuantLinear", "Quantised", "codes_as_parameters", "quantise"]
