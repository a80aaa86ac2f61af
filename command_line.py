"""Options and errors, the same for every script."""

import argparse
import atexit
import math
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common import fetch, nearest

DEVICE_HELP = "auto, cpu, cuda, cuda:1; auto is a GPU where there is one"
HUB_HELP = "fetch LlamaGen's files that are not there from the Hugging Face hub, by name (c2i_B_256.pt)"


class Help(argparse.RawDescriptionHelpFormatter):
    """Usage with the required options only; each default after its help."""

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage, [a for a in actions if a.required or not a.option_strings], (), prefix)

    def _get_help_string(self, action):
        default = action.default
        silent = default is None or default is False or default in (math.inf, argparse.SUPPRESS, [])
        if silent or "default" in action.help:
            return action.help
        return f"{action.help} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


SIGNED = {"cfg_scale", "sample_cfg_scale", "cfg_stop"}  # options that may be below 0
POSITIVE = {"batch_size", "code_dim", "codebook_size", "columns", "eval_every", "eval_images", "log_every",
            "max_bad_steps", "max_minutes", "max_steps", "micro_batch_size", "n", "n_random", "size", "text_vocab",
            "usage_window"}  # that cannot be 0
SHARES = {"bad_share", "dropout", "cond_dropout", "model_dropout", "beta1", "beta2"}  # that cannot be above 1


class Parser(argparse.ArgumentParser):
    """argparse as every script has it: names in full, and for a wrong one the nearest right one.

    What is wrong is a ValueError, for cli(). `description` is the script's docstring, whose example --help shows. With
    --hub, published files that are not there are fetched.
    """

    def __init__(self, description, **more):
        more = dict(formatter_class=Help, allow_abbrev=False) | more  # torchrun would abbreviate, too
        super().__init__(description=description, **more)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        for word in args[:1] if self._subparsers else args:  # before argparse misses what was meant
            name = re.fullmatch(r"(--?[A-Za-z][\w-]*)(=.*)?", word, re.DOTALL)
            if name and name[1] not in known:
                hint = ": the command comes first" if self._subparsers else nearest(name[1], known)
                self.error(f"no option {name[1]}{hint}")
        if "--check-data" in args:  # which writes nothing, and needs no tokenizer
            for action in self._actions:
                action.required = action.required and action.dest not in ("out", "vq")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        args = super().parse_args(args, namespace)
        for name, value in vars(args).items():
            for x in value if isinstance(value, list) else [value]:
                if isinstance(x, int | float):
                    self.check_number(name, x)
        if "hub" in args and args.hub:
            for name in ("vq", "gpt", "init"):
                if getattr(args, name, None):
                    setattr(args, name, fetch(getattr(args, name)))
        return args

    def check_number(self, name, x):
        """What no number of any script may be; their own checks say more."""
        low = -math.inf if name in SIGNED else 0
        high = 1 if name in SHARES else math.inf if isinstance(x, float) else 2**63
        if name in POSITIVE and x == 0:
            self.error(f"--{name.replace('_', '-')} has to be above 0, not 0")
        if not (low <= x <= high and math.isfinite(x)) and (name, x) != ("max_minutes", math.inf):
            why = f"{x}" if not math.isfinite(x) else f"{'below 0' if x < low else f'above {high}'}, and is {x}"
            self.error(f"--{name.replace('_', '-')} cannot be {why}")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            name = action.option_strings[0] if action.option_strings else "the command"
            hint = isinstance(value, str) and nearest(value, choices) or f": it is one of {', '.join(choices)}"
            self.error(f"{name} cannot be {value}{hint}")

    def error(self, message):
        raise ValueError(message.removeprefix("argument "))


def add_command(commands, name, run, doc):
    """A subcommand of Parser.add_subparsers() that calls run(args); its example is the line of `doc` that has one."""
    said = run.__doc__ or ""  # nothing under python -OO
    example = next((line for line in (doc or "").splitlines() if f".py {name} " in line), "")
    parser = commands.add_parser(name, help=said, description=f"{said}\n\n{example}")
    parser.set_defaults(run=run)
    return parser


class Heard:
    """What a program says, to a stream that may fail: on a full disk, or where its reader has gone, words are lost and
    the run goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # closed (2>&-)
        with suppress(AttributeError, OSError):
            if self.stream.errors == "strict":
                self.stream.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show

    def __getattr__(self, name):
        if name == "stream":  # of a copy, which has none yet
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self, last=False):
        self._try(self.stream.flush, last=last)

    def _try(self, function, *args, last=False):
        try:
            function(*args)
        except OSError as error:
            if last or isinstance(error, BrokenPipeError):  # what is left is lost, or Python would fail at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def cli(main):
    """Run a script's main(); bad input ends in one sentence and exit code 2 (NANOLLAMAGEN_TRACE=1 shows where)."""
    with redirect_stdout(Heard(sys.stdout)) as out, redirect_stderr(Heard(sys.stderr)) as err:
        try:
            _run(main)
        finally:
            out.flush(last=True)
            err.flush(last=True)


def _run(main):
    try:
        with logging_redirect_tqdm():  # warnings have lines of their own
            main()
    except KeyboardInterrupt:
        if not os.environ.get("NANOLLAMAGEN_TRACE"):
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
            sys.excepthook = lambda *_: None
        raise  # the process dies of the signal, and a shell's loop ends with it
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        killed = str(error).startswith("DataLoader worker")
        if os.environ.get("NANOLLAMAGEN_TRACE") or isinstance(error, RuntimeError) and not (memory or killed):
            raise
        reason = f"out of memory: {str(error).splitlines()[0]}" if memory else error
        if killed:
            reason = f"a process of --workers was killed, perhaps for its memory: give fewer ({error})"
        if isinstance(error, OSError) and error.strerror and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        for bar in list(getattr(tqdm, "_instances", ())):  # the sentence gets a line of its own, and is the last
            bar.close()
        print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
        if torch.distributed.is_initialized():  # its threads may abort the process while the interpreter ends
            with suppress(OSError):
                atexit._run_exitfuncs()  # temporary folders, workers
            sys.stdout.flush()
            os._exit(2)
        sys.exit(2)
