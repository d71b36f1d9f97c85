"""How the model learns: one Transformer, a joint objective, a DeepSpeed loop, and the honest cost of it all."""

__version__ = "0.1.0"
