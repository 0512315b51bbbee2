"""Sizes of the smallest networks of transformers that tests build: of two layers, for images of 32 pixels."""

SIZE = 32
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 8,
}
"""An image tower of a dual encoder; wider than `LAYERS`, so that a swap of the towers shows."""
