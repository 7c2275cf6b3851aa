"""The yardstick: T2T-ViT and its training step in the formulation of the published code, operation by operation.

    from benchmarks.shared.published import published_model
    model = published_model('t2t_vit_14')  # keys, shapes and initial weights of models.create_model('t2t_vit_14')

Patches are unfolded and normalised before they are projected; the Performer is four einsums without any shift of its
exponents; attention is written out, with all its weights in memory; the step updates one tensor at a time and waits
for the device. Everything is eager, and under autocast in the dtypes that autocast chooses. What is no attention in an
ablation (squeeze-excitation, ghost operations, transitions), and what joins the parts (class token, positions,
classifier), is ours: it is the same computation. tests/test_published.py holds all of it against the authors' numbers.

Dimensions: B images, C channels, N tokens, h heads, d = C / h, D token dimension, m random features.
"""
import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.ema import ModelEma
from engine.optimizer import param_groups
from engine.state import TrainState
from models import T2TViT, ablations, create_model, layers
from utils.errors import UserError
from utils.runtime import Precision
from utils.timm_model import TimmModel

__all__ = ['PUBLISHED', 'PublishedStep', 'golden_state', 'published_model', 'published_optimizer']

# The architectures of the published code.
PUBLISHED = (
    't2t_vit_7', 't2t_vit_10', 't2t_vit_12', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24',
    't2t_vit_t_14', 't2t_vit_t_19', 't2t_vit_t_24',
    't2t_vit_14_resnext', 't2t_vit_14_wide', 't2t_vit_14_se', 't2t_vit_dense', 't2t_vit_16_ghost')
SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding
DROPOUT = 0.1  # of the Performer, twice
EPSILON = 1e-8  # of the Performer's quotient


# ------------------------------------------------------------------------------------------------------------
# Tokens-to-token module

class Performer(nn.Module):
    """Token layer of linear cost: tokens [B, N, dim] to tokens [B, N, D]."""
    w: torch.Tensor

    def __init__(self, dim: int, token_dim: int):
        super().__init__()
        self.token_dim, self.num_features = token_dim, token_dim // 2
        self.kqv = nn.Linear(dim, 3 * token_dim)
        self.proj = nn.Linear(token_dim, token_dim)
        self.dropout = nn.Dropout(DROPOUT)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim), nn.Dropout(DROPOUT))
        self.register_buffer('w', torch.empty(self.num_features, token_dim))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map keys or queries [B, N, D] to random features exp(w·x − |x|²/2) / √m, [B, N, m]."""
        squares = (x * x).sum(dim=-1, keepdim=True).repeat(1, 1, self.num_features) / 2  # [B, N, m]
        projected = torch.einsum('bnd,md->bnm', x.to(self.w.dtype), self.w)
        return torch.exp(projected - squares) / math.sqrt(self.num_features)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised tokens [B, N, dim] to values plus what they attend to, [B, N, D]."""
        k, q, v = torch.split(self.kqv(x), self.token_dim, dim=-1)
        k_features, q_features = self.features(k), self.features(q)
        total = torch.einsum('bnm,bm->bn', q_features, k_features.sum(dim=1)).unsqueeze(2)  # [B, N, 1]
        values = torch.einsum('bnd,bnm->bdm', v.to(self.w.dtype), k_features)
        y = torch.einsum('bnm,bdm->bnd', q_features, values) / (total.repeat(1, 1, self.token_dim) + EPSILON)
        return v + self.dropout(self.proj(y))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """One-head attention with all N × N weights in memory: tokens [B, N, dim] to tokens [B, N, D]."""

    def __init__(self, dim: int, token_dim: int):
        super().__init__()
        self.token_dim, self.scale = token_dim, dim ** -0.5
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False)
        self.proj = nn.Linear(token_dim, token_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 1, self.token_dim).permute(2, 0, 3, 1, 4)  # each [B, 1, N, D]
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, 1, N, N]
        x = (weights @ v).transpose(1, 2).reshape(B, N, self.token_dim)
        return v.squeeze(1) + self.proj(x)


class TokenMlp(nn.Module):
    """Two linear layers around a GELU, all D channels wide."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Transformer(nn.Module):
    """Token layer of quadratic cost: tokens [B, N, dim] to tokens [B, N, D]."""

    def __init__(self, dim: int, token_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = TokenMlp(token_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Unfold, token layer, back to a map, twice; unfold, projection: images [B, C, H, W] to tokens [B, N, C]."""

    def __init__(self, token_layer: type[nn.Module], in_chans: int, embed_dim: int, token_dim: int):
        super().__init__()
        self.attention1 = token_layer(in_chans * 7 ** 2, token_dim)
        self.attention2 = token_layer(token_dim * 3 ** 2, token_dim)
        self.project = nn.Linear(token_dim * 3 ** 2, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for (kernel, stride, padding), layer in zip(
                SOFT_SPLITS, (self.attention1, self.attention2, self.project), strict=True):
            H, W = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[-2:])
            x = layer(F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2))  # [B, H · W, D]
            if layer is not self.project:
                x = x.transpose(1, 2).reshape(len(x), -1, H, W)
        return x


# ------------------------------------------------------------------------------------------------------------
# Backbone

class Attention(nn.Module):
    """Attention of the backbone, written out, over the layers of an attention of ours; tokens [B, N, C]."""
    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    se_layer: nn.Module

    def __init__(self, ours: layers.Attention | ablations.GhostAttention):
        super().__init__()
        for name, layer in ours.named_children():
            self.add_module(name, layer)
        self.num_heads = ours.num_heads
        self.attn_drop = nn.Dropout(ours.attn_drop_rate)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, [B, h, N, d] each."""
        B, N, C = x.shape
        return self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [B, h, N, N]
        weights = self.attn_drop(weights.softmax(dim=-1))
        x = self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))
        if hasattr(self, 'se_layer'):
            x = self.se_layer(x)
        return self.proj_drop(x)


class GhostAttention(Attention):
    """The same, with q, k and v of which one half are cheap copies of the other."""
    q: nn.Module
    k: nn.Module
    v: nn.Module
    cheap_operation_q: nn.Module
    cheap_operation_k: nn.Module
    cheap_operation_v: nn.Module

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        B, N, C = x.shape
        halves = ((self.q(x), self.cheap_operation_q), (self.k(x), self.cheap_operation_k),
                  (self.v(x), self.cheap_operation_v))
        return tuple(torch.cat((half, copy(half)), dim=2).reshape(B, N, self.num_heads, C // self.num_heads)
                     .permute(0, 2, 1, 3) for half, copy in halves)


class DropPath(nn.Module):
    """Stochastic depth: the branch of an image is dropped, or divided by the probability that it is kept."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rate == 0. or not self.training:
            return x
        keep = 1 - self.rate
        mask = (keep + torch.rand((len(x), 1, 1), dtype=x.dtype, device=x.device)).floor_()
        return x.div(keep) * mask


class Block(nn.Module):
    """Block of the backbone over the layers of a block of ours; tokens [B, N, C], or to C + growth if it is dense."""
    dense_linear: nn.Module

    def __init__(self, ours: layers.Block):
        super().__init__()
        assert isinstance(ours.attn, layers.Attention | ablations.GhostAttention), 'a published block has one of these'
        attention = Attention if isinstance(ours.attn, layers.Attention) else GhostAttention
        self.norm1, self.attn = ours.norm1, attention(ours.attn)
        self.drop_path = DropPath(getattr(ours.drop_path, 'drop_prob', 0.))
        self.norm2, self.mlp = ours.norm2, ours.mlp
        if hasattr(ours, 'dense_linear'):
            self.dense_linear = ours.get_submodule('dense_linear')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.drop_path(self.attn(self.norm1(x)))
        y = y + self.drop_path(self.mlp(self.norm2(y)))
        return torch.cat((x, self.dense_linear(y)), dim=2) if hasattr(self, 'dense_linear') else y


def published_model(name: str, **kwargs) -> TimmModel:
    """The model `name` in the published formulation, with the keys and the initial weights that ours would have.

    Args:
        name: one of PUBLISHED.
        kwargs: those of `models.create_model`.
    Raises:
        UserError: no such model was published, and as `models.create_model`.
    """
    if name not in PUBLISHED:
        raise UserError(f'model {name!r} has no published formulation; use one of {", ".join(PUBLISHED)}')
    model = create_model(name, **kwargs)
    assert isinstance(model, T2TViT), 'all that were published are'
    ours = model.tokens_to_token.state_dict()
    token_layer = Performer if 'attention1.w' in ours else Transformer
    embed_dim, token_dim = ours['project.weight'].shape[0], ours['attention1.norm2.weight'].shape[0]
    published = TokensToToken(token_layer, model.in_chans, embed_dim, token_dim).to(model.cls_token)
    published.load_state_dict(ours)
    model.tokens_to_token = published
    for index, block in enumerate(model.blocks):
        if isinstance(block, layers.Block):  # not so a transition of the dense model
            model.blocks[index] = Block(block)
    return model


def golden_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that the golden outputs of the authors' code were made with: of each key, its own random stream."""
    state = {}
    for key, tensor in model.state_dict().items():
        stream = np.random.RandomState(zlib.crc32(key.encode()))
        draw = stream.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if 'norm' in key and key.endswith('weight'):
            draw = 1 + np.float32(0.1) * draw
        elif key.endswith('.w'):
            draw = np.float32(0.7) * draw
        else:
            draw = np.float32(0.02 if key.endswith(('bias', 'kqv.weight')) else 0.05) * draw
        state[key] = torch.from_numpy(draw)
    return state


# ------------------------------------------------------------------------------------------------------------
# Training step

def published_optimizer(model: TimmModel, args) -> torch.optim.AdamW:
    """AdamW that updates one tensor after the other, with the --lr and --weight-decay of `args`."""
    return torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr, foreach=False, fused=False)


class PublishedStep:
    """The published training step, called as `engine.step.TrainingStep` is.

    Args:
        state: with `published_optimizer`, and an average; changed in place.
        model: `state.model` as it is called in training.
        prepare: brings a batch to the device as the model takes it.
        loss: (logits, targets) → scalar.
        precision: whose autocast the forward pass runs under; float16 alone has its gradients scaled.
        args: clip_grad is used.

    Attributes:
        last_loss: of the last step, as a number: the host has waited for it.
    """

    def __init__(self, state: TrainState, model: nn.Module, *, prepare, loss, precision: Precision, args):
        self.state, self.model = state, model
        self.prepare, self.loss, self.precision, self.clip_grad = prepare, loss, precision, args.clip_grad
        self.last_loss = math.nan

    def __call__(self, batches) -> torch.Tensor:
        """One optimizer step from the next batch; returns its images as the model saw them."""
        state = self.state
        images, targets = self.prepare(*next(batches))
        with self.precision.autocast():
            loss = self.loss(self.model(images), targets)
        self.last_loss = loss.item()
        state.optimizer.zero_grad()
        state.scaler.scale(loss).backward()
        if self.clip_grad is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), self.clip_grad, foreach=False)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if images.device.type == 'cuda':
            torch.cuda.synchronize()
        if state.ema:
            self._average(state.ema)
        state.count_step()
        return images

    @torch.no_grad()
    def _average(self, ema: ModelEma) -> None:
        weights = self.state.model.state_dict()
        for key, average in ema.module.state_dict().items():
            average.copy_(average * ema.decay + (1. - ema.decay) * weights[key])
