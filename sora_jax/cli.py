"""The command line: `sora-jax COMMAND ...`.

Everything a user can get wrong ends in one line on stderr and exit code 2; Ctrl-C ends with 130. A defect of ours keeps
its traceback and ends with 1. Results go to stdout, everything else to stderr, so that `--json` can be piped.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import math
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from sora_jax import __version__, commands
from sora_jax.errors import NoRoomError, UserError, nearest

PROGRAM = "sora-jax"
OVERRIDE = "--config."
ALONE_HINT = "start it once, outside of their launcher; on a host of a TPU slice with JAX_PLATFORMS=cpu"

STORES = ("aiohttp", "fsspec", "gcsfs", "google")  # packages whose errors are about a store of objects

DESCRIPTION = "Text to video in JAX."
EXAMPLES = """
  sora-jax sample "a red ball bounces on a blue floor"
  sora-jax train --config world --workdir runs/world
  sora-jax COMMAND --help
"""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are `UserError`s that name the nearest right thing."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ", "", message)
        message = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", message)
        message = re.sub(r"invalid float value: (.*)", r"\1 is not a number", message)
        raise UserError(f"{message} (see {self.prog} --help)")

    @property
    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments, with `command` (the module) and `json`, `debug`; raises `UserError`, or SystemExit(0)
    where help or the version was asked for."""
    argv = list(argv)
    if not argv or (argv[0] in ("-h", "--help", "help") and len(argv) == 1):
        print(overview())
        raise SystemExit(0 if argv else 2)
    if argv[0] == "help":
        argv = [argv[1], "--help"]
    if argv[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        raise SystemExit(0)
    name, rest = argv[0], argv[1:]
    if name not in commands.NAMES:
        if name.startswith("-"):
            raise UserError(f"flags come after the command: {PROGRAM} COMMAND {name}; {nearest(name, commands.NAMES)}")
        raise UserError(f'unknown command "{name}"; {nearest(name, commands.NAMES)}')
    module = commands.load(name)
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=module.HELP,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(module.EXAMPLES).strip("\n"), "  "),
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks (also SORA_JAX_DEBUG=1)")

    overrides: list[str] = []
    if getattr(module, "OVERRIDES", False):
        rest, overrides = take_overrides(rest)
    # Intermixed: flags may stand between the positional arguments.
    args, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        flag = next((text for text in unknown if text.startswith("-")), None)
        if flag is None:
            raise UserError(f'unexpected argument "{unknown[0]}" (see {parser.prog} --help)')
        flag = flag.partition("=")[0]
        hint = nearest(flag, parser.flags).partition(" (")[0]  # the list of all flags is what --help is for
        raise UserError(f"unknown flag {flag}; {hint if hint.endswith('?') else f'see {parser.prog} --help'}")
    args.command, args.overrides = module, overrides
    return args


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `--config.a.b=v` (or `--config.a.b v`) from the other arguments; the former come back as "a.b=v".

    >>> take_overrides(["--config", "world", "--config.train.steps=5", "--config.train.seed", "1"])
    (['--config', 'world'], ['train.steps=5', 'train.seed=1'])
    """
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith(OVERRIDE):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix(OVERRIDE).partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
        overrides.append(f"{key}={value}")
    return rest, overrides


def overview() -> str:
    """The help of the whole program, its commands in groups."""
    lines = [f"usage: {PROGRAM} COMMAND [arguments]", "", DESCRIPTION]
    width = max(map(len, commands.NAMES))
    for group, names in commands.GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:{width}}  {commands.load(name).HELP}" for name in names]
    return "\n".join([*lines, "", "examples:", EXAMPLES.strip("\n")])


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv or os.environ.get("SORA_JAX_DEBUG", "") not in ("", "0")
    try:
        with _messages_on_stderr():
            args = parse(argv)
            if getattr(args, "supervise", None) is not None:
                from sora_jax.supervise import supervise

                return supervise(argv, args.workdir, args.supervise, _say)
            with _stdout_for_results():
                document = _run(args)
            return args.command.exit_code(document) if hasattr(args.command, "exit_code") else 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left. Python would complain once more when it flushes stdout on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except NoRoomError as error:
        if debug:
            raise
        _say(f"error: {_one_line(error)}")
        os._exit(2)  # now: threads of Orbax that could not write either would follow with pages of the same
    except (UserError, OSError) as error:
        if debug:
            raise
        _say(f"error: {_one_line(error)}")
        return 2
    except Exception as error:
        reason = store_fault(error)
        if _out_of_memory(error):
            reason = f"out of memory ({_one_line(error)}); ask for fewer frames, a smaller size or batch"
        if debug or not reason:
            raise
        _say(f"error: {reason}")
        return 2


def _run(args: argparse.Namespace) -> object:
    """What the command found out, which is printed as one document where it was asked for."""
    starts_jax = getattr(args.command, "STARTS_JAX", True)
    if starts_jax:
        _announce(args)
    if not getattr(args, "json", False):
        return args.command.run(args)
    with contextlib.redirect_stdout(sys.stderr):
        document = args.command.run(args)
    from sora_jax.runtime import is_chief

    if document is not None and (not starts_jax or is_chief()):
        print(json.dumps(without_nan(document), allow_nan=False))
    return document


def store_fault(error: Exception) -> str:
    """What is wrong with the URL of a path, where that is what `error` is about; empty where it is not. Each kind of
    store has errors of its own: for want of its package, of the network, or of an account's right."""
    text = _one_line(error)
    if isinstance(error, ImportError) and (needs := re.search(r"[Ii]nstall (\w+) to access", text)):
        extra = "'sora-jax[gcs]'" if needs[1] == "gcsfs" else needs[1]
        return f"a URL of a store whose package is not installed: pip install {extra}"
    if isinstance(error, KeyError) and error.args and str(error.args[0]).endswith("://"):
        return f"no store is known by {error.args[0]}: paths are folders, files, or URLs as gs://bucket/folder"
    if type(error).__module__.partition(".")[0] in STORES:
        return f"the store cannot be reached, or not by this account ({type(error).__name__}: {text})"
    return ""


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is not finite is null, as in a run's metrics.

    >>> without_nan({"loss": [1.5, float("nan")]})
    {'loss': [1.5, None]}
    """
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def entry_point() -> NoReturn:
    sys.exit(main())


def _announce(args: argparse.Namespace) -> None:
    """The head of every run: what it runs on, and what stands idle. A command whose `CLUSTER` is True joins the other
    processes of its run first; the head is the first one's to say. One whose `ALONE` is True refuses to be several."""
    from sora_jax.cluster import find_cluster, join_cluster
    from sora_jax.runtime import describe_devices, enable_compile_cache, is_chief, keep_memory

    keep_memory()
    enable_compile_cache()
    cluster = None
    if getattr(args.command, "CLUSTER", False):
        cluster = join_cluster()
    elif getattr(args.command, "ALONE", False) and (found := find_cluster()):
        name = args.command.__name__.rpartition(".")[2]
        raise UserError(f"{name} is the work of one process, and this is one of several ({found.name}): {ALONE_HINT}")
    dtype_of = getattr(args.command, "dtype_of", None)
    devices = describe_devices(dtype_of(args) if dtype_of else getattr(args, "dtype", None) or "auto")
    if not is_chief():
        return
    import jax

    processes = f" · {jax.process_count()} processes ({cluster.name})" if cluster else ""
    _say(f"{__version__} · {devices.line}{processes}", separator=" ")
    for line in devices.idle:
        _say(f"warning: {line}")


@contextlib.contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Warnings and the package's log as one line each."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _say(f"warning: {_one_line(message)}{_mend_cache(message)}")

    logger = logging.getLogger("sora_jax")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    level = logger.level
    # Its tracebacks come to us as errors too, and `store_fault` says them in a line.
    stores = logging.getLogger("gcsfs")

    def told_once(record: logging.LogRecord) -> bool:
        return not record.exc_info

    logger.addHandler(handler)
    stores.addFilter(told_once)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        stores.removeFilter(told_once)
        logger.setLevel(level)


@contextlib.contextmanager
def _stdout_for_results() -> Iterator[None]:
    """What libraries in C++ print goes to stderr: Gloo, by which processes on CPUs talk, counts its peers on stdout."""
    try:
        stdout, stderr = sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError):  # no files, as in a notebook
        yield
        return
    sys.stdout.flush()
    results = open(os.dup(stdout), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
    os.dup2(stderr, stdout)
    try:
        with contextlib.redirect_stdout(results):
            yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what is in C's buffer would come out later, in its old place
        os.dup2(results.fileno(), stdout)
        results.close()


def _mend_cache(message: object) -> str:
    """What was done about a compiled program that JAX could not read."""
    from sora_jax.compile_cache import UNREADABLE, remove_unreadable

    if not str(message).startswith(UNREADABLE):
        return ""
    import jax

    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    removed = remove_unreadable(Path(folder)) if folder else []
    return f"; {len(removed)} removed from {folder}; compiling anew" if removed else "; compiling anew"


def _say(message: str, separator: str = ": ") -> None:
    print(f"{PROGRAM}{separator}{message}", file=sys.stderr, flush=True)


def _out_of_memory(error: Exception) -> bool:
    """Of the host or of a device; XLA has the words for it in errors of several kinds."""
    return isinstance(error, MemoryError) or any(
        word in str(error) for word in ("RESOURCE_EXHAUSTED", "Out of memory allocating")
    )


def _one_line(message: object) -> str:
    if isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"  # without its number
    return " ".join(str(message).split())
