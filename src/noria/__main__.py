"""The command line: picks the command and imports that one alone."""

import argparse
import contextlib
import importlib
import signal
import sys

import noria
from noria.commands.parser import Parser
from noria.errors import InputError
from noria.launch import mpi
from noria.launch.signals import EndedBySignal, Signals, die_of, raised
from noria.rows.template import template_helper
from noria.tools.keys import nearest
from noria.tools.lossy import hold_standard_streams, lead_nowhere, lossy
from noria.tools.text import printable

COMMANDS = {
    "convert": "makes a checkpoint of a Hugging Face directory",
    "run": "generates: prompts in, generations out (under mpirun, or alone as one rank)",
    "validate": "checks a run without running it: prompts, paths and disk space; needs no GPU and no MPI",
    "plan": "predicts memory, tokens/s and job script lines of a run; needs no GPU and no MPI",
    "probe": "measures a machine: links, memory, matmul, disk and messages (under mpirun, or alone as one rank)",
    "inspect": "says what a checkpoint or an output holds, finished or not",
    "report": "tells how a run went: plan and measurement, time, lengths, errors; in the terminal or as a page of HTML",
    "export": "writes generations as JSON lines, CSV or parquet, in the order of the prompts",
    "merge": "joins the outputs of noria run --shard i/n",
}
UNDER_MPI = ("run", "probe")


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 finished, 2 the user's input is wrong, 1 anything else."""
    hold_standard_streams()
    for number, name in enumerate(("stdout", "stderr"), 1):
        if getattr(sys, name) is None:  # closed by the caller: what is said there is lost, and that is their wish
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - open as long as the process
        if hasattr(getattr(sys, name), "reconfigure"):  # what the terminal cannot show is written as escapes
            getattr(sys, name).reconfigure(errors="backslashreplace")
    with contextlib.redirect_stderr(lossy(sys.stderr)):
        return _main(sys.argv[1:], True) if argv is None else _main(argv)


def _main(argv: list[str], is_last_act: bool = False) -> int:
    try:
        if any("\0" in argument for argument in argv):
            raise InputError("an argument has a NUL character: paths and texts of a run cannot have one")
        code = _answer(argv, is_last_act)
        sys.stdout.flush()
        return code
    except InputError as error:
        if mpi.launched_rank() == 0:  # the ranks of a job have the same error: one of them says it
            sys.stderr.write(f"noria: {printable(str(error))}\n")
            sys.stderr.flush()
        if argv[0] in UNDER_MPI or not mpi.may_be_a_shell():
            mpi.leave_together()
        return 2
    except KeyboardInterrupt as stop:
        if not is_last_act:
            raise
        number = stop.number if isinstance(stop, EndedBySignal) else signal.SIGINT
        sys.stderr.write(f"noria: noria {argv[0]} was ended by {signal.Signals(number).name}\n")
        die_of(number)
        return 1
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"noria: {printable(where + (error.strerror or str(error)))}\n")
        _forget_stdout()
        return 1


def _answer(argv: list[str], is_last_act: bool) -> int:
    if argv == ["help", "keys"]:
        importlib.import_module("noria.commands.keys").write()
        return 0
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    return _command(argv[0], argv[1:], is_last_act) if argv and not argv[0].startswith("-") else _help(argv)


def _forget_stdout() -> None:
    """Lets go of what stdout does not take, else Python complains of it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        lead_nowhere(sys.stdout)


def _command(name: str, argv: list[str], is_last_act: bool) -> int:
    if name not in COMMANDS:
        raise InputError(f"no command {name!r} (known: {', '.join(COMMANDS)}){nearest(name, COMMANDS)}")
    if name not in UNDER_MPI and mpi.launched() > 1 and not (mpi.may_be_a_shell() and mpi.launched_rank() == 0):
        raise InputError(
            f"noria {name} is a program of one process: start it without mpirun (here {mpi.launched()} ranks)"
        )
    if name not in UNDER_MPI:
        with raised():
            return _start(name, argv)
    if name != "run":
        return _start(name, argv)
    # Both before torch, which takes seconds to import: a signal then would end the job unheard, and the process that
    # renders conversations is ready when it is. It must not be started beside MPI, and only rank 0 has use for it.
    is_last_act = is_last_act or mpi.launched() > 1
    with Signals(mpi.launched_rank() == 0, is_last_act) as signals, template_helper() as helper:
        if mpi.named_rank() == 0:
            helper.start()
        return _start(name, argv, signals, helper)


def _start(name: str, argv: list[str], *more: object) -> int:
    command = importlib.import_module(f"noria.commands.{name}")
    parser = Parser(f"noria {name}", description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        meant = parser.behind(argv, unknown[0]) or nearest(unknown[0].split("=")[0], flags)
        raise InputError(f"noria {name} does not know {unknown[0]!r}{meant}")
    return command.run(arguments, *more)


def _help(argv: list[str]) -> int:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {says}" for name, says in COMMANDS.items())
    parser = Parser(
        "noria",
        usage="noria COMMAND ...    (noria help COMMAND says more, noria help keys lists all keys of a run)",
        description="Generates text with language models too large for one GPU, as an MPI batch job.",
        epilog=f"commands:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"noria {noria.__version__}")
    parser.parse_args(argv)
    parser.print_help()
    return 0 if argv else 2


if __name__ == "__main__":
    sys.exit(main())
