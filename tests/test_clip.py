# SPDX-License-Identifier: MIT
"""The ranker."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import CLIP as TINY

from dalle_fast.data import Tokenizer
from dalle_fast.errors import CheckpointError, ConfigError
from dalle_fast.models import CLIP, CLIPConfig


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return CLIP(TINY, Tokenizer.train(["a red circle", "a blue square"] * 5, 280)).eval()


def test_scores_are_cosines(clip):
    images = torch.rand(5, 3, 16, 16)
    scores = clip.score(images, ["a red circle"])
    assert scores.shape == (5,)
    assert scores.abs().max() <= 1.0001
    one_by_one = torch.cat([clip.score(images[i : i + 1], ["a red circle"]) for i in range(5)])
    torch.testing.assert_close(scores, one_by_one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip.encode_text(["a", "b"]).norm(dim=1), torch.ones(2))


def test_captions_end_with_their_own_token(clip):
    ids = clip._tokenize(["a red circle", "", "a red circle " * 30])
    assert ids.shape == (3, 12)
    end = clip.tokenizer.vocab_size + 1
    assert (ids == end).sum(1).tolist() == [1, 1, 1]
    assert ids[1, 0] == end
    assert ids[2, -1] == end  # a long caption is cut, its end stays
    assert ids.argmax(1).tolist() == (ids == end).int().argmax(1).tolist()


def test_pictures_of_any_size_are_resized(clip):
    assert clip.encode_image(torch.rand(2, 3, 40, 40)).shape == (2, 8)


def test_the_loss_treats_equal_captions_as_matches(clip):
    images = torch.rand(4, 3, 16, 16)
    loss = clip.loss(images, ["a", "b", "c", "d"])
    image, text = clip.encode_image(images), clip.encode_text(["a", "b", "c", "d"])
    logits = clip.model.logit_scale.exp() * image @ text.t()
    expected = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(loss, expected)
    same = clip.loss(images[:1].expand(4, -1, -1, -1), ["a"] * 4)
    torch.testing.assert_close(same, torch.log(torch.tensor(4.0)), rtol=1e-4, atol=1e-4)  # nothing to tell apart


def test_named_architectures_come_from_local_files_alone(tmp_path):
    import open_clip

    with pytest.raises(ConfigError, match='architecture: expected "tiny" or a model of open_clip'):
        CLIP(CLIPConfig(architecture="no-such"))
    with pytest.raises(ConfigError, match="checkpoint: architecture RN50 needs local weights, got none"):
        CLIP(CLIPConfig(architecture="RN50"))
    missing = CLIPConfig(architecture="RN50", checkpoint=str(tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError, match=r"x.safetensors: no such file"):
        CLIP(missing)
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"junk.pt: not weights of RN50"):
        CLIP(dataclasses.replace(missing, checkpoint=str(junk)))
    torch.manual_seed(0)
    model = open_clip.create_model("RN50", pretrained=None)
    path = tmp_path / "rn50.pt"
    torch.save(model.state_dict(), path)
    clip = CLIP(dataclasses.replace(missing, checkpoint=str(path))).eval()
    assert clip.image_size == 224
    assert clip.score(torch.rand(1, 3, 32, 32), ["a red heart"]).shape == (1,)


def test_bad_input_is_named(clip):
    with pytest.raises(ConfigError, match="tokenizer: architecture"):
        CLIP(TINY)
    with pytest.raises(ConfigError, match="patch_size: expected a divisor"):
        dataclasses.replace(TINY, patch_size=7)
    with pytest.raises(ValueError, match="captions: expected 1 or 3, got 2"):
        clip.score(torch.rand(3, 3, 16, 16), ["a", "b"])
    with pytest.raises(ValueError, match="images: expected floating"):
        clip.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
