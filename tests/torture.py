# SPDX-License-Identifier: MIT
"""make torture: runs are killed, cut, starved and damaged at random; each must end as an undisturbed run does.

Every run is a forked child, so that a kill -9 costs a second. What is compared, byte for byte: weights, averages,
optimizer and loop state, and the log without its clock. The seed is printed; the table goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from PIL import Image
from test_train import final_state, log_of
from tiny import dvae_config
from torture_base import SAVE_EVERY, STEPS, Child, dying_at, train
from torture_groups import Groups

from dalle_fast.models import store
from dalle_fast.train.loop import Loop
from dalle_fast.train.run import build

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("dvae", "clip", "dalle")


def multiply_loss(loop: Loop, steps: set[int], value: float) -> None:
    """Multiplies the loss of some steps."""
    loss = loop.recipe.loss

    def spoiled(inputs, rows, step):
        result, metrics = loss(inputs, rows, step)
        return (result * value if step in steps else result), metrics

    loop.recipe.loss = spoiled


def all_finite(run_dir: Path) -> bool:
    """Whether every number of every checkpoint is."""
    files = (run_dir / "checkpoints").glob("step-*/*.safetensors")
    tensors = (t for file in files for t in store.read_tensors(file).values() if t.is_floating_point())
    return all(bool(t.isfinite().all()) for t in tensors)


class Torture(Groups):
    """Of one process."""

    # ---- kills

    def kills(self, kind: str, count: int, inside: int) -> None:
        """kill -9 at a random moment of the run, or at a random phase of a save; then the same command again."""
        seconds = self.undisturbed(kind).seconds
        good, problems, landed = 0, [], 0
        for i in range(count):
            with self.place() as run_dir:
                if i < inside:
                    child = Child(
                        train(self.config(kind), run_dir, dying_at(self.random.randrange(45))), run_dir / "log"
                    )
                else:
                    child = Child(train(self.config(kind), run_dir), run_dir / "log")
                    time.sleep(self.random.uniform(0, seconds))
                    child.kill(signal.SIGKILL)
                landed += child.wait() == -signal.SIGKILL
                again = Child(train(self.config(kind), run_dir), run_dir / "log")
                code = again.wait()
                wrong = self.check(kind, run_dir) if code == 0 else f"exit {code}: {again.log.read_text()[-300:]}"
                good += not wrong
                if wrong:
                    problems.append(f"kill {i}: {wrong}")
        detail = f"{inside} at a phase of a save, {landed} before the run had ended by itself; bit-equal after resume"
        self.note(f"kill -9, {kind}", good, count, detail, problems)

    def terminations(self, kind: str, count: int) -> None:
        """SIGTERM or SIGINT at a random moment, sampling and evaluation included: saved, exit code, bit-equal after."""
        seconds = self.undisturbed(kind).seconds
        good, problems, cut = 0, [], 0
        for i in range(count):
            with self.place() as run_dir:
                child = Child(train(self.config(kind), run_dir), run_dir / "log")
                while (
                    child.poll() is None and not (run_dir / "metrics.jsonl").exists()
                ):  # the loop owns the signals from here on
                    time.sleep(0.005)
                number = self.random.choice((signal.SIGTERM, signal.SIGINT))
                time.sleep(self.random.uniform(0, 0.8 * seconds))
                child.kill(number)
                begin = time.monotonic()
                code = child.wait()
                late = time.monotonic() - begin
                cut += code == 128 + number
                wrong = "" if code in (0, 128 + number) else f"exit {code}"
                if not wrong and code:
                    step = store.read_json(store.find_latest(run_dir) / "state.json")["step"]
                    again = Child(train(self.config(kind), run_dir), run_dir / "log")
                    code = again.wait()
                    wrong = self.check(kind, run_dir) if code == 0 else f"exit {code} after step {step}"
                if late > 10:
                    wrong = wrong or f"ended {late:.1f} s after the signal"
                good += not wrong
                if wrong:
                    problems.append(f"signal {number} in run {i}: {wrong}")
        self.note(
            f"SIGTERM, SIGINT, {kind}", good, count, f"{cut} cut, exit 143 or 130; bit-equal after resume", problems
        )

    def looking(self, what: str, count: int) -> None:
        """SIGTERM or SIGINT inside "evaluate" or "pictures": saved at that step, exit code, bit-equal after."""
        good, problems = 0, []
        for i in range(count):
            with self.place() as run_dir:
                number = self.random.choice((signal.SIGTERM, signal.SIGINT))
                look = self.random.randrange(1, STEPS // 10 + 1)  # sampled every 10 steps

                def signalled(loop: Loop, number=number, look=look) -> None:
                    before = getattr(loop.recipe, what)

                    def wrapped():
                        if loop.step == 10 * look:
                            os.kill(os.getpid(), number)
                        return before()

                    setattr(loop.recipe, what, wrapped)

                child = Child(train(self.config("dalle"), run_dir, change=signalled), run_dir / "log")
                code = child.wait()
                saved = store.find_latest(run_dir)
                wrong = "" if code == 128 + number else f"exit {code}"
                if saved is None or saved.name != f"step-{10 * look:08d}":
                    wrong = wrong or f"saved {saved} at step {10 * look}"
                again = Child(train(self.config("dalle"), run_dir), run_dir / "log")
                wrong = wrong or (
                    f"exit {code} after resume" if (code := again.wait()) else self.check("dalle", run_dir)
                )
                good += not wrong
                if wrong:
                    problems.append(f"signal {number} in look {look} of run {i}: {wrong}")
        self.note(f"signal inside {what}", good, count, "saved there, exit 143 or 130; bit-equal after", problems)

    # ---- damage

    def damages(self, count: int) -> None:
        """A file of the newest checkpoint cut, changed by a bit, emptied or gone: found, the one before it taken."""
        kind = "dalle"
        self.undisturbed(kind)
        source = self.folder / f"whole-{kind}"
        good, problems = 0, []
        for i in range(count):
            with self.place() as place:
                run_dir = place / "run"
                shutil.copytree(source, run_dir)
                newest = store.find_latest(run_dir)
                victim = self.random.choice(sorted(newest.iterdir()))
                content = victim.read_bytes()
                way = self.random.choice(("cut", "bit", "empty", "gone", "longer"))
                at = self.random.randrange(max(len(content), 1))
                if way == "cut":
                    victim.write_bytes(content[:at])
                elif way == "bit":
                    flipped = content[at] ^ 1 << self.random.randrange(8)
                    victim.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
                elif way == "longer":
                    victim.write_bytes(content + b"\0")
                elif way == "empty":
                    victim.write_bytes(b"")
                else:
                    victim.unlink()
                told: list[Exception] = []
                taken = store.find_latest(run_dir, told.append)
                same_bytes = victim.exists() and victim.read_bytes() == content
                fine = same_bytes or (taken is not None and taken != newest and len(told) == 1)
                if fine and not same_bytes and i % 10 == 0:  # and the run goes on from there to the same end
                    again = Child(train(self.config(kind), run_dir), place / "log")
                    fine = again.wait() == 0 and not self.check(kind, run_dir)
                good += fine
                if not fine:
                    problems.append(f"{way} at {at} in {victim.name}: {[str(e) for e in told]}, took {taken}")
        self.note("damaged checkpoint", good, count, "found before a weight changed, the one before it taken", problems)

    def full_disk(self, count: int) -> None:
        """A small tmpfs fills up during a save: one clear error; the run goes on when there is room."""
        good, problems = 0, []
        for _ in range(count):
            mount = Path(tempfile.mkdtemp(dir=self.folder))
            # room for about one and a half checkpoints of this stage
            size = 60 + self.random.randrange(60)
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(mount)], capture_output=True
            )
            if done.returncode:
                self.note("full disk", 0, 0, "not run: mounting a tmpfs needs root", [])
                return
            try:
                config = dvae_config(STEPS, save_every=SAVE_EVERY)
                child = Child(train(config, mount / "run"), self.folder / "disk.log")
                code = child.wait()
                text = child.log.read_text()
                fine = code == 2 and "free some space" in text
                subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
                again = Child(train(config, mount / "run"), self.folder / "disk.log")
                fine = fine and again.wait() == 0
                with self.place() as place:
                    whole = Child(train(config, place / "run"), self.folder / "disk2.log")
                    fine = fine and whole.wait() == 0 and final_state(mount / "run") == final_state(place / "run")
                good += fine
                if not fine:
                    problems.append(f"{size} KiB: exit {code}: {text[-300:]}")
            finally:
                subprocess.run(["umount", "-l", str(mount)], check=False)
        self.note("full disk", good, count, "one clear error, then on to the same end when there is room", problems)

    # ---- data, gradients, company

    def corrupt_data(self) -> None:
        """One picture in a hundred is broken: the run completes, twice the same way, and names them."""
        with self.place() as place:
            data = place / "data"
            data.mkdir()
            generator = random.Random(7)
            bad = set(generator.sample(range(300), 3))
            for i in range(300):
                buffer = io.BytesIO()
                color = tuple(generator.randrange(256) for _ in range(3))
                Image.new("RGB", (24, 24), color).save(buffer, "PNG")
                content = buffer.getvalue()
                (data / f"{i:03}.png").write_bytes(content[: len(content) // 2] if i in bad else content)
                (data / f"{i:03}.txt").write_text(f"picture {i}")
            config = dvae_config(STEPS)
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(data)))
            children = [Child(train(config, place / name), place / f"{name}.log") for name in ("a", "b")]
            codes = [child.wait() for child in children]
            same = codes == [0, 0] and final_state(place / "a") == final_state(place / "b")
            listed = (place / "a" / "replaced.jsonl").read_text() if same else ""
            named = sum(f"{i:03}.png" in listed for i in bad)
            problems = [] if same else [f"exit {codes}: {children[0].log.read_text()[-300:]}"]
            self.note(
                "1 % corrupt pictures", int(same), 1, f"two runs bit-equal; {named} of {len(bad)} named", problems
            )

    def poisoned(self, count: int) -> None:
        """The loss is NaN or Inf at random steps: those updates are skipped, all checkpoints stay finite."""
        good, problems = 0, []
        for i in range(count):
            with self.place() as run_dir:
                steps = set(self.random.sample(range(STEPS), 5))
                value = self.random.choice((float("nan"), float("inf")))

                def spoil(loop: Loop, steps=steps, value=value) -> None:
                    multiply_loss(loop, steps, value)

                child = Child(train(self.config("dalle"), run_dir, change=spoil), run_dir / "log")
                code = child.wait()
                finite = code == 0 and all_finite(run_dir)
                skipped = sum(line.get("skipped", 0) for line in log_of(run_dir)) if code == 0 else 0
                fine = finite and skipped == len(steps)
                good += fine
                if not fine:
                    problems.append(
                        f"run {i}: exit {code}, {skipped} skipped of {len(steps)}: {child.log.read_text()[-300:]}"
                    )
        self.note("NaN or Inf in the loss", good, count, "five updates skipped each, checkpoints finite", problems)

    def spikes(self, count: int) -> None:
        """The loss is 10,000 times what it should be at random steps: clipped, logged, and forgotten."""
        good, problems = 0, []
        config = self.config("dalle", log_every=1)
        with self.place() as run_dir:
            whole = Child(train(config, run_dir), run_dir / "log")
            whole.wait()
            calm = [line for line in log_of(run_dir) if "loss" in line]
        for i in range(count):
            with self.place() as run_dir:
                steps = set(self.random.sample(range(STEPS // 2), 3))

                def spoil(loop: Loop, steps=steps) -> None:
                    multiply_loss(loop, steps, 1e4)

                child = Child(train(config, run_dir, change=spoil), run_dir / "log")
                if code := child.wait():
                    problems.append(f"run {i}: exit {code}: {child.log.read_text()[-300:]}")
                    continue
                lines = [line for line in log_of(run_dir) if "loss" in line]
                wrong = [] if all_finite(run_dir) else ["not finite"]
                for line, expected in zip(lines, calm, strict=True):
                    ratio = line["grad_norm"] / expected["grad_norm"]
                    if not (1e3 < ratio < 1e5 if line["step"] - 1 in steps else 0.1 < ratio < 10):
                        wrong.append(f"grad_norm {line['grad_norm']:.3g} at step {line['step']}")
                ratio = lines[-1]["loss"] / calm[-1]["loss"]
                if not 0.9 < ratio < 1.1:
                    wrong.append(f"final loss {ratio:.3f} of the undisturbed one")
                good += not wrong
                if wrong:
                    problems.append(f"run {i}, steps {sorted(steps)}: {', '.join(wrong)}")
        detail = "three of 10,000 times the loss each: norms logged, weights finite, final loss within 10 %"
        self.note("loss spike", good, count, detail, problems)

    def rivals(self, count: int) -> None:
        """Two trainers in one folder: one is refused in words, the other ends as ever."""
        good, problems = 0, []
        for i in range(count):
            with self.place() as run_dir:
                children = [Child(train(self.config("dvae"), run_dir), self.folder / f"rival{k}.log") for k in range(2)]
                codes = sorted(child.wait() for child in children)
                text = "".join(child.log.read_text() for child in children)
                wrong = self.check("dvae", run_dir)
                # the second may also come when the first is done, and finds nothing left to do
                fine = not wrong and (codes == [0, 0] or (codes == [0, 2] and "is training here already" in text))
                good += fine
                if not fine:
                    problems.append(f"pair {i}: exits {codes}, {wrong}, {text[-300:]}")
        self.note("two trainers in one folder", good, count, "one refused by name, the other bit-equal", problems)

    def soak(self, steps: int) -> None:
        """Memory, files and threads of a long run."""
        with self.place() as run_dir:
            report = run_dir / "soak.json"

            def start() -> None:
                torch.set_num_threads(1)
                config = dvae_config(steps, save_every=steps, log_every=100)
                loop = Loop(build(config, run_dir), run_dir, quiet=True)
                update, points = loop.update, []

                def watched():
                    if loop.step % 100 == 0:
                        pages = int(Path("/proc/self/statm").read_text().split()[1])
                        points.append((loop.step, pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))))
                    return update()

                loop.update = watched
                loop.run()
                report.write_text(json.dumps(points))

            child = Child(start, run_dir / "log")
            code = child.wait()
            if code:
                self.note("soak", 0, 1, f"exit {code}", [child.log.read_text()[-300:]])
                return
            points = json.loads(report.read_text())
            late = points[len(points) // 2 :]
            slope = (late[-1][1] - late[0][1]) / max(late[-1][0] - late[0][0], 1)
            files = late[-1][2] - late[0][2]
            detail = f"{steps} updates: {slope:.0f} bytes of memory an update in the second half, {files} files more"
            self.note("soak", int(slope < 1024 and files == 0), 1, detail, [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each stage, a fifth of them inside a save")
    parser.add_argument("--signals", type=int, default=50, help="SIGTERM and SIGINT")
    parser.add_argument("--damages", type=int, default=200, help="damaged checkpoints")
    parser.add_argument(
        "--groups", type=int, default=20, help="kills in runs of several processes; half as many signals"
    )
    parser.add_argument("--soak", type=int, default=10_000, help="updates")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no OpenMP threads before the forks
    begin = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), options.seed)
        for kind in STAGES:
            torture.kills(kind, options.kills, max(1, options.kills // 5))
        torture.terminations("dvae", options.signals // 2)
        torture.terminations("dalle", options.signals - options.signals // 2)
        for what in ("evaluate", "pictures"):
            torture.looking(what, max(1, options.signals // 10))
        if options.groups:
            torture.group_kills(options.groups)
            torture.group_terminations(max(1, options.groups // 2))
            torture.chains(max(1, options.groups // 6))
        torture.damages(options.damages)
        torture.full_disk(max(1, options.damages // 40))
        torture.corrupt_data()
        torture.poisoned(max(1, options.signals // 10))
        torture.spikes(max(1, options.signals // 10))
        torture.rivals(max(1, options.signals // 10))
        if options.soak:
            torture.soak(options.soak)
    seconds = time.monotonic() - begin
    bad = [row for row in torture.rows if row["good"] != row["of"]]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"torture-{datetime.date.today()}.json"
    facts = {
        "seed": options.seed,
        "seconds": round(seconds),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path.write_text(json.dumps({**facts, "rows": torture.rows}, indent=1) + "\n")
    print(f"{len(torture.rows) - len(bad)} of {len(torture.rows)} rows whole, {seconds:.0f} s, written to {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
