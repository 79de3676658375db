# SPDX-License-Identifier: MIT
"""The transformer: the paper's sizes, stream, loss and causality; decoding equals the full forward pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny import DALLE as TINY

from dalle_fast.errors import ConfigError
from dalle_fast.models import DALLE, DALLEConfig
from dalle_fast.presets import paper_dalle


def make(**changes) -> DALLE:
    torch.manual_seed(0)
    model = DALLE(dataclasses.replace(TINY, **changes))
    with torch.no_grad():
        for p in model.parameters():  # the small initial weights hide mistakes
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def data(batch=2):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(300, (batch, 10), generator=generator)
    text[0, 4:] = -1
    return text, torch.randint(16, (batch, 64), generator=generator)


@pytest.mark.parametrize(("size", "width", "heads"), [("2.8b", 1920, 30), ("5.6b", 2688, 42), ("12b", 3968, 62)])
def test_the_papers_sizes(size, width, heads):
    config = paper_dalle(size)
    assert (config.width, config.num_heads, config.num_layers) == (width, heads, 64)
    with torch.device("meta"):
        model = DALLE(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2)
    assert matrices == 64 * 12 * width**2
    total = sum(p.numel() for p in model.parameters())
    assert float(size[:-1]) * 1e9 == pytest.approx(total, rel=0.06)


def test_the_papers_layer_schedule():
    kinds = [DALLEConfig().pattern(layer).kind for layer in range(1, 65)]
    assert kinds[:4] == ["row", "column", "row", "row"]
    assert kinds[63] == "conv"
    assert [i + 1 for i, kind in enumerate(kinds) if kind == "column"] == list(range(2, 63, 4))
    assert (kinds.count("row"), kinds.count("column"), kinds.count("conv")) == (47, 16, 1)
    pattern = DALLEConfig().pattern(1)
    assert (pattern.extent, pattern.length, pattern.kernel) == (33, 1280, 11)


def test_the_stream_is_figure_ten():
    model = make()
    text, image = data()
    x = model.embed_text(text)
    assert x.shape == (2, 10, 32)
    torch.testing.assert_close(x[:, 0], (model.start_of_text + model.text_position[0]).expand(2, -1))
    torch.testing.assert_close(x[1, 3], model.text_embedding.weight[text[1, 2]] + model.text_position[3])
    torch.testing.assert_close(x[0, 4], model.text_embedding.weight[text[0, 3]] + model.text_position[4])
    for slot in range(5, 10):  # a pad of its own for each position, without a position embedding
        torch.testing.assert_close(x[0, slot], model.pad[slot])
    y = model.embed_image(image)
    assert y.shape == (2, 64, 32)
    first = model.start_of_image + model.row_position[0] + model.column_position[0]
    torch.testing.assert_close(y[:, 0], first.expand(2, -1))
    # the slot of token 10 predicts token 11: row 1, column 3
    expected = model.image_embedding.weight[image[:, 10]] + model.row_position[1] + model.column_position[3]
    torch.testing.assert_close(y[:, 11], expected)


def test_the_loss_is_one_eighth_text_and_seven_eighths_image():
    model = make()
    text, image = data()
    states = model(text, image)
    text_ce = F.cross_entropy(model.text_head(states[:, :10]).flatten(0, 1), text.flatten(), ignore_index=-1)
    image_ce = F.cross_entropy(model.image_head(states[:, 10:]).flatten(0, 1), image.flatten())
    out = model.loss(text, image)
    torch.testing.assert_close(out.text_loss, text_ce.detach())
    torch.testing.assert_close(out.image_loss, image_ce.detach())
    torch.testing.assert_close(out.loss, text_ce / 8 + image_ce * 7 / 8)


def test_pads_can_be_predicted():
    model = make(predict_pads=True)
    text, image = data()
    assert model.text_head.out_features == 301
    targets = torch.where(text < 0, 300, text)
    states = model(text, image)
    expected = F.cross_entropy(model.text_head(states[:, :10]).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(text, image).text_loss, expected.detach())


def test_a_batch_without_text_has_a_loss_and_gradients():
    model = make()
    _, image = data()
    out = model.loss(torch.full((2, 10), -1), image)
    assert float(out.text_loss) == 0
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_no_state_depends_on_later_tokens():
    model = make()
    text, image = data()
    states = model(text, image)
    for at in (0, 4, 9):
        changed = text.clone()
        changed[:, at] = (changed[:, at] + 1) % 300
        difference = (model(changed, image) != states).any(-1)
        assert not difference[:, : at + 1].any()
        assert difference[:, at + 1 :].any() or at == 9  # the last caption token is a target only
    for at in (0, 17, 62):
        changed = image.clone()
        changed[:, at] = (changed[:, at] + 1) % 16
        difference = (model(text, changed) != states).any(-1)
        assert not difference[:, : 10 + at + 1].any()
        assert difference[:, 10 + at + 1].all()


def test_a_prefix_has_the_states_of_the_whole():
    model = make()
    text, image = data()
    whole = model(text, image)
    for count in (0, 1, 20, 63):
        part = model(text, image[:, :count])
        torch.testing.assert_close(part, whole[:, : 10 + count + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(text), whole[:, :10], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [2, 6])
def test_decoding_with_the_cache_equals_the_forward_pass(wanted):
    model = make()
    text, _ = data()
    image = torch.randint(16, (wanted, 64), generator=torch.Generator().manual_seed(5))
    full_text = text.repeat_interleave(wanted // 2, 0)
    with torch.no_grad():
        expected = model.image_logits(model(full_text, image)[:, 10:])
        caches = model.prefill(text, wanted)
        for index in range(64):
            last = image[:, index - 1] if index else None
            logits = model.decode(caches, index, last, wanted)
            torch.testing.assert_close(logits, expected[:, index], rtol=1e-4, atol=1e-4)
    assert [c.image_k.shape[2] for c in caches] == [9, 64, 10]


def test_checkpointing_changes_memory_not_gradients():
    text, image = data()
    grads = []
    for on in (False, True):
        model = make()
        model.train()
        model.set_checkpointing(on)
        model.loss(text, image).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_the_identity_path_stays_float32_under_autocast():
    model = make()
    text, image = data()
    kinds = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    seen = []
    model.blocks[0].attention.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model.loss(text, image)
    assert set(kinds) == {torch.float32}
    assert seen == [torch.bfloat16]
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, model.loss(text, image).loss, rtol=3e-2, atol=3e-2)


def test_bad_input_is_named():
    model = make()
    text, image = data()
    with pytest.raises(TypeError, match="text: expected int64"):
        model(text.int(), image)
    with pytest.raises(ValueError, match=r"text: expected \[B, 10\], got \[2, 9\]"):
        model(text[:, :9], image)
    with pytest.raises(ValueError, match=r"text: expected tokens in \[0, 300\) or -1, got -1 to 300"):
        model(torch.where(text == text[1, 0], 300, text), image)
    with pytest.raises(ValueError, match=r"image: expected tokens in \[0, 16\), got 0 to 16"):
        model(text, torch.where(image == 15, 16, image).clamp(0))
    with pytest.raises(ValueError, match="image: expected"):
        model(text, image[:1])
    with pytest.raises(ValueError, match="num_samples: expected a multiple of 2 texts, got 3"):
        model.prefill(text, 3)
    for change, message in (
        ({"width": 0}, "width: expected a positive int"),
        ({"kernel": 4}, "kernel: expected a positive odd int"),
        ({"grid": (0, 4)}, "grid: expected"),
        ({"text_loss_weight": 2.0}, "text_loss_weight: expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(TINY, **change)
