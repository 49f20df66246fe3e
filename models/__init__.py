"""The networks and the diffusion: tensors in, tensors out."""
