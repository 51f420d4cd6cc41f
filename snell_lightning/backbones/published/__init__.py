"""Weights as others have published them, from a file of any of their forms into a timm model.

`reading` gets the tensors out of a file, `naming` gives them timm's names, `loading` puts them into a model and says
what became of each.
"""

from snell_lightning.backbones.published.loading import LoadedWeights, load_weights

__all__ = ["LoadedWeights", "load_weights"]
