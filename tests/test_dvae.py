# SPDX-License-Identifier: MIT
"""The dVAE against the paper's numbers and a plain float64 transcription of its formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import DVAE as TINY

from dalle_fast.errors import ConfigError
from dalle_fast.models import DVAE, DVAEConfig
from dalle_fast.nn import categorical_kl, logit_laplace_nll, map_pixels, unmap_pixels


@pytest.fixture(scope="module")
def paper():
    with torch.device("meta"):
        return DVAE(DVAEConfig())


def test_the_papers_parameter_counts(paper):
    assert sum(p.numel() for p in paper.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in paper.decoder.parameters()) == 43_829_766


def test_shapes_and_names_of_the_release(paper):
    images = torch.empty(2, 3, 256, 256, device="meta")
    assert paper.grid == (32, 32)
    assert paper.encode_logits(images).shape == (2, 8192, 32, 32)
    assert paper.decode_soft(torch.empty(2, 8192, 32, 32, device="meta")).shape == (2, 6, 256, 256)
    encoder = dict(paper.encoder.named_parameters())
    shapes = {
        "blocks.input.w": (256, 3, 7, 7),
        "blocks.group_1.block_1.res_path.conv_1.w": (64, 256, 3, 3),
        "blocks.group_2.block_1.id_path.w": (512, 256, 1, 1),
        "blocks.group_4.block_2.res_path.conv_4.w": (2048, 512, 1, 1),
        "blocks.output.conv.w": (8192, 2048, 1, 1),
        "blocks.output.conv.b": (8192,),
    }
    for name, shape in shapes.items():
        assert encoder[name].shape == shape
    decoder = dict(paper.decoder.named_parameters())
    shapes = {
        "blocks.input.w": (128, 8192, 1, 1),
        "blocks.group_1.block_1.id_path.w": (2048, 128, 1, 1),
        "blocks.group_1.block_1.res_path.conv_1.w": (512, 128, 1, 1),
        "blocks.group_1.block_1.res_path.conv_4.w": (2048, 512, 3, 3),
        "blocks.output.conv.w": (6, 256, 1, 1),
    }
    for name, shape in shapes.items():
        assert decoder[name].shape == shape
    assert "blocks.group_1.block_2.id_path.w" not in encoder  # equal widths: identity


def test_the_residual_gain_is_one_over_layers_squared(paper):
    assert paper.encoder.blocks.group_3.block_1.post_gain == 1 / 64
    block = DVAE(TINY).encoder.blocks.group_1.block_1
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x), block.id_path(x) + block.res_path(x) / 4)


def test_logit_laplace_is_the_papers_density():
    """exp(-nll) integrates to one over (0, 1), and equals the formula."""
    mu, log_b = 0.4, -0.3
    x = torch.linspace(0, 1, 200_003, dtype=torch.float64)[1:-1]
    stats = torch.tensor([mu, log_b], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 1, len(x))
    nll = logit_laplace_nll(stats, x.view(1, 1, 1, -1)).double().flatten()
    b = math.exp(log_b)
    density = torch.exp(-(torch.logit(x) - mu).abs() / b) / (2 * b * x * (1 - x))
    inner = (x > 0.01) & (x < 0.99)  # float32 holds 1 - x well
    torch.testing.assert_close(nll[inner].exp().reciprocal(), density[inner], rtol=2e-4, atol=1e-6)
    assert float(density.sum() * (x[1] - x[0])) == pytest.approx(1, abs=1e-3)


def test_logit_laplace_gradients():
    stats = torch.randn(2, 6, 3, 3, requires_grad=True)
    x = map_pixels(torch.rand(2, 3, 3, 3))
    logit_laplace_nll(stats, x).sum().backward()
    mu, log_b = stats.detach().chunk(2, 1)
    error = torch.logit(x) - mu
    torch.testing.assert_close(stats.grad[:, :3], -error.sign() * torch.exp(-log_b), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.grad[:, 3:], 1 - error.abs() * torch.exp(-log_b), rtol=1e-4, atol=1e-5)


def test_the_pixel_map_is_inverted_and_clamped():
    x = torch.rand(50)
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    assert map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_kl_to_uniform():
    assert float(categorical_kl(torch.zeros(3, 8192, 2, 2)).abs().max()) < 1e-4
    sure = torch.zeros(1, 8192, 1, 1)
    sure[:, 5] = 100
    assert float(categorical_kl(sure)) == pytest.approx(math.log(8192), rel=1e-5)
    logits = torch.randn(2, 7, 3, 3, dtype=torch.float64)
    q = logits.softmax(1)
    expected = (q * (q * 7).log()).sum(1)
    torch.testing.assert_close(categorical_kl(logits).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_papers():
    """Sum of NLL and beta times sum of KL, by the number of pixel values; KL from the unrelaxed logits."""
    model = DVAE(TINY)
    images = torch.rand(3, 3, 16, 16)
    out = model(images, tau=0.5, beta=6.6, seed=4, offset=2)
    logits = model.encode_logits(images)
    from dalle_fast.ops.gumbel_softmax.reference import gumbel_softmax_reference

    z = gumbel_softmax_reference(logits, 0.5, 1, 4, 2)
    stats = model.decode_soft(z)
    q = F.softmax(logits, 1)
    kl = (q * (q * 16).log()).sum((1, 2, 3))
    nll = logit_laplace_nll(stats, map_pixels(images)).sum((1, 2, 3))
    expected = ((nll + 6.6 * kl) / (16 * 16 * 3)).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.nll + 6.6 * out.kl, out.loss.detach())


def test_tokens_decode_as_their_one_hot():
    model = DVAE(TINY)
    images = torch.rand(2, 3, 16, 16)
    tokens = model.encode(images)
    assert tokens.shape == (2, 8, 8)
    assert torch.equal(tokens, model.encode_logits(images).argmax(1))
    one_hot = F.one_hot(tokens, 16).permute(0, 3, 1, 2).float()
    expected = model.reconstruction(model.decode_soft(one_hot))
    torch.testing.assert_close(model.decode(tokens), expected, rtol=1e-5, atol=1e-6)
    assert 0 <= float(expected.detach().min()) <= float(expected.detach().max()) <= 1


def test_gradients_flow_through_the_relaxation_to_the_encoder():
    model = DVAE(TINY)
    model(torch.rand(2, 3, 16, 16), tau=1.0, beta=0.0).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_shards_see_the_noise_of_the_batch():
    model = DVAE(TINY)
    images = torch.rand(4, 3, 16, 16)
    whole = model(images, tau=1.0, beta=1.0, seed=1, offset=3).stats
    part = model(images[2:], tau=1.0, beta=1.0, seed=1, offset=3, row_offset=2 * 64).stats
    torch.testing.assert_close(whole[2:], part, rtol=1e-5, atol=1e-6)


def test_bad_input_is_named():
    model = DVAE(TINY)
    with pytest.raises(TypeError, match=r"images: expected a floating dtype in \[0, 1\], got torch.uint8"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images: expected"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match=r"tokens: expected values in \[0, 16\), got 3 to 16"):
        model.decode(torch.tensor([[[3, 16]]]))
    with pytest.raises(TypeError, match="tokens: expected int64"):
        model.decode(torch.zeros(1, 2, 2))
    with pytest.raises(ConfigError, match="image_size: expected a multiple of 8, got 100"):
        DVAEConfig(image_size=100)
    with pytest.raises(ConfigError, match="width: expected a multiple of 4"):
        DVAEConfig(width=6)
