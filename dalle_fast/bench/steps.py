# SPDX-License-Identifier: MIT
"""Whole training steps (forward and backward) beside the same models on plain PyTorch ops, called their best way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..models import DALLE, DVAE, DALLEConfig
from ..nn import Conv2d, categorical_kl, logit_laplace_nll, map_pixels
from ..nn.precision import full_precision
from ..ops import gumbel_softmax
from .clone import clone_peers
from .rows import Row, relative


def _plain_attention(attention, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    return attention.out(out.transpose(1, 2).flatten(2))


def plain_dalle_loss(model: DALLE, text: torch.Tensor, image: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """`DALLE.loss` in PyTorch ops: scaled_dot_product_attention with masks ready made, a head for each vocabulary."""
    x = torch.cat((model.embed_text(text), model.embed_image(image)), dim=1)
    for block, mask in zip(model.blocks, masks, strict=True):
        x = x + _plain_attention(block.attention, block.norm_attention(x), mask)
        x = x + block.mlp_out(F.gelu(block.mlp_in(block.norm_mlp(x))))
    states, text_len = model.norm(x), model.config.text_len
    with full_precision(states):
        text_loss = F.cross_entropy(model.text_head(states[:, :text_len].flatten(0, 1)), text.flatten())
        image_loss = F.cross_entropy(model.image_head(states[:, text_len:].flatten(0, 1)), image.flatten())
    weight = model.config.text_loss_weight
    return weight * text_loss + (1 - weight) * image_loss


def plain_dvae_loss(
    model: DVAE, images: torch.Tensor, tau: float, beta: float, relax: Callable[..., torch.Tensor] = F.gumbel_softmax
) -> torch.Tensor:
    """`DVAE.forward` in PyTorch ops."""
    logits = model.encode_logits(images)
    stats = model.decode_soft(relax(logits, tau, dim=1))
    nll = logit_laplace_nll(stats, map_pixels(images)).mean()
    return nll + beta * categorical_kl(logits).sum() / images.numel()


def _step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        return value.detach()

    return run


def _error(ours: Callable[[], torch.Tensor], exact: Callable[[], torch.Tensor], model, double) -> Callable[[], float]:
    """The largest relative error of a weight's gradient, and of the loss, against the model in float64."""

    def error() -> float:
        worst = relative(ours(), exact())
        expected = {name: p.grad for name, p in double.named_parameters() if p.grad is not None}
        for name, p in model.named_parameters():
            if name in expected and p.dim() > 1:
                worst = max(worst, relative(p.grad, expected[name]))
        return worst

    return error


def dalle_row(dtype: torch.dtype, *, small: bool = False, device: str = "cpu", clone: str = "") -> Row:
    """Width 512, four layers (row, column, row, row) of eight heads, 256 + 1024 tokens, batch 1.

    `clone` is a folder with DALLE-pytorch, one more peer.
    """
    if small:
        config = DALLEConfig(64, 4, 2, 32, text_vocab_size=64, text_len=12, image_vocab_size=32, grid=(4, 4))
    else:
        config = DALLEConfig(width=512, num_layers=4, num_heads=8)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.text_vocab_size, (1, config.text_len), generator=generator).to(device)
    image = torch.randint(config.image_vocab_size, (1, config.image_len), generator=generator).to(device)
    torch.manual_seed(0)
    model = DALLE(config).to(device)
    model.blocks[-1].attention.pattern = config.pattern(1)
    double = copy.deepcopy(model).double()
    kinds = [block.attention.pattern.mask() for block in model.blocks]
    masks = [torch.zeros(m.shape, device=device).masked_fill_(~m.to(device), -torch.inf) for m in kinds]
    if dtype != torch.float32:
        masks = [m.to(dtype) for m in masks]
    ours = _step(model, lambda: model.loss(text, image).loss, dtype)
    wide = [m.double() for m in masks]
    exact = _step(double, lambda: plain_dalle_loss(double, text, image, wide), torch.float32)
    matrices = sum(p.numel() for b in model.blocks for p in b.parameters() if p.dim() == 2)
    heads = model.text_head.weight.numel() * config.text_len + model.image_head.weight.numel() * config.image_len
    pairs = sum(int(m.sum()) for m in kinds) * config.num_heads * config.head_dim
    return Row(
        f"DALLE step width {config.width} {str(dtype)[6:]}",
        ours,
        _error(ours, exact, model, double),
        1e-3 if dtype == torch.float32 else 6e-2,
        3 * 4 * sum(p.numel() for p in model.parameters()),
        3 * 2 * (matrices * (config.text_len + config.image_len) + heads + 2 * pairs),
        {
            "plain PyTorch": lambda: _step(model, lambda: plain_dalle_loss(model, text, image, masks), dtype),
            **clone_peers(clone, config, text, image, dtype),
        },
        flop_dtype=dtype,
    )


def dvae_row(dtype: torch.dtype, *, small: bool = False, device: str = "cpu") -> Row:
    """The demo's dVAE, 32 pictures of 32 x 32, in channels_last."""
    from ..presets import preset

    config = preset("dvae", "emoji").model
    torch.manual_seed(0)
    model = DVAE(config).to(device, memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    double = copy.deepcopy(model).double()
    for module in [*plain.modules(), *double.modules()]:
        if isinstance(module, Conv2d):
            module.backend = "reference"
    for module in double.modules():
        if isinstance(module, Conv2d):
            module.full_precision = False  # it would be float32
    batch = 2 if small else 32
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    options = {"tau": 0.5, "beta": 6.6, "seed": 1}
    ours = _step(model, lambda: model(images, **options).loss, dtype)
    same_noise = functools.partial(gumbel_softmax, seed=options["seed"], backend="reference")
    exact = _step(double, lambda: plain_dvae_loss(double, images.double(), 0.5, 6.6, same_noise), torch.float32)
    plain_step = _step(plain, lambda: plain_dvae_loss(plain, images, 0.5, 6.6), dtype)
    counted = min(batch, 2)
    with FlopCounterMode(display=False) as products:
        _step(plain, lambda: plain_dvae_loss(plain, images[:counted], 0.5, 6.6), torch.float32)()
    weights = [p for p in model.parameters()]
    return Row(
        f"dVAE step demo preset {str(dtype)[6:]}",
        ours,
        _error(ours, exact, model, double),
        5e-3 if dtype == torch.float32 else 0.2,  # autocast rounds each of the convolutions, the plain model's too
        3 * 4 * sum(p.numel() for p in weights) + 3 * 4 * images.numel(),
        products.get_total_flops() * batch // counted,
        {"plain PyTorch": lambda: plain_step},
        flop_dtype=dtype,
    )


def step_rows(*, small: bool = False, clone: str = "") -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, maker) of the training steps in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        width = 64 if small else 512
        yield (
            f"DALLE step width {width} {str(dtype)[6:]}",
            lambda dtype=dtype: dalle_row(dtype, small=small, clone=clone),
        )
    for dtype in (torch.float32, torch.bfloat16):
        yield f"dVAE step demo preset {str(dtype)[6:]}", lambda dtype=dtype: dvae_row(dtype, small=small)
