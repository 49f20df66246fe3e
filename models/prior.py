"""The prior P: a causal transformer that turns text into a CLIP image embedding (unCLIP, arXiv 2204.06125).

Its sequence, in unCLIP's order: BPE tokens, CLIP text embedding, diffusion time, noised image embedding, and a
learned query whose output is the predicted clean embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.p3d import sinusoidal


@dataclass
class PriorConfig:
    """The shape of the prior."""

    width: int = 2048
    depth: int = 24
    head_width: int = 64
    embedding_width: int = 1024  # of CLIP's joint space
    context_length: int = 77  # BPE tokens
    vocabulary: int = 49408
    dropout: float = 0.0
    checkpoint_activations: bool = False


class Block(nn.Module):
    """A pre-norm transformer block with a causal mask."""

    def __init__(self, width: int, head_width: int, dropout: float):
        super().__init__()
        self.head_width = head_width
        self.norm_attention = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for y in self.to_qkv(self.norm_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.to_out(attended))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class Prior(nn.Module):
    """Predicts the clean image embedding from a noised one and the text.

    Embeddings enter and leave scaled to unit variance per coordinate (`models.clip`); unit-norm embeddings
    drown in the noise, the classic failure.
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        width, d = config.width, config.embedding_width
        if width % config.head_width:
            raise ValueError(f"prior width {width} is not a multiple of head_width {config.head_width}.")
        self.config = config
        self.token = nn.Embedding(config.vocabulary, width)
        self.no_token = nn.Parameter(torch.randn(config.context_length, width) * 0.02)
        self.no_text = nn.Parameter(torch.zeros(d))
        self.text = nn.Linear(d, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.noised = nn.Linear(d, width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(config.context_length + 4, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, config.head_width, config.dropout) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, d)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor, text: Tensor, drop: Tensor | None = None) -> Tensor:
        """One prediction.

        Args:
            z: noised image embedding `b d`.
            t: diffusion times `b`.
            tokens: BPE tokens `b n`; what follows the end token (the largest id, as in open_clip) is padding.
            text: CLIP text embedding `b d`, scaled like z.
            drop: rows whose text is replaced by learned "no text" vectors, bool `b` (guidance).

        Returns:
            The clean image embedding `b d`.
        """
        absent = torch.arange(tokens.shape[1], device=tokens.device) > tokens.argmax(dim=-1, keepdim=True)
        if drop is not None:
            absent = absent | drop[:, None]
            text = torch.where(drop[:, None], self.no_text.to(text.dtype), text)
        words = torch.where(absent[..., None], self.no_token, self.token(tokens))
        time = self.time(sinusoidal(t, self.config.width).to(z.dtype))
        tail = torch.stack((self.text(text), time, self.noised(z), self.query.expand(len(z), -1)), dim=1)
        x = torch.cat((words, tail), dim=1) + self.position
        for block in self.blocks:
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.out(self.norm_out(x[:, -1]))
