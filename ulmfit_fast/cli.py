"""ulmfit-fast pretrain | finetune | classify | predict | info | demo."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from . import __version__, info
from .config import PRESETS, STAGES, field_type

EXAMPLES = {
    "pretrain": "ulmfit-fast pretrain wiki.txt --out runs/general --preset small",
    "finetune": "ulmfit-fast finetune runs/general train.csv --out runs/target",
    "classify": "ulmfit-fast classify runs/target train.csv --valid test.csv --out runs/clf",
    "predict": 'ulmfit-fast predict runs/clf "What a film!"',
    "info": "ulmfit-fast info",
    "demo": "ulmfit-fast demo --out runs/demo",
}
SUMMARIES = {
    "pretrain": "stage 1: train a language model on general text",
    "finetune": "stage 2: fine-tune a language model on the target's text",
    "classify": "stage 3: train a classifier on a language model",
    "predict": "classify text, or continue it with a language model",
    "info": "what is installed, what runs, what is missing",
    "demo": "the three stages on text that every installation has, in minutes",
}
USAGES = {
    "pretrain": "SOURCE [SOURCE ...] --out DIR [options]",
    "finetune": "RUN SOURCE [SOURCE ...] --out DIR [options]",
    "classify": "RUN CSV --out DIR [options]",
    "predict": "RUN [TEXT ...] [options]",
    "info": "[--json]",
    "demo": "[--out DIR] [options]",
}
SOURCES = "text files (one text a line) or CSV files with a column text"


class _Parser(argparse.ArgumentParser):
    """One line on standard error for a wrong command line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        code = arguments.run(arguments) or 0
        sys.stdout.flush()  # here, so that a reader that has gone (`| head`) is noticed inside the try
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 141  # as a program that SIGPIPE ends
    except KeyboardInterrupt as stop:
        print(f"ulmfit-fast: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if arguments.traceback:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"ulmfit-fast {arguments.command}: error: {text}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> argparse.Namespace:
    """Options may stand before, between and behind a command's texts and files."""
    parser, commands = _parsers()
    if argv and argv[0] in commands:
        return commands[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(command=argv[0]))
    return parser.parse_args(argv)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of all commands, and {name: parser} of each."""
    parser = _Parser(
        prog="ulmfit-fast",
        description="ULMFiT's three stages on fused kernels.",
        epilog="Each command explains itself: ulmfit-fast pretrain --help",
    )
    parser.add_argument("--version", action="version", version=f"ulmfit_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, build in (
        ("pretrain", _pretrain),
        ("finetune", _finetune),
        ("classify", _classify),
        ("predict", _predict),
        ("info", _info),
        ("demo", _demo),
    ):
        sub = commands.add_parser(
            name,
            help=SUMMARIES[name],
            description=SUMMARIES[name].capitalize() + ".",
            epilog=f"Example: {EXAMPLES[name]}",
            usage=f"ulmfit-fast {name} {USAGES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        build(sub)
        sub.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser, commands.choices


def _pretrain(sub: _Parser) -> None:
    sub.add_argument("sources", nargs="+", type=pathlib.Path, metavar="SOURCE", help=SOURCES)
    _stage_options(sub, "pretrain", default_preset="ulmfit")
    sub.set_defaults(
        run=lambda a: _train(a, lambda train, options: train.pretrain_lm(a.sources, a.out, **options))
    )


def _finetune(sub: _Parser) -> None:
    sub.add_argument(
        "base_run",
        metavar="RUN",
        help="run directory of stage 1, or a checkpoint with its words: a path or URL (wt103-fwd.tgz)",
    )
    sub.add_argument("sources", nargs="+", type=pathlib.Path, metavar="SOURCE", help=SOURCES)
    _direction_option(sub, "by its name")
    _stage_options(sub, "finetune")
    sub.set_defaults(
        run=lambda a: _train(
            a, lambda train, options: train.finetune_lm(a.base_run, a.sources, a.out, **options)
        )
    )


def _classify(sub: _Parser) -> None:
    sub.add_argument(
        "lm_run",
        metavar="RUN",
        help="run directory of stage 2 or 1, or a checkpoint with its words; - trains without one",
    )
    sub.add_argument("csv", type=pathlib.Path, metavar="CSV", help="CSV file with the columns text and label")
    sub.add_argument(
        "--from-scratch", action="store_true", help="fresh weights, with the vocabulary and sizes of RUN"
    )
    _direction_option(sub, "by its name; without one: forwards")
    _stage_options(sub, "classify")
    sub.set_defaults(
        run=lambda a: _train(
            a,
            lambda train, options: train.train_classifier(
                None if a.lm_run == "-" else a.lm_run,
                a.csv,
                None,
                a.out,
                from_scratch=a.from_scratch,
                **options,
            ),
        )
    )


def _direction_option(sub: _Parser, default: str) -> None:
    sub.add_argument(
        "--backwards",
        dest="option_backwards",
        default=argparse.SUPPRESS,
        type=_boolean,
        metavar="BOOL",
        help=f"whether a checkpoint's model reads texts backwards (default: {default}); a run says it itself",
    )


def _stage_options(sub: _Parser, stage: str, default_preset: str | None = None) -> None:
    """The options that all stages share, and one for each hyper-parameter of the stage's dataclass."""
    sub.add_argument("--out", required=True, metavar="DIR", help="run directory to write")
    sub.add_argument(
        "--preset",
        default=default_preset,
        choices=sorted(PRESETS),
        help=f"sizes and recipe (default: {default_preset or 'that of RUN'})",
    )
    one = stage == "classify"
    sub.add_argument(
        "--valid",
        nargs=None if one else "+",
        type=pathlib.Path,
        metavar="CSV" if one else "SOURCE",
        help="held-out data to measure after each epoch (default: none)",
    )
    sub.add_argument("--resume", action="store_true", help="continue the interrupted run in DIR")
    sub.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    sub.add_argument("--device", help="cpu or cuda (default: cuda where it can be used)")
    sub.add_argument("--quiet", action="store_true", help="no progress, no summary")
    group = sub.add_argument_group("hyper-parameters", "Defaults in brackets: ulmfit / small / tiny.")
    for f in dataclasses.fields(STAGES[stage]):
        kind = field_type(f)
        defaults = [PRESETS[p][stage].get(f.name, f.default) for p in ("ulmfit", "small", "tiny")]
        shown = " / ".join(f"{d:g}" if isinstance(d, float) else str(d).lower() for d in defaults)
        shown = shown if len(set(defaults)) > 1 else shown.split(" / ")[0]
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            dest=f"option_{f.name}",
            default=argparse.SUPPRESS,
            type=_boolean if kind is bool else kind,
            choices=f.metadata["choices"],
            metavar=None if f.metadata["choices"] else kind.__name__.upper(),
            help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"),
        )


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def _train(a: argparse.Namespace, stage: Callable[[Any, dict[str, Any]], Any]) -> None:
    from . import team, train

    options = {k.removeprefix("option_"): v for k, v in vars(a).items() if k.startswith("option_")}
    result = stage(
        train,
        dict(
            preset=a.preset,
            valid=a.valid,
            resume=a.resume,
            overwrite=a.overwrite,
            device=a.device,
            progress=_progress(a),
            **options,
        ),
    )
    if not a.quiet and team.is_first_process():
        figures = result.metrics
        names = ("perplexity", "accuracy")
        said = [f"training {name} {figures[name]:.4g}" for name in names if name in figures]
        said += [f"validation {k} {figures[f'valid_{k}']:.4g}" for k in names if f"valid_{k}" in figures]
        curves = pathlib.Path(a.out) / "curves.png"
        print(f"{a.out}: {', '.join(said)}." + (f" Curves: {curves}" if curves.exists() else ""))


def _progress(a: argparse.Namespace) -> bool | Literal["lines"]:
    """A bar on a terminal, a line per epoch elsewhere."""
    return False if a.quiet else True if sys.stderr.isatty() else "lines"


def _predict(sub: _Parser) -> None:
    sub.add_argument("run_dir", metavar="RUN", help="run directory of a classifier, or of a language model")
    sub.add_argument(
        "texts",
        nargs="*",
        default=[],
        metavar="TEXT",
        help="texts (default: the lines of --file, or of standard input)",
    )
    sub.add_argument("--file", help="a text file, one text a line, or a CSV with a column text")
    sub.add_argument(
        "--average",
        action="append",
        default=[],
        metavar="RUN",
        help="another classifier, whose probabilities are averaged with those of RUN; may be repeated",
    )
    sub.add_argument("--proba", action="store_true", help="all probabilities, as one line of JSON per text")
    sub.add_argument("--tokens", type=int, help="tokens to add (language model; default: 40)")
    sub.add_argument(
        "--temperature",
        type=float,
        help="sampling temperature; 0 picks the most likely token (language model; default: 1)",
    )
    sub.add_argument("--seed", type=int, help="random seed for sampling (language model; default: 0)")
    sub.add_argument("--device", help="cpu or cuda (default: cuda where it can be used)")
    sub.set_defaults(run=_run_predict)


def _run_predict(a: argparse.Namespace) -> None:
    from .corpus import TABLES, read_lines, read_texts, split_lines
    from .ensemble import ClassifierEnsemble
    from .results import TrainedClassifier, TrainedLM, load
    from .runs import CONFIG

    texts = a.texts
    if a.file:  # empty lines too, so that line N of the output is that of line N of the file
        path = pathlib.Path(a.file)
        texts = texts + (read_texts(path, "--file") if path.suffix.lower() in TABLES else read_lines(path))
    elif not texts:
        texts = split_lines(sys.stdin.read().removeprefix("\ufeff"))
    if not texts:
        raise ValueError("no text to predict: give one as an argument, in --file or on standard input")
    result: TrainedLM | TrainedClassifier | ClassifierEnsemble = load(a.run_dir, a.device)
    if a.average:
        for text in a.texts:
            if os.path.isfile(os.path.join(text, CONFIG)):
                raise ValueError(f"{text!r} is a run, not a text: give --average once for each run")
        classifiers: dict[str, TrainedClassifier] = {}
        for run, each in {a.run_dir: result, **{run: load(run, a.device) for run in a.average}}.items():
            if not isinstance(each, TrainedClassifier):
                raise ValueError(f"--average needs classifiers, but {run!r} is a language model's run")
            classifiers[run] = each
        result = ClassifierEnsemble(classifiers[run] for run in (a.run_dir, *a.average))
    if isinstance(result, TrainedLM):
        if a.proba:
            raise ValueError(f"--proba needs a classifier, but {a.run_dir!r} is a language model's run")
        tokens = 40 if a.tokens is None else a.tokens
        if tokens < 0:
            raise ValueError(f"--tokens must be at least 0, got {tokens}")
        temperature = 1.0 if a.temperature is None else a.temperature
        for text in texts:  # one line each, where generate has a line break for xxbos
            print(" ".join(result.generate(text, tokens, temperature, a.seed or 0).split()))
        return
    for name in ("tokens", "temperature", "seed"):
        if getattr(a, name) is not None:
            raise ValueError(f"--{name} needs a language model, but {a.run_dir!r} is a classifier's run")
    for text, row in zip(texts, result.predict_proba(texts), strict=True):
        if a.proba:
            print(json.dumps({str(c): round(float(p), 6) for c, p in zip(result.classes, row, strict=True)}))
        else:
            short = " ".join(text.split())
            short = short if len(short) <= 60 else short[:57] + "..."
            print(f"{result.classes[row.argmax()]}\t{row.max():.1%}\t{short}")


def _info(sub: _Parser) -> None:
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub.set_defaults(run=_run_info)


def _run_info(a: argparse.Namespace) -> None:
    facts = info()
    print(json.dumps(dataclasses.asdict(facts), indent=2) if a.json else facts)


def _demo(sub: _Parser) -> None:
    sub.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="where the runs go (default: runs/demo)"
    )
    sub.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    sub.add_argument("--quiet", action="store_true", help="print only the table")
    sub.set_defaults(run=_run_demo)


def _run_demo(a: argparse.Namespace) -> None:
    from .demo import run_demo, table

    figures = run_demo(
        a.out, seed=a.seed, progress=_progress(a), say=(lambda text: None) if a.quiet else print
    )
    if a.quiet:
        print(table(figures, a.out))


if __name__ == "__main__":
    sys.exit(main())
