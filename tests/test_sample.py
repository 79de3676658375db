# SPDX-License-Identifier: MIT
"""Sampling: seeds, filters, completion, ranking, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import DALLE as TINY
from tiny import small_system
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_fast.errors import CheckpointError, ConfigError, UserError
from dalle_fast.models import DALLE
from dalle_fast.models.dalle import DecodeCache
from dalle_fast.ops import _backend
from dalle_fast.sample import SampleOptions, System, contact_sheet, generate_tokens, rerank, save_result
from dalle_fast.sample import decoder as decoder_module
from dalle_fast.sample.decoder import ImageDecoder
from dalle_fast.sample.generate import filter_logits
from dalle_fast.sample.pictures import file_stem
from dalle_fast.sample.tokens import write_tokens


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return small_system(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="module")
def system(run_dir):
    return System.load(run_dir)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DALLE(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


TEXT = torch.tensor([3, 7, 2, -1, -1, -1, -1, -1, -1, -1])


def test_the_same_seed_gives_the_same_tokens_in_any_batch(model):
    base = generate_tokens(model, TEXT, SampleOptions(num_samples=6, seed=5))
    assert base.shape == (6, 64)
    assert torch.equal(base, generate_tokens(model, TEXT, SampleOptions(num_samples=6, seed=5)))
    small = generate_tokens(model, TEXT, SampleOptions(num_samples=6, seed=5, batch_size=2))
    assert torch.equal(base, small)
    assert torch.equal(base[:3], generate_tokens(model, TEXT, SampleOptions(num_samples=3, seed=5)))
    assert not torch.equal(base, generate_tokens(model, TEXT, SampleOptions(num_samples=6, seed=6)))
    assert len({tuple(row) for row in base.tolist()}) == 6


def test_temperature_zero_is_the_most_likely_token(model):
    tokens = generate_tokens(model, TEXT, SampleOptions(num_samples=2, temperature=0.0))
    assert torch.equal(tokens[0], tokens[1])
    with torch.no_grad():
        logits = model.image_logits(model(TEXT[None], tokens[:1])[:, 10:])
    assert torch.equal(logits.argmax(-1), tokens[:1])
    top1 = generate_tokens(model, TEXT, SampleOptions(num_samples=2, top_k=1))
    assert torch.equal(top1, tokens)


def test_samples_follow_the_models_distribution(model):
    """The first token of many samples against the softmax."""
    with torch.no_grad():
        p = model.image_logits(model(TEXT[None], torch.zeros(1, 0, dtype=torch.int64))[:, 10:]).softmax(-1)[0, 0]
    count = 4000
    with torch.no_grad():
        caches = model.prefill(TEXT[None], 1)
        logits = model.decode(caches, 0, None, 1).expand(count, -1)
        from dalle_fast.sample.generate import _draw

        drawn = _draw(logits, SampleOptions(num_samples=count, seed=3), 0, 0)
    found = torch.bincount(drawn, minlength=16) / count
    assert ((found - p).abs() < 5 * (p * (1 - p) / count).sqrt() + 1e-4).all()


def test_filters_keep_what_they_should():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))
    kept = filter_logits(logits, 2, 1.0).isfinite()
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]
    kept = filter_logits(logits, 0, 0.79).isfinite()
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert filter_logits(logits, 0, 0.01).isfinite().sum(1).tolist() == [1, 1]
    assert torch.equal(filter_logits(logits, 0, 1.0), logits)
    assert torch.equal(filter_logits(logits, 99, 1.0), logits)


def test_guidance_is_the_papers_formula_over_two_texts(model):
    options = SampleOptions(num_samples=1, temperature=0.0, guidance_scale=2.5)
    tokens = generate_tokens(model, TEXT, options)
    with torch.no_grad():
        texts = torch.stack((TEXT, torch.full_like(TEXT, -1)))
        both = model.image_logits(model(texts, tokens.expand(2, -1))[:, 10:])
    guided = both[1] + 2.5 * (both[0] - both[1])
    assert torch.equal(guided.argmax(-1), tokens[0])


def test_a_prefix_is_kept_and_the_rest_drawn_as_if_it_had_been(model):
    options = SampleOptions(num_samples=3, seed=9)
    whole = generate_tokens(model, TEXT, options)
    for kept in (0, 24, 64):
        out = generate_tokens(model, TEXT, options, prefix=whole[1, :kept])
        assert (out[:, :kept] == whole[1, :kept]).all()
        assert torch.equal(out[1], whole[1])


def decoded(decoder, image, kept):
    """Logits of all tokens behind the first `kept`, the image being given."""
    return torch.stack([decoder(image[:, i - 1] if i else None).clone() for i in range(kept, image.shape[1])])


@pytest.mark.parametrize("kept", [0, 20])
def test_a_position_in_device_memory_gives_the_same_bits(model, kept):
    image = torch.randint(16, (3, 64), generator=torch.Generator().manual_seed(1))
    image[:, :kept] = image[0, :kept]
    prefix = image[:1, :kept] if kept else None
    host, device = (ImageDecoder(model, TEXT[None], 3, prefix, count_on_device=on) for on in (False, True))
    assert torch.equal(decoded(host, image, kept), decoded(device, image, kept))
    for a, b in zip(host.caches, device.caches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("possible", [True, False])
def test_one_recorded_step_serves_all_others(model, monkeypatch, possible):
    """The machinery around the CUDA graph, with a stand-in for it: recording runs nothing, a replay runs the step."""
    recordings, replays = [], []

    def record(step, device):
        recordings.append(device)
        result = torch.full((3, 16), torch.nan)

        def replay():
            replays.append(1)
            result.copy_(step())

        return (result, replay) if possible else None

    monkeypatch.setattr(decoder_module, "record", record)
    image = torch.randint(16, (3, 64), generator=torch.Generator().manual_seed(1))
    expected = decoded(ImageDecoder(model, TEXT[None], 3), image, 0)
    decoder = ImageDecoder(model, TEXT[None], 3, count_on_device=True)
    decoder._records = True
    assert torch.equal(decoded(decoder, image, 0), expected)
    assert len(recordings) == 1
    assert len(replays) == (63 if possible else 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="records there")
def test_a_failed_recording_is_a_warning():
    with pytest.warns(RuntimeWarning, match="decoding without a CUDA graph"):
        assert decoder_module.record(lambda: torch.zeros(1), torch.device("cuda")) is None


@pytest.mark.parametrize("kernels", [True, False])
def test_a_step_on_cuda_never_waits_for_the_device(kernels, monkeypatch):
    """Fake CUDA tensors have no values: reading one on the host is an error."""
    monkeypatch.setattr(_backend, "has_room", lambda room, device_type: kernels)
    with FakeTensorMode(), torch.device("cuda"):
        model = DALLE(TINY)
        size = (TINY.num_heads, TINY.head_dim)
        caches = [
            DecodeCache(
                *(torch.empty(1, size[0], TINY.text_len, size[1]) for _ in range(2)),
                *(torch.empty(3, size[0], block.attention.pattern.image_cache_len, size[1]) for _ in range(2)),
            )
            for block in model.blocks
        ]
        index, last = torch.tensor([5]), torch.zeros(3, dtype=torch.int64)
        logits = model.decode(caches, index, last, 3)
    assert logits.shape == (3, 16)
    assert logits.is_cuda


def test_bad_options_are_named(model):
    for change, message in (
        ({"num_samples": 0}, "num_samples: expected an int of at least 1"),
        ({"temperature": -1.0}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"top_k": -1}, "top_k: expected"),
        ({"guidance_scale": -2.0}, "guidance_scale: expected"),
        ({"seed": -1}, "seed: expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            SampleOptions(**change)
    with pytest.raises(ValueError, match="prefix: expected"):
        generate_tokens(model, TEXT, SampleOptions(num_samples=1), prefix=torch.zeros(65, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"image: expected tokens in \[0, 16\)"):
        generate_tokens(model, TEXT, SampleOptions(num_samples=1), prefix=torch.tensor([16]))


def test_results_are_ranked_best_first(system):
    result = system.sample("red heart", SampleOptions(num_samples=5, seed=1))
    assert result.images.shape == (5, 16, 16, 3)
    assert result.images.dtype == np.uint8
    assert (result.scores[:-1] >= result.scores[1:]).all()
    assert sorted(result.order.tolist()) == list(range(5))
    raw = system.decode(result.tokens)
    order, scores = rerank(system.clip, raw, "red heart")
    assert order.tolist() == list(range(5))
    torch.testing.assert_close(scores, result.scores)
    again = system.sample("red heart", SampleOptions(num_samples=5, seed=1))
    assert (again.images == result.images).all()


@pytest.mark.parametrize("caption", ["", "x" * 5_000_000, "שלום עולם", "\ud800", "🦊" * 500])
def test_any_caption_gives_pictures(system, caption):
    assert system.sample(caption, SampleOptions(num_samples=1)).images.shape == (1, 16, 16, 3)


def test_completion_keeps_the_top(system):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8] = 255
    result = system.complete("red heart", image, 4, SampleOptions(num_samples=3))
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    kept = system.dvae.encode(x).flatten()[: 4 * 8]
    assert (result.tokens[:, :32] == kept).all()
    with pytest.raises(UserError, match="keep_rows: expected 0 to 8 rows of tokens, got 9"):
        system.complete("x", image, 9)
    with pytest.raises(ValueError, match="image: expected uint8"):
        system.complete("x", image[:8], 2)


def test_files_hold_everything_needed_to_repeat(system, tmp_path):
    result = system.sample("Red heart / ../x", SampleOptions(num_samples=3, seed=4))
    paths = save_result(result, tmp_path / "out")
    record = json.loads(paths["json"].read_text())
    assert record["caption"] == "Red heart / ../x"
    assert record["options"]["seed"] == 4
    assert [s["rank"] for s in record["samples"]] == [0, 1, 2]
    for s, picture in zip(record["samples"], result.images, strict=True):
        assert (np.asarray(Image.open(tmp_path / "out" / s["file"])) == picture).all()
        assert len(s["tokens"]) == 64
    assert Image.open(paths["sheet"]).size[0] > 300
    assert {p.parent for p in paths.values()} == {tmp_path / "out"}
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="file: the pictures could not be written"):
        save_result(result, blocked)


def test_file_stems_are_harmless():
    assert file_stem("../../etc/passwd") == "etc-passwd"
    assert file_stem("") == file_stem("שלום") == "caption"
    assert len(file_stem("word " * 100)) <= 60


def test_contact_sheets_place_pictures():
    red = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    sheet = contact_sheet([[red, red], [red]], ["one", "two"], headers=["a", "b"], side=32, marks=[["1", "2"], ["3"]])
    pixels = np.asarray(sheet)
    reds = (pixels == [255, 0, 0]).all(-1).sum()
    assert reds == 3 * 32 * 32
    with pytest.raises(ValueError, match="captions: expected one for each of 1 rows, got 0"):
        contact_sheet([[red]], [])


def test_stages_that_do_not_belong_together_are_refused(system, run_dir, tmp_path):
    with pytest.raises(CheckpointError, match="no such run folder"):
        System.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        System.load(tmp_path)
    from dalle_fast.models import DVAE, DVAEConfig

    other = DVAE(DVAEConfig(image_size=16, num_groups=2, width=8, vocab_size=32, decoder_init_width=8))
    with pytest.raises(UserError, match="it was trained on another dVAE"):
        System(other, system.dalle, None, system.tokenizer)


def test_tokens_are_written_with_their_captions(run_dir, tmp_path):
    path = tmp_path / "tokens.safetensors"
    count = write_tokens(run_dir / "dvae", "emoji", "heldout", path)
    with safe_open(path, "pt") as file:
        tokens = file.get_tensor("tokens")
        captions = json.loads(file.metadata()["captions"])
    assert tokens.shape == (count, 8, 8)
    assert len(captions) == count
    with pytest.raises(UserError, match="cannot be written"):
        write_tokens(run_dir / "dvae", "emoji", "heldout", tmp_path / "no" / "folder" / "x")
