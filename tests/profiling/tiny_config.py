"""The config of a FLUX.1 transformer small enough for a CPU."""

CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "axes_dims_rope": [8, 12, 12],
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "in_channels": 16,
    "guidance_embeds": True,
}
