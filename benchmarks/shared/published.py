"""The baseline: T2T-ViT and its training step in the formulation of the published code, operation by operation.

    model = published_model('t2t_vit_14')  # keys, shapes and initial weights of models.create_model('t2t_vit_14')

It unfolds and normalises patches before it projects them, writes attention out with all weights in memory, updates one
tensor at a time and waits for the device in each step. Parts of ablations other than attention, class token, positions
and classifier are ours, since they compute the same. tests/test_published.py compares it with the authors' numbers.

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
from models.tokens_to_token import SplitLinear, TokenPerformer, TokenTransformer
from utils.errors import UserError
from utils.runtime import Precision
from utils.timm_model import TimmModel

# The architectures of the published code.
PUBLISHED = (
    't2t_vit_7', 't2t_vit_10', 't2t_vit_12', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24',
    't2t_vit_t_14', 't2t_vit_t_19', 't2t_vit_t_24',
    't2t_vit_14_resnext', 't2t_vit_14_wide', 't2t_vit_14_se', 't2t_vit_dense', 't2t_vit_16_ghost')
EPSILON = 1e-8  # in the Performer's denominator


# --- Tokens-to-token module -------------------------------------------------------------------------------------------

def unfold(x: torch.Tensor, layer: SplitLinear) -> torch.Tensor:
    """Map [B, C, H, W] to the patches that `layer` takes, [B, N, C · kernel²]."""
    return F.unfold(x, layer.kernel, stride=layer.stride, padding=layer.padding).transpose(1, 2)


class Performer(TokenPerformer):
    """Token layer of linear cost: map [B, C, H, W] to tokens [B, N, D]."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Map keys or queries [B, N, D] to random features exp(w·x − |x|²/2) / √m, [B, N, m]."""
        squares = (x * x).sum(dim=-1, keepdim=True).repeat(1, 1, len(self.w)) / 2  # [B, N, m]
        projected = torch.einsum('bnd,md->bnm', x.to(self.w.dtype), self.w)
        return torch.exp(projected - squares) / math.sqrt(len(self.w))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(unfold(x, self.kqv))
        k, q, v = torch.split(F.linear(x, self.kqv.weight, self.kqv.bias), self.token_dim, dim=-1)
        k_features, q_features = self.features(k), self.features(q)
        total = torch.einsum('bnm,bm->bn', q_features, k_features.sum(dim=1)).unsqueeze(2)  # [B, N, 1]
        values = torch.einsum('bnd,bnm->bdm', v.to(self.w.dtype), k_features)
        y = torch.einsum('bnm,bdm->bnd', q_features, values) / (total.repeat(1, 1, self.token_dim) + EPSILON)
        x = v + self.dropout(self.proj(y))
        return x + self.mlp(self.norm2(x))


class Transformer(TokenTransformer):
    """Token layer of quadratic cost with all N × N weights in memory: map [B, C, H, W] to tokens [B, N, D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(unfold(x, self.attn.qkv))
        B, N, _ = x.shape
        q, k, v = F.linear(x, self.attn.qkv.weight).reshape(B, N, 3, 1, -1).permute(2, 0, 3, 1, 4)  # each [B, 1, N, D]
        weights = ((q * self.attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, 1, N, N]
        x = v.squeeze(1) + self.attn.proj((weights @ v).transpose(1, 2).reshape(B, N, -1))
        return x + self.mlp(self.norm2(x))


class Projection(SplitLinear):
    """The last soft split and the projection: map [B, D, H, W] to tokens [B, N, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # there is no LayerNorm
        return F.linear(unfold(x, self), self.weight, self.bias)


# The published layer for each of ours; both have the same parameters.
TOKEN_LAYERS: dict[type, type] = {TokenPerformer: Performer, TokenTransformer: Transformer}


# --- Backbone ---------------------------------------------------------------------------------------------------------

def attend(module: layers.Attention | ablations.GhostAttention, q: torch.Tensor, k: torch.Tensor,
           v: torch.Tensor) -> torch.Tensor:
    """Map heads of queries, keys and values, [B, h, N, d] each, to tokens [B, N, C] with the layers of `module`."""
    weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [B, h, N, N]
    weights = F.dropout(weights.softmax(dim=-1), module.attn_drop_rate, module.training)
    x = module.proj((weights @ v).transpose(1, 2).flatten(2))
    if hasattr(module, 'se_layer'):
        x = module.get_submodule('se_layer')(x)
    return module.proj_drop(x)


class Attention(layers.Attention):
    """Attention of the backbone, written out; tokens [B, N, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind()
        return attend(self, q, k, v)


class GhostAttention(ablations.GhostAttention):
    """The same; one half of q, k and v are cheap copies of the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        halves = ((self.q(x), self.cheap_operation_q), (self.k(x), self.cheap_operation_k),
                  (self.v(x), self.cheap_operation_v))
        return attend(self, *(torch.cat((half, copy(half)), dim=2).reshape(B, N, self.num_heads, C // self.num_heads)
                              .permute(0, 2, 1, 3) for half, copy in halves))


class DropPath(nn.Module):
    """Stochastic depth: drop the branch of an image, or divide it by the probability of keeping it."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rate == 0. or not self.training:
            return x
        keep = 1 - self.rate
        mask = (keep + torch.rand((len(x), 1, 1), dtype=x.dtype, device=x.device)).floor_()
        return x.div(keep) * mask


class Block(layers.Block):
    """Block of the backbone; tokens [B, N, C], or to C + growth if it is dense."""
    dense_linear: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.drop_path(self.attn(self.norm1(x)))
        y = y + self.drop_path(self.mlp(self.norm2(y)))
        return torch.cat((x, self.dense_linear(y)), dim=2) if hasattr(self, 'dense_linear') else y


def published_model(name: str, **kwargs) -> TimmModel:
    """Create the model `name`, one of PUBLISHED, in the published formulation; `kwargs` as for `create_model`.

    Its keys and initial weights are those of our model.

    Raises:
        UserError: no such model was published.
    """
    if name not in PUBLISHED:
        raise UserError(f'model {name!r} has no published formulation; use one of {", ".join(PUBLISHED)}')
    model = create_model(name, **kwargs)
    assert isinstance(model, T2TViT), 'all published models are'
    # Published layers have the parameters of ours and differ in what they compute.
    tokens = model.tokens_to_token
    for layer in (tokens.attention1, tokens.attention2):
        layer.__class__ = TOKEN_LAYERS[type(layer)]
    tokens.project.__class__ = Projection
    for block in model.blocks:
        if isinstance(block, layers.Block):  # a transition of the dense model is not
            block.attn.__class__ = Attention if isinstance(block.attn, layers.Attention) else GhostAttention
            block.add_module('drop_path', DropPath(getattr(block.drop_path, 'drop_prob', 0.)))
            block.__class__ = Block
    return model


def golden_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights behind the golden outputs of the authors' code; each key has its own random stream."""
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


# --- Training step ----------------------------------------------------------------------------------------------------

def published_optimizer(model: TimmModel, args) -> torch.optim.AdamW:
    """Return an AdamW with the --lr and --weight-decay of `args` that updates one tensor after the other."""
    return torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr, foreach=False, fused=False)


class PublishedStep:
    """The published training step, called like `engine.step.TrainingStep`; of `args`, it reads clip_grad.

    Attributes:
        last_loss: loss of the last step as a number, for which the host has waited.
    """

    def __init__(self, state: TrainState, model: nn.Module, *, prepare, loss, precision: Precision, args):
        self.state, self.model = state, model
        self.prepare, self.loss, self.precision, self.clip_grad = prepare, loss, precision, args.clip_grad
        self.last_loss = math.nan

    def __call__(self, batches) -> torch.Tensor:
        """Take an optimizer step with the next batch; return its images as the model saw them."""
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
