# SPDX-License-Identifier: MIT
"""A network that no single gradient scale can train in float16, and one scale per resblock can (appendix D).

Thin layers of the transformer, each with an exit to the one head. Layer i is to say the token plus i, so that every
layer has work of its own, and the losses of the exits are weighted by falling powers of two: the largest gradients fall
by 2^41 from the first resblock to the last, and float16 holds 2^40.

    python -m benchmarks.gradient_scale        # about three minutes on one core
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F

from dalle_fast.models import DALLE, DALLEConfig
from dalle_fast.optim import ResblockGradScaler

VOCAB_SIZE, NUM_LAYERS, NUM_UPDATES, PEAK_RATE = 8, 5, 200, 6e-3
EXIT_WEIGHTS = torch.tensor([2.0 ** (9.5 - 10.2 * i) for i in range(NUM_LAYERS)])


def falling_model() -> DALLE:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = DALLEConfig(
        width=32,
        num_layers=NUM_LAYERS,
        num_heads=2,
        head_dim=16,
        text_vocab_size=VOCAB_SIZE,
        text_len=8,
        image_vocab_size=VOCAB_SIZE,
        grid=(4, 4),
        kernel=3,
    )
    return DALLE(config)


def exit_losses(model: DALLE, step: int) -> torch.Tensor:
    """Cross-entropy of each layer's exit on the batch of an update: the picture is the caption, there and back."""
    text = torch.randint(VOCAB_SIZE, (16, 8), generator=torch.Generator().manual_seed(step))
    image = torch.cat((text, text.flip(1)), dim=1)
    x = torch.cat((model.embed_text(text), model.embed_image(image)), dim=1)
    losses = []
    for i, block in enumerate(model.blocks):
        x = block(x)
        logits = model.image_logits(model.norm(x[:, 8:]))
        losses.append(F.cross_entropy(logits.flatten(0, 1), ((image + i) % VOCAB_SIZE).flatten()))
    return torch.stack(losses)


def first_gradients(scale: float | None) -> list[list[torch.Tensor]]:
    """Gradients of each resblock's matrices in the first update, with one scale still in them; None: float32."""
    model = falling_model()
    if scale is not None:
        model.set_gradient_scales(torch.full((2 * NUM_LAYERS,), scale))
    (exit_losses(model, 0) * EXIT_WEIGHTS).sum().backward()
    return [[p.grad for p in resblock if p.dim() == 2] for resblock in model.resblock_parameters()]


def survey(scale: float) -> tuple[list[int], list[int]]:
    """Resblocks with a gradient that is not finite, and resblocks whose gradients are all zero, at one scale."""
    gradients = list(enumerate(first_gradients(scale)))
    overflowed = [i for i, grads in gradients if not all(g.isfinite().all() for g in grads)]
    return overflowed, [i for i, grads in gradients if not any(g.any() for g in grads)]


def settled() -> dict[str, list[int]]:
    """State of a scaler 2^4 below overflow: where it would be after some ten thousand updates."""
    largest = [max(float(g.abs().max()) for g in grads) for grads in first_gradients(None)]
    exponents = [min(max(round(1000 * (12 - math.log2(g))), 7000), 24000) for g in largest]
    return {"exponents": exponents, "cooldown": [0] * len(exponents)}


def train(precision: str, num_updates: int = NUM_UPDATES) -> tuple[float, int]:
    """Trains in "float32", with scales for each "resblock", or with one scale "2^k".

    Returns:
        The loss of the last exit, averaged over ten updates, and how many updates were skipped.
    """
    model = falling_model()
    scaler = ResblockGradScaler(model.resblock_parameters())
    scaler.load_state_dict(settled())
    if precision.startswith("2^"):
        scaler.scales.fill_(2.0 ** int(precision[2:]))
        torch.reciprocal(scaler.scales, out=scaler.inverse_scales)
    if precision != "float32":
        model.set_gradient_scales(scaler.scales)
    used = [p for name, p in model.named_parameters() if not name.startswith("text_head")]
    optimizer = torch.optim.AdamW(used, betas=(0.9, 0.96), eps=1e-30, weight_decay=0.0)
    skipped, last = 0, []
    for step in range(num_updates):
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, (step + 1) / 20, 3 * (1 - step / num_updates))
        losses = exit_losses(model, step)
        (losses * EXIT_WEIGHTS).sum().backward()
        if precision != "float32":
            scaler.unscale_()
        if all(p.grad.isfinite().all() for p in used):
            optimizer.step()
        else:
            skipped += 1
        if precision == "resblock":
            scaler.update()
        optimizer.zero_grad()
        last.append(losses[-1].item())
    return sum(last[-10:]) / len(last[-10:]), skipped


def main() -> None:
    """Prints what every single scale does to the first gradients, and where training gets."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print("one scale   resblocks with Inf or NaN   resblocks all zero")
    for k in range(25):
        overflowed, vanished = (", ".join(map(str, found)) or "-" for found in survey(2.0**k))
        print(f"{f'2^{k}':<12}{overflowed:<28}{vanished}")
    print(f"\nloss of the last exit after {NUM_UPDATES} updates (guessing: {math.log(VOCAB_SIZE):.2f})")
    for precision in ("float32", "resblock", *(f"2^{k}" for k in range(0, 25, 4))):
        loss, skipped = train(precision)
        print(f"{precision:<12}{loss:.3f}   {skipped} updates skipped", flush=True)


if __name__ == "__main__":
    main()
