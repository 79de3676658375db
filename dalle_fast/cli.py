# SPDX-License-Identifier: MIT
"""The command line, `dalle-fast <command>`; every flag comes from a config dataclass."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .errors import ConfigError, UserError, shown

_EPILOG = """commands:
  demo       train a small system on real data and write a report
  train      train one stage: dvae, clip or dalle
  tokenize   pictures to dVAE tokens
  sample     caption to ranked pictures
  complete   keep the top of a picture, draw the rest
  evaluate   numbers and a report about a trained system
  plan       memory, traffic and time of training on a cluster, and what limits
  bench      every op and training step beside its peers
  histograms exponents of a run's gradients: constants for 16-bit formats, and the plot
  doctor     what is installed, what is missing, what to do
  pretrain   make the system that ships in the package anew

dalle-fast <command> --help says more; dalle-fast --version says which this is."""


class _Parser(argparse.ArgumentParser):
    """Mistakes are a ConfigError of one line; a mistyped option is named before those that are missing."""

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        check_options(self.prog, args or [], self._option_string_actions)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.removeprefix('dalle-fast ')}: {message}; `{self.prog} --help` lists the options")


def check_options(prog: str, args: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for the first word that looks like an option and is none, nor the start of one."""
    known = list(known)
    for word in args:
        if word == "--":
            return
        name = word.partition("=")[0]
        plain = name.replace("_", "-")
        if not plain.startswith("--") or " " in name or any(option.startswith(plain) for option in known):
            continue
        raise ConfigError(
            f"{prog.removeprefix('dalle-fast ')}: {shown(name)[1:-1]}: no such option{close(plain, known)}"
        )


def close(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word, or none."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _parser(command: str, description: str) -> _Parser:
    return _Parser(
        prog=f"dalle-fast {command}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _add_fields(parser: argparse.ArgumentParser, cls: type, skip: set[str] = frozenset()) -> None:
    """One flag per field of a dataclass of plain values, with its docstring as help."""
    from tyro._docstrings import get_field_docstring

    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        text = (get_field_docstring(cls, field.name, ()) or "").replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help=text)


def _take(cls: type, arguments: argparse.Namespace, skip: set[str] = frozenset()) -> Any:
    names = [field.name for field in dataclasses.fields(cls) if field.name not in skip]
    return cls(**{name: getattr(arguments, name) for name in names})


# ---- commands; torch is slow to import, so each imports what it needs after its flags are read


def _demo(args: list[str]) -> None:
    parser = _parser("demo", "Trains dVAE, CLIP and transformer, samples held-out captions, writes report.html.")
    parser.add_argument("--minutes", type=float, help="allowed for everything together; 25 where nothing is said")
    parser.add_argument("--run", default="runs/demo", help="folder; the same command goes on with what is there")
    parser.add_argument("--data", default="emoji", help="emoji or shapes")
    arguments = parser.parse_args(args)
    from .demo import run_demo

    run_demo(arguments.minutes, arguments.run, arguments.data)


def _train(args: list[str]) -> None:
    parser = _Parser(prog="dalle-fast train", add_help=False, allow_abbrev=False)
    parser.add_argument("stage", nargs="?")
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--run")
    parser.add_argument("--data")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--log-histograms", type=int)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    arguments, rest = parser.parse_known_args(args)
    if arguments.stage not in ("dvae", "clip", "dalle"):
        if arguments.stage is None and arguments.help:
            print(_TRAIN_HELP)
            return
        stages = ("dvae", "clip", "dalle")
        if arguments.stage is None or arguments.stage.startswith("-"):
            raise ConfigError(
                "train: name a stage: dvae (pictures to tokens), clip (ranks pictures) or dalle (transformer)"
            )
        hint = close(arguments.stage, stages)
        raise ConfigError(f"train: expected a stage, dvae, clip or dalle, got {shown(arguments.stage)[1:-1]}{hint}")

    from .presets import preset
    from .train import RECIPES, load_config, run

    config_cls = RECIPES[arguments.stage][0]
    if arguments.config and arguments.preset:
        raise ConfigError("--config, --preset: give one of them")
    if arguments.config:
        start = load_config(config_cls, arguments.config)
    else:
        start = preset(arguments.stage, arguments.preset or "emoji")
    if arguments.help:
        print(_TRAIN_HELP)
        rest = ["--help"]
    config = _with_flags(config_cls, start, rest, f"dalle-fast train {arguments.stage}", parser)
    if arguments.data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=arguments.data))
    if arguments.log_histograms is not None:
        loop = dataclasses.replace(config.loop, log_histograms=arguments.log_histograms)
        config = dataclasses.replace(config, loop=loop)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    if arguments.dry_run:
        from .estimate import estimate

        if first:
            print(estimate(config))
        return
    if not arguments.run:
        raise ConfigError("--run: name a folder for the run, such as runs/mine/" + arguments.stage)
    result = run(config, arguments.run, minutes=arguments.minutes, resume=not arguments.fresh)
    metrics = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    if first:
        print(f"{arguments.stage}: {result.step} updates in {result.run_dir}\n{metrics}")


def _with_flags(config_cls: type, start: Any, args: list[str], prog: str, outer: argparse.ArgumentParser) -> Any:
    """`start` with the fields that flags change; --help prints them and exits."""
    import tyro

    check_options(prog, args, [*_field_flags(start), *outer._option_string_actions])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_cls, default=start, args=args, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", said.getvalue()).split())  # without the frame around it
    text = re.sub(r"^(Parsing error|Value error|Unrecognized options(?= Unrecognized))|Error parsing", "", text)
    text = shown(re.sub(r"(Argument|For full) helptext.*$", "", text).strip(" ,"), 1000)[1:-1]
    raise ConfigError(f"{prog.removeprefix('dalle-fast ')}: {text}; `{prog} --help` lists the options")


def _field_flags(config: Any, where: str = "--") -> list[str]:
    """The flag of every field of a config, --no- ones of bools included."""
    flags = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            flags += _field_flags(value, f"{where}{name}.")
        else:
            flags += [f"{where}{name}", f"{where}no-{name}"] if isinstance(value, bool) else [f"{where}{name}"]
    return flags


_TRAIN_HELP = """usage: dalle-fast train {dvae,clip,dalle} --run FOLDER [options]

  --run FOLDER      the run's folder; the same command goes on with what is there
  --preset NAME     emoji (default), shapes, paper (dvae), paper-2.8b, paper-5.6b, paper-12b (dalle)
  --config FILE     a TOML file, such as the config.toml of another run, in place of a preset
  --data SOURCE     emoji, emoji-styles, shapes, a folder of pictures with .txt captions, or a .tar
  --minutes M       stretch or shrink the run to about M minutes on this machine
  --log-histograms N  every N updates, exponents of the gradients by resblock and the scales: gradients.png (dalle)
  --dry-run         print parameters, FLOPs and memory, and stop
  --fresh           refuse a folder that holds a run already

Stages of one system are siblings: runs/mine/dvae, runs/mine/clip, runs/mine/dalle.
Several processes: torchrun --nproc-per-node 4 -m -- dalle_fast train dalle --run FOLDER [options]
"""


def _tokenize(args: list[str]) -> None:
    parser = _parser("tokenize", "Encodes pictures with a trained dVAE; writes int32 tokens and their captions.")
    parser.add_argument("--run", required=True, help="run folder of the dVAE")
    parser.add_argument("--data", default="emoji", help="emoji, emoji-styles, shapes, a folder or a .tar")
    parser.add_argument("--split", default="all", help="train, heldout, seen or all")
    parser.add_argument("--output", default="tokens.safetensors", help="file; captions go into its metadata")
    arguments = parser.parse_args(args)
    from .sample.tokens import write_tokens

    count = write_tokens(arguments.run, arguments.data, arguments.split, Path(arguments.output), _progress("pictures"))
    print(f"{count} pictures in {arguments.output}")


def _sampling_parser(command: str, description: str) -> argparse.ArgumentParser:
    from .sample import SampleOptions

    parser = _parser(command, description)
    parser.add_argument(
        "--run", default="emoji", help="folder with the runs dvae, dalle and, for ranking, clip; emoji: the pretrained"
    )
    parser.add_argument("--caption", action="append", type=_text, required=True, help="may be given several times")
    parser.add_argument("--output", default="samples", help="folder for PNG and JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    text = "divides the logits; 0 takes the most likely token; default: 1, as in the paper, or 0.7 for the pretrained"
    parser.add_argument("--temperature", type=float, default=argparse.SUPPRESS, help=text)
    _add_fields(parser, SampleOptions, skip={"temperature"})
    return parser


def _text(given: str) -> str:
    """Without bytes of the command line that are no UTF-8."""
    return given.encode("utf-8", "replace").decode()


def _sample_options(arguments: argparse.Namespace) -> Any:
    from .sample import SampleOptions, pretrained

    if not hasattr(arguments, "temperature"):
        own = Path(arguments.run).is_dir() or pretrained.find(arguments.run) is None
        arguments.temperature = SampleOptions.temperature if own else pretrained.TEMPERATURE
    return _take(SampleOptions, arguments)


def _load(arguments: argparse.Namespace):
    from .sample import System
    from .train.run import device_of

    system = System.load(arguments.run, device=device_of(arguments.device))
    if system.name:
        print(f"{system.name}: weights that come with the package, trained earlier; --run takes a run of your own")
    return system


def _finish(result: Any, output: str) -> None:
    from .sample import save_result

    paths = save_result(result, output)
    best = "" if result.scores is None else f", best score {float(result.scores[0]):.3f}"
    print(f"{result.caption}: {len(result.images)} pictures{best}\n  {paths['sheet']}\n  {paths['json']}")


def _sample(args: list[str]) -> None:
    arguments = _sampling_parser("sample", "Draws candidates for captions and ranks them.").parse_args(args)
    options = _sample_options(arguments)
    system = _load(arguments)
    for caption in arguments.caption:
        _finish(system.sample(caption, options, progress=_progress(caption)), arguments.output)


def _complete(args: list[str]) -> None:
    parser = _sampling_parser("complete", "Keeps the top rows of a picture and draws the rest.")
    parser.add_argument("--image", required=True, help="picture; its central square is resized to the model's size")
    parser.add_argument("--keep-rows", type=int, required=True, help="rows of tokens to keep (the paper: 15 of 32)")
    arguments = parser.parse_args(args)
    options = _sample_options(arguments)
    from .data import augment_image, read_image

    system = _load(arguments)
    image = augment_image(read_image(arguments.image), system.dvae.config.image_size, "none")
    for caption in arguments.caption:
        result = system.complete(caption, image, arguments.keep_rows, options, progress=_progress(caption))
        _finish(result, arguments.output)


def _evaluate(args: list[str]) -> None:
    from .evaluate import EvaluationOptions

    parser = _parser("evaluate", "Evaluates a trained system; writes report.html, evaluation.json and sheets.")
    parser.add_argument("--run", required=True, help="folder with the runs dvae, dalle and, for ranking, clip")
    parser.add_argument(
        "--data", default="", help="emoji, emoji-styles, shapes, a folder or a .tar; empty: what it was trained on"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    _add_fields(parser, EvaluationOptions)
    arguments = parser.parse_args(args)
    options = _take(EvaluationOptions, arguments)
    from .evaluate import judge_lines, run_evaluation, write_report
    from .train import DALLETrainConfig, load_config

    system = _load(arguments)
    source = arguments.data or load_config(DALLETrainConfig, Path(arguments.run) / "dalle" / "config.toml").data.source
    report = _progress("captions")
    evaluation = run_evaluation(system, source, options, progress=lambda what, done, total: report(done, total))
    paths = write_report(evaluation, arguments.run)
    print("\n".join([*judge_lines(evaluation.numbers), f"report: {paths['report']}", f"numbers: {paths['json']}"]))


def _plan(args: list[str]) -> None:
    parser = _parser(
        "plan",
        "Memory of a GPU, bytes on the wire and time of a training step on a cluster, before there is one: counted on "
        "the meta device, timed by bytes over rate and a latency a message. Rates that you do not give are a data "
        "sheet's or assumed, not measured.",
    )
    parser.add_argument("--preset", default="paper-12b", help="of the transformer; dalle-12b is the same as paper-12b")
    parser.add_argument("--config", default="", help="TOML file of a transformer's run, in place of a preset")
    parser.add_argument("--gpus", type=int, required=True, help="in all machines")
    parser.add_argument("--link", required=True, help="rate of one machine's link to the others, such as 25Gbit")
    parser.add_argument("--gpus-per-node", type=int, help="in a machine; 8, or all if there are fewer")
    parser.add_argument("--rank", type=int, help="of PowerSGD, in total; the paper's, or a quarter of the width")
    parser.add_argument("--batch", type=int, help="samples of a step on all GPUs; the preset's")
    parser.add_argument("--gpu", default="v100-16gb", help="v100-16gb, a100-80gb or h100-80gb: whose data sheet")
    parser.add_argument("--compute", type=float, help="TFLOP/s that a GPU reaches; assumed: 0.4 of the data sheet")
    parser.add_argument("--intra", help="rate of one GPU's links within a machine, one way; the data sheet's")
    parser.add_argument("--memory", type=float, help="GB of a GPU; the data sheet's")
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds of a message; assumed")
    parser.add_argument("--json", action="store_true", help="all numbers, in bytes and seconds")
    arguments = parser.parse_args(args)
    from .parallel.cluster import cluster_of
    from .plan import plan
    from .presets import preset
    from .train import DALLETrainConfig, load_config

    names = ("gpus", "link", "gpus_per_node", "gpu", "intra", "latency", "compute", "memory")
    cluster = cluster_of(**{name: getattr(arguments, name) for name in names})
    name = re.sub("^dalle-", "paper-", arguments.preset)
    config = load_config(DALLETrainConfig, arguments.config) if arguments.config else preset("dalle", name)
    found = plan(config, cluster, rank=arguments.rank, batch=arguments.batch)
    print(json.dumps(found.as_dict(), indent=2) if arguments.json else found)


def _bench(args: list[str]) -> None:
    parser = _parser(
        "bench", "Times every op and whole training steps beside their peers, each checked against float64."
    )
    parser.add_argument("--ops", "--only", default="", help="rows whose name matches this pattern")
    parser.add_argument("--peers", default="", help="peers whose name matches this pattern")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch and of our kernels; 0: as PyTorch chooses")
    parser.add_argument("--seconds", type=float, default=900.0, help="rows that begin later are timed without peers")
    parser.add_argument("--fresh", action="store_true", help="measure the machine's peaks anew; they are kept else")
    parser.add_argument("--scaling", action="store_true", help="in place of the rows: time against what grows")
    parser.add_argument("--overhead", action="store_true", help="in place of the rows: the cost of a call")
    parser.add_argument("--levels", action="store_true", help="in place of the rows: each op at every CPU level")
    parser.add_argument("--all", action="store_true", help="rows, --scaling and --overhead")
    parser.add_argument("--clone", default="", help="folder with a clone of DALLE-pytorch: one more peer of a step")
    results = {"nargs": "?", "const": "benchmarks/results", "default": ""}
    parser.add_argument("--json", "--out", **results, help="write JSON and a page into this folder; else only print")
    parser.add_argument("--check", default="", help="JSON of a run, or a folder of them: fail where a ratio fell")
    parser.add_argument("--table", default="", help="JSON of a run: print it as a Markdown table and stop")
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="two JSON files: print both and stop")
    arguments = parser.parse_args(args)
    import torch

    from . import bench

    if arguments.table:
        print(bench.markdown(bench.load(arguments.table)))
        return
    if arguments.compare:
        print(bench.compare(*map(bench.load, arguments.compare)))
        return
    for name in ("ops", "peers"):
        try:
            re.compile(getattr(arguments, name))
        except re.error as error:
            raise ConfigError(
                f"--{name}: expected a regular expression, got {getattr(arguments, name)!r}: {error}"
            ) from None
    recorded = bench.records(arguments.check) if arguments.check else None
    if not 0 <= arguments.threads <= (os.cpu_count() or 1):
        raise ConfigError(f"--threads: expected 0 to {os.cpu_count() or 1}, the cores here, got {arguments.threads}")
    if math.isnan(arguments.seconds):
        raise ConfigError(f"--seconds: expected a number, got {arguments.seconds}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = dict(bench.all_rows(arguments.clone))
    if arguments.list:
        print("\n".join(rows))
        return
    facts, table, more = bench.machine(), {"peaks": {}, "rows": []}, {}
    timer = bench.Timer("cpu", budget=3.0)
    if arguments.levels:
        more["levels"] = bench.measure_levels(only=arguments.ops)
    if arguments.all or not (arguments.scaling or arguments.overhead or arguments.levels):
        table = bench.run(
            rows.items(), timer, only=arguments.ops, peers=arguments.peers, seconds=arguments.seconds,
            fresh=arguments.fresh,
        )  # fmt: skip
        if not table["rows"]:
            raise ConfigError(f"--ops: no row matches {arguments.ops!r}; --list prints them")
        print(bench.show(table).split("\n", 2)[0])
    if arguments.all or arguments.scaling:
        more["scaling"] = bench.measure_curves(only=arguments.ops)
    if arguments.all or arguments.overhead:
        more["overhead"] = bench.measure_overheads(arguments.ops)
    if arguments.json:
        whole = arguments.all and not (arguments.ops or arguments.peers)
        path = bench.save(table, Path(arguments.json), facts, whole=whole, **more)
        print(f"{path}\n{path.with_suffix('.html')}")
    wrong = bench.failures(table) + bench.wrong_levels(more.get("levels", []))
    if recorded is not None:
        machine = bench.Peaks(table["peaks"], "of the first attempt")
        again = functools.partial(_measure_again, rows, timer, machine, arguments.peers)
        wrong += bench.check({"machine": facts, "table": table}, recorded, again)
    if wrong:
        raise bench.BenchError("\n".join(["these rows are wrong or have lost:", *wrong]))


def _measure_again(rows: dict, timer: Any, machine: Any, peers: str, name: str) -> dict:
    from . import bench

    return bench.measure(rows[name](), timer, machine, peers=peers)


def _histograms(args: list[str]) -> None:
    parser = _parser("histograms", "What a run with --log-histograms counted: constants for 16-bit formats, a plot.")
    parser.add_argument("--run", required=True, help="run folder of a transformer")
    arguments = parser.parse_args(args)
    from .train.histograms import describe, plot_gradients

    metrics, picture = Path(arguments.run) / "metrics.jsonl", Path(arguments.run) / "gradients.png"
    print(describe(metrics))
    plot_gradients(metrics, picture)
    print(f"plot: {picture}")


def _doctor(args: list[str]) -> None:
    parser = _parser("doctor", "What is installed, what is missing, what to do.")
    parser.add_argument("--json", action="store_true", help="for bug reports")
    arguments = parser.parse_args(args)
    from . import doctor

    doctor.main(as_json=arguments.json)


def _pretrain(args: list[str]) -> None:
    from . import pretrain
    from .sample import pretrained

    parser = _parser("pretrain", "Trains the system that ships in the package, evaluates it, writes 16-bit weights.")
    parser.add_argument("--run", default="runs/pretrained", help="folder; the same command goes on with what is there")
    parser.add_argument("--stage", default="all", help=f"all, or one of {', '.join((*pretrain.STAGES, 'publish'))}")
    parser.add_argument("--steps", type=int, help="updates of the one stage in place of the preset's")
    parser.add_argument("--output", default=str(pretrained.FOLDER / pretrained.DEFAULT), help="folder for the weights")
    arguments = parser.parse_args(args)
    for stage in (*pretrain.STAGES, "publish") if arguments.stage == "all" else (arguments.stage,):
        if stage == "publish":
            print(pretrain.publish(arguments.run, arguments.output))
        else:
            pretrain.train_stage(stage, arguments.run, arguments.steps)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "train": _train,
    "tokenize": _tokenize,
    "sample": _sample,
    "complete": _complete,
    "evaluate": _evaluate,
    "plan": _plan,
    "bench": _bench,
    "histograms": _histograms,
    "doctor": _doctor,
    "pretrain": _pretrain,
}


def _progress(what: str) -> Callable[[int, int], None]:
    """A counter on the terminal; silent elsewhere."""

    def report(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{what[:40]}: {100 * done // max(total, 1):3d} %", end=end, file=sys.stderr, flush=True)

    return report


def main(argv: list[str] | None = None) -> None:
    """Entry point of `dalle-fast`. A user's mistake is one message and exit code 2; Ctrl-C is 130, SIGTERM 143."""
    try:
        for stream in (sys.stdout, sys.stderr):  # a name or caption that the terminal cannot show is no reason to stop
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        _quiet_exit()
        print("\ndalle-fast: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]  # or the interpreter complains at its end
        sys.exit(141)
    except OSError as error:  # a full disk, a folder where a file should be, a file that may not be read
        names = " to ".join(shown(name)[1:-1] for name in (error.filename, error.filename2) if isinstance(name, str))
        sys.exit(_fail(f"{names + ': ' if names else ''}{error.strerror or error}"))
    except MemoryError:
        sys.exit(_fail(_NO_MEMORY))
    except RuntimeError as error:
        number = getattr(error, "signal_number", None)
        if number is not None:
            _quiet_exit()
            print(f"\ndalle-fast: {error}", file=sys.stderr)
            sys.exit(128 + number)
        if type(error).__name__ != "OutOfMemoryError" and not re.search(_ALLOCATION, str(error)):
            raise
        sys.exit(_fail(_NO_MEMORY))


_NO_MEMORY = "not enough memory; `dalle-fast train STAGE --dry-run ...` counts what a model needs"
_ALLOCATION = "can't allocate memory|not enough memory|Storage size calculation overflowed"


def _fail(message: str) -> int:
    print(f"dalle-fast: error: {message}", file=sys.stderr)
    return 2


def _quiet_exit() -> None:
    """From now on Ctrl-C ends the process at once: there is nothing left to tidy that could print a traceback."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"Fast ops and a trainer for text-to-image transformers.\n\n{_EPILOG}")
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"dalle-fast {__version__}")
        return
    if argv[0] not in COMMANDS:
        hint = close(argv[0], COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
        raise ConfigError(f"{shown(argv[0])[1:-1]}: no such command{hint}")
    COMMANDS[argv[0]](argv[1:])
