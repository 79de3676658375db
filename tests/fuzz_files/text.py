# SPDX-License-Identifier: MIT
"""tokenizer.json, and the JSON of benchmark results."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from dalle_fast import bench
from dalle_fast.bench.check import least_ratios, ratios_of
from dalle_fast.data import Tokenizer

from .base import CAPTIONS, FileTarget
from .mutate import TEXTS, damaged, json_bytes, json_value, odd_value, replace_entry


class TokenizerTarget(FileTarget):
    """A tokenizer.json: refused, or every text is encoded, with and without dropout, to ids that there are."""

    name = "tokenizer"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.value = json.loads(Tokenizer.train(CAPTIONS, 270).to_json())

    def case(self, rng: Random, folder: Path) -> str | None:
        file = folder / "tokenizer.json"
        value = self._structured(rng) if rng.random() < 0.5 else json_value(rng, self.value)
        if rng.random() < 0.2:
            value = json.loads(json.dumps(self.value))
            del value["model"]["merges"][rng.randrange(5) :]
        content = json.dumps(value).encode()
        file.write_bytes(damaged(rng, content) if rng.random() < 0.4 else content)
        if rng.random() < 0.05:
            replace_entry(rng, file)
        tokenizer = Tokenizer.load(file)
        texts = [*CAPTIONS, *TEXTS, "".join(chr(rng.randrange(1, 0x3000)) for _ in range(50))]
        for ids in (tokenizer.encode(texts, 12), tokenizer.encode(texts, 12, dropout=0.3, counters=range(len(texts)))):
            if ids.shape != (len(texts), 12) or int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < -1:
                return f"ids {int(ids.min())} to {int(ids.max())} of {tokenizer.vocab_size}, shape {list(ids.shape)}"
            tokenizer.decode(ids[0])
        return None

    def _structured(self, rng: Random) -> Any:
        """What the library knows and we do not write."""
        value = json.loads(json.dumps(self.value))
        regex = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        added = {"id": 10**9, "content": "a", "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}  # fmt: skip
        padding = {"strategy": {"Fixed": 1 << 30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                   "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
        changes: list[tuple[str, Any]] = [
            ("pre_tokenizer", rng.choice([None, regex, {"type": "Whitespace"}, odd_value(rng)])),
            ("normalizer", rng.choice([None, {"type": "Lowercase"}, {"type": "Replace", "pattern": {"String": "a"},
                                                                     "content": "a" * 10**5}, odd_value(rng)])),
            ("padding", rng.choice([padding, odd_value(rng)])),
            ("truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
            ("added_tokens", [added]),
            ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
            ("decoder", rng.choice([None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])),
            ("model", {"type": rng.choice(["WordLevel", "Unigram", "WordPiece"]), "vocab": {"a": 0}, "unk_token": "a"}),
        ]  # fmt: skip
        for key, change in rng.sample(changes, rng.choice([1, 1, 2])):
            value[key] = change
        if rng.random() < 0.5:
            model = value["model"]
            vocab = model["vocab"]
            name = rng.choice(list(vocab))
            rng.choice([
                lambda: vocab.update({name: rng.choice([-1, 0, 10**9, 2**32, 2**63])}),
                lambda: vocab.pop(name),
                lambda: model.update(dropout=rng.choice([0.5, 1.0, -1, 2, float("nan")])),
                lambda: model.update(unk_token=name, fuse_unk=True),
                lambda: model.update(continuing_subword_prefix="##", end_of_word_suffix="</w>"),
                lambda: model.update(merges=model.get("merges", []) * 2),
                lambda: model.update(byte_fallback=True, ignore_merges=True),
                lambda: model.update(merges=model.get("merges", []) + [["a", "nothing"]]),
            ])()  # fmt: skip
        return value


class BenchTarget(FileTarget):
    """Results that `bench` compares, prints and checks."""

    name = "bench"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        row = {"name": "dropout fp32 forward", "median_ms": 1.0, "best_ms": 0.9, "floor_ms": 0.5, "share": 0.5,
               "error": 1e-7, "bound": 1e-6, "bytes": 4096, "flops": 0, "memory_mb": 1.0, "cold_ms": 2.0,
               "peers": {"F.dropout": {"median_ms": 3.0, "best_ms": 2.9, "ratio": 3.0, "cold_ms": 4.0,
                                       "memory_mb": 2.0}, "other": "not installed"}}  # fmt: skip
        failed = {"name": "broken", "failed": "does not fit", "peers": {}}
        self.value = {
            "date": "2026-01-01T00:00:00+00:00",
            "machine": {"device": "a CPU", "cpu_level": "AVX2", "threads": 2, "commit": "0" * 40},
            "overhead": [{"name": "dropout", "ours_us": 3.0, "peers": {"F.dropout": 4.0}}],
            "scaling": [{"name": "dropout", "unit": "rows", "points": [
                {"x": 256, "ours_ms": 1.0, "peers": {"F.dropout": 2.0}}, {"x": 512, "ours_ms": 2.0, "peers": {}}]}],
            "table": {"roofs": {"bandwidth": 10.0}, "rows": [row, failed]},
        }  # fmt: skip
        (self.root / "good.json").write_text(json.dumps(self.value))
        for real in sorted(Path("benchmarks/results").glob("*.json"))[:2]:
            (self.root / real.name).write_bytes(real.read_bytes())
        self.good = [bench.load(path) for path in self.root.glob("*.json")]

    def case(self, rng: Random, folder: Path) -> str | None:
        file = folder / "result.json"
        file.write_bytes(json_bytes(rng, self.value))
        if rng.random() < 0.05:
            replace_entry(rng, file)
        report, other = bench.load(file), rng.choice(self.good)
        bench.compare(report, other)
        bench.compare(other, report)
        bench.markdown(report)
        bench.summary([report, other])
        bench.page(report)
        ratios_of(report)
        least_ratios([*bench.records(file), other], other["machine"])
        least_ratios(bench.records(folder), report["machine"])
        return None
