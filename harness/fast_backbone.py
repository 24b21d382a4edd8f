"""Shortcuts for backbones in training, set in place: the parameters and their names stay.

    skip_unread_tokens(backbone)  # a ViT's last block for its class token alone: exact, 7 % less
    share_drop_path(backbone)     # drop path that torch.compile makes one graph of, not twelve

Linear layers by oneDNN's 1x1 convolutions, for a CPU, were measured and left out: a step of
ViT-S/16 took 0.90 of the time on one AMD EPYC, 1.13 on another, 1.04 on an Intel Xeon.

Stands alone: needs torch, timm and einops. Axes: b batch, n tokens, d features.
"""

import torch
from einops import rearrange
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class _ClassTokenBlock(Block):
    """timm's last block, for the class token alone: nothing reads the others after it."""

    def forward(self, tokens: Tensor, *args: object, **kwargs: object) -> Tensor:
        attention = self.attn
        normed = self.norm1(tokens)
        dim, num_heads = normed.shape[-1], attention.num_heads
        weight, bias = attention.qkv.weight, attention.qkv.bias
        query_bias = None if bias is None else bias[:dim]
        key_value_bias = None if bias is None else bias[dim:]
        query = F.linear(normed[:, :1], weight[:dim], query_bias)
        key_value = F.linear(normed, weight[dim:], key_value_bias)
        query = rearrange(query, "b n (head d) -> b head n d", head=num_heads)
        key, value = rearrange(
            key_value, "b n (two head d) -> two b head n d", two=2, head=num_heads
        )
        query, key = attention.q_norm(query), attention.k_norm(key)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
        mixed = attention.norm(rearrange(mixed, "b head n d -> b n (head d)"))
        token = tokens[:, :1] + self.drop_path1(self.ls1(attention.proj(mixed)))
        return token + self.drop_path2(self.ls2(self.mlp(self.norm2(token))))


def skip_unread_tokens(backbone: nn.Module) -> bool:
    """Let a ViT's last block compute its class token alone, in place, and return whether it could.

    Exact, for 7 % less arithmetic; but forward_features and what reads patch tokens then lack them.
    Only where timm's plain attention is pooled by its class token, without dropout.
    """
    if not _is_plain_vit(backbone) or not _is_plain_block(backbone.blocks[-1]):
        return False
    if backbone.global_pool != "token" or not backbone.has_class_token:
        return False
    backbone.blocks[-1].__class__ = _ClassTokenBlock
    return True


def _is_plain_vit(backbone: nn.Module) -> bool:
    """Tell whether a network is timm's ViT with its own forward: a distilled one has another."""
    kind = type(backbone)
    return (
        isinstance(backbone, VisionTransformer)
        and kind.forward_features is VisionTransformer.forward_features
        and kind.forward_head is VisionTransformer.forward_head
    )


def _is_plain_block(block: nn.Module) -> bool:
    """Tell whether a block is timm's plain one, with plain attention, without dropout and gate."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    has_dropout = block.attn.attn_drop.p > 0 or block.attn.proj_drop.p > 0
    return not has_dropout and getattr(block.attn, "gate", None) is None


class DropPath(nn.Module):
    """Leave out a residual branch of each sample with probability `rate`, in training; scale up.

    timm's keeps the rate as a number, and torch.compile makes a graph of its own for each number,
    up to its limit of 8: the other blocks of a ViT then stay uncompiled. With a buffer all blocks
    are one graph.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"need a drop path rate >= 0 and < 1, got {rate}")
        self.drop_prob = rate
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        draws_shape = [len(branch)] + [1] * (branch.ndim - 1)  # one draw a sample
        draws = torch.rand(draws_shape, device=branch.device)
        factors = (draws < self.keep) / self.keep  # 0 where left out, else what makes up for it
        return branch * factors.to(branch.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


def share_drop_path(backbone: nn.Module) -> None:
    """Put our DropPath where timm has its own, in place, if it has any.

    Also where timm has an Identity for a rate of 0, so that these blocks are of the same graph.
    """
    if not any(isinstance(module, TimmDropPath) for module in backbone.modules()):
        return
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if "drop_path" in name and isinstance(child, TimmDropPath | nn.Identity):
                shared = DropPath(getattr(child, "drop_prob", 0.0))
                setattr(module, name, shared.train(child.training))
