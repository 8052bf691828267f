"""The command `tcmu-replication`: what can be typed.

Starting is felt: this module imports click and what is cheap; everything else
is imported by the subcommand that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tcmu_replication import __version__
from tcmu_replication.cli import exits
from tcmu_replication.daemon import places
from tcmu_replication.daemon.places import Context
from tcmu_replication.errors import Error, Kind

PROGRAM = "tcmu-replication"
EPILOG = f"""\b
Exit status:
{exits.table()}

\b
Resource files are {places.CONFIG_DIRECTORY}/NAME.toml, control sockets
{places.RUN_DIRECTORY}/NAME.sock. Options here come before the environment
(TCMU_REPLICATION_CONFIG, _RUN, _HOST), and that before these defaults."""


pass_context = click.make_pass_decorator(Context)


def names_of(context: Context) -> list[str]:
    """The resources that this host has a part in, those in files that are wrong included: it may."""
    from tcmu_replication.daemon import config

    resources, errors = config.load_all(context.config_directory)
    mine = [name for name, resource in resources.items() if resource.is_served_on(context.host)]
    return sorted([*mine, *errors])


def complete_name(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Resource names for the shell, from the names of the files."""
    options = context.find_root().params
    directory = places.config_directory(options.get("config"))
    return sorted(path.stem for path in directory.glob(f"{incomplete}*.toml"))


def one_or_all(function: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments of a command for NAME or --all, and its --json."""
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")(function)
    function = click.option("--all", "everything", is_flag=True, help="Every resource of this host.")(
        function
    )
    return click.argument("name", required=False, shell_complete=complete_name)(function)


@click.group(
    epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--config", metavar="DIR", help="Where the resource files are.")
@click.option("--run", metavar="DIR", help="Where the control sockets are.")
@click.option("--host", metavar="NAME", help="This host's name in the resource files, if not the node name.")
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def cli(context: click.Context, config: str | None, run: str | None, host: str | None) -> None:
    """Replicated block storage for the Linux iSCSI target."""
    context.obj = places.context(config, run, host)


@cli.command()
@pass_context
def daemon(context: Context) -> None:
    """Keep a worker for every resource of this host.

    And for every LUN of another handler of ours. A worker that dies is started
    again. SIGHUP reads the
    resource files again, SIGTERM ends the workers in order.
    """
    from tcmu_replication.daemon import manager

    manager.run(context)


@cli.command()
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("--device", metavar="uioN", help="Serve the LUN behind this UIO device instead of a resource.")
@pass_context
def serve(context: Context, name: str | None, device: str | None) -> None:
    """Serve one resource, or LUN, in the foreground.

    This is the worker that the daemon starts; it is a complete program.
    """
    if (name is None) == (device is None):
        raise click.UsageError("say which: NAME or --device uioN")
    from tcmu_replication.daemon import program, worker

    with program.running(name or device or ""):
        if name is not None:
            worker.serve(name, context)
        elif device is not None:
            worker.serve_device(device, context)


@cli.command()
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a document for NAME, else a list of them.")
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C.")
@pass_context
def status(context: Context, name: str | None, as_json: bool, watch: bool) -> None:
    """Show what resources do.

    Protected or not comes first: whether every write is on both hosts before
    it is acknowledged; since when not, and what to do. With NAME also stage,
    epoch, link, what is dirty, jobs with progress. --watch --json prints a
    document a line. A resource whose worker does not answer is "down". LUNs that
    the kernel has and nobody serves come first, with the reason.

    \b
    Exit status:
      0  every resource that is shown is protected, and every LUN is served
      4  a worker does not answer (down), or nobody serves a LUN
      5  this user may not ask
      8  all answered, and one is not protected
      9  the same, and it ends by itself: disks are compared, or made equal
      10 all answered, and the disk of this host is old for one of them
    """
    from tcmu_replication.cli import status as view

    names = [name] if name else [*names_of(context), *view.device_workers(context.run_directory)]
    view.run(context.run_directory, names, detailed=bool(name), as_json=as_json, watch=watch)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines: a list, one of each LUN.")
@pass_context
def devices(context: Context, as_json: bool) -> None:
    """Show the kernel's LUNs, and who serves each.

    Those of every handler in user space: with the worker and its process, or
    with the reason why nobody serves it, since when, and what to do. What goes
    away by itself, or is mended, heals without a restart of the daemon.

    A LUN of a handler that this host has not is another program's, or has a
    slip of the pen in its configuration: nobody can tell, and it counts as good.

    \b
    Exit status:
      0  every LUN of our handlers is served, or is being taken up
      4  one is not served, or the daemon does not answer
      5  this user may not ask
    """
    from tcmu_replication.cli import devices as view

    view.run(context.run_directory, as_json=as_json)


@cli.command()
@one_or_all
@click.option(
    "--assume-clean", is_flag=True, help="Both disks hold the same data, I know it, do not compare."
)
@click.option("--discard-my-data", is_flag=True, help="On the secondary: what was written to its LUN may go.")
@click.option(
    "--force", is_flag=True, help="On a primary that is not ready: its disk is the one that counts."
)
@click.option("--sync-from", metavar="HOST", help="On the primary, its name: make the secondary equal to it.")
@click.option("--wait", is_flag=True, help="Wait for the comparison of both disks, with a progress bar.")
@pass_context
def start(
    context: Context,
    name: str | None,
    everything: bool,
    as_json: bool,
    assume_clean: bool,
    discard_my_data: bool,
    force: bool,
    sync_from: str | None,
    wait: bool,
) -> None:
    """Begin to replicate. Start the secondary first, then the primary.

    The primary compares both disks, by hash, while its LUN goes on. Until that
    has ended the pair is not protected; status shows how far it is. Disks that
    differ are an error, and nothing more is forwarded: neither goes over the
    other without your word. That is `resync`, or --sync-from with the name of
    the primary at once, for a secondary that is new or has old data.

    --assume-clean is refused where this host knows better: its LUN was written
    while nothing was replicated, or an error or missed writes are recorded.
    """
    chosen = {"assume-clean": assume_clean, "discard-my-data": discard_my_data, "force": force}
    arguments: dict[str, Any] = {key: True for key, wanted in chosen.items() if wanted}
    if sync_from is not None:
        arguments["sync-from"] = sync_from
    names = _command(context, name, everything, as_json, "start", lambda _: arguments, _outcome("started"))
    _warn_of_bare_ports(context, names)
    if wait:
        from tcmu_replication.cli import waiting

        for resource in names:
            waiting.for_comparison(context.run_directory, resource, quiet=as_json)


@cli.command()
@one_or_all
@pass_context
def init(context: Context, name: str | None, everything: bool, as_json: bool) -> None:
    """Make the overlay directory the resource's.

    A new primary serves its disk alone from then on. Without it a primary asks
    the secondary whether it knows of a pair, and is not ready until it is told:
    a directory whose file system is not mounted looks like a new one. The first
    start does the same.
    """
    _command(
        context, name, everything, as_json, "init", lambda _: {}, lambda _: "the directory is its own now"
    )


@cli.command()
@one_or_all
@pass_context
def checkpoint(context: Context, name: str | None, everything: bool, as_json: bool) -> None:
    """Make the present the new baseline.

    On a running primary it moves the pair: new writes are held until both
    hosts have changed over.
    """
    _command(context, name, everything, as_json, "checkpoint", lambda _: {}, _checkpoint_line)


@cli.command()
@one_or_all
@click.option(
    "--to", type=click.Choice(["latest", "checkpoint"]), help="What this host shall hold afterwards."
)
@click.option("--fenced", is_flag=True, help="The old primary is surely off: do not wait until it is silent.")
@click.option("--force", is_flag=True, help="Whatever is lost by it. Read what is said without it first.")
@click.option("--wait", is_flag=True, help="Wait for the commit behind it, with a progress bar.")
@pass_context
def failover(
    context: Context,
    name: str | None,
    everything: bool,
    as_json: bool,
    to: str | None,
    fenced: bool,
    force: bool,
    wait: bool,
) -> None:
    """Make this host the one that counts.

    \b
    --to latest      everything that the primary had acknowledged; this host's own
                     writes since the last checkpoint are dropped. For an initiator
                     that lives on and was told that its writes are safe.
    --to checkpoint  the last checkpoint plus this host's own writes; what the
                     primary wrote since is undone. For a consumer that goes back
                     to the checkpoint itself (a COLO or Remus VM).

    Without --to the resource file's `failover` says which. The LUN is writable
    at once; a commit may run behind (see status).

    It is refused while the primary was heard within the last seconds
    (`dead-after`), and where this host knows that it misses what the primary
    had acknowledged. --fenced is for a cluster manager that has powered the
    primary off; --force gives up what the refusal names.
    """

    def arguments(resource: str) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            key: True for key, wanted in (("fenced", fenced), ("force", force)) if wanted
        }
        if to is not None:
            return {"to": to, **chosen}
        from tcmu_replication.daemon import config

        return {"to": config.find(resource, context.config_directory).failover_to(None), **chosen}

    names = _command(context, name, everything, as_json, "failover", arguments, _failover_line)
    if wait:
        from tcmu_replication.cli import waiting

        for resource in names:
            waiting.for_jobs(context.run_directory, resource, quiet=as_json)


class SizeOption(click.ParamType):
    """A size such as 50M, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click."""
        from tcmu_replication.units import parse_size

        try:
            return value if isinstance(value, int) else 0 if value == "0" else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@cli.command()
@one_or_all
@click.option("--pause/--resume", "paused", default=None, help="Send nothing for now; or go on.")
@click.option("--limit", type=SizeOption(), help="Bytes per second at most, as 50M; 0 for none.")
@pass_context
def resync(
    context: Context,
    name: str | None,
    everything: bool,
    as_json: bool,
    paused: bool | None,
    limit: int | None,
) -> None:
    """On the primary: send the secondary what it misses.

    That begins by itself when the secondary is back, unless the resource file
    says `resync = "manual"`. By hand it is your word too that the data of this
    host is the one that counts, where start has found the disks to differ:
    what only the secondary has is lost. The LUN is used meanwhile; status shows
    how far it is. The secondary can be failed over to its checkpoint throughout.

    Its rate follows the latency of the LUN's own writes. --limit bounds it too,
    --pause keeps it from sending; both are true until the worker ends, and
    begin no resync.
    """
    chosen = {"paused": paused, "limit": limit}
    arguments = {key: value for key, value in chosen.items() if value is not None}
    done = "so it is from now on" if arguments else "the resync has begun"
    _command(context, name, everything, as_json, "resync", lambda _: arguments, lambda _: done)


@cli.command()
@one_or_all
@click.option("--force", is_flag=True, help="Although this host's LUN is in use and would serve old data.")
@pass_context
def stop(context: Context, name: str | None, everything: bool, as_json: bool, force: bool) -> None:
    """Stop replicating without a failover.

    A secondary makes a last checkpoint and then serves its disk.
    """
    arguments = {"force": True} if force else {}
    _command(context, name, everything, as_json, "stop-replication", lambda _: arguments, _outcome("stopped"))


@cli.command()
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@pass_context
def errors(context: Context, name: str | None, as_json: bool) -> None:
    """Show recorded replication errors, and who is not protected.

    Since when, and what to do.

    \b
    Exit status:
      0  no error is recorded, and all are protected
      1  an error is recorded
      8  no error is recorded, but one is not protected
    """
    from tcmu_replication.cli import failures

    failures.run(context.run_directory, [name] if name else names_of(context), as_json=as_json)


@cli.command()
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("--now", is_flag=True, help="Print what is there now, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines: a document a line.")
@pass_context
def events(context: Context, name: str | None, now: bool, as_json: bool) -> None:
    """Follow what happens, a line each: stages, the link, checkpoints, jobs.

    A resource "exists" at the beginning, and when its worker is back; it is
    "down" when that has gone. Ends by Ctrl-C, or when nobody reads any more.
    """
    from tcmu_replication.cli import events as following

    following.run(context.run_directory, [name] if name else names_of(context), now=now, as_json=as_json)


@cli.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines: a list, one of each file.")
@pass_context
def check(context: Context, file: Path | None, as_json: bool) -> None:
    """Check resource files; change nothing.

    Against the disks, overlay directories, addresses, ports, certificates of
    this host, and who else could change them. As root, to see it all.

    Without FILE every resource file is checked.

    \b
    Exit status:
      0  each file is good, perhaps with warnings
      2  a file is wrong, or this host has no part in any of them
    """
    from tcmu_replication.cli import checking

    checking.run([file] if file else None, context, as_json=as_json)


def main() -> None:
    """The entry point: an `Error` becomes one line on standard error and an exit status."""
    try:
        cli.main(prog_name=PROGRAM)
    except Error as error:
        click.echo(f"{PROGRAM}: {error}", err=True)
        sys.exit(exits.STATUS_OF_KIND[error.kind])


def _command(
    context: Context,
    name: str | None,
    everything: bool,
    as_json: bool,
    command: str,
    arguments: Callable[[str], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> list[str]:
    """Give a command to NAME or to all; returns the names."""
    from tcmu_replication.cli import actions

    if (name is None) != everything:
        raise click.UsageError("say which: NAME or --all")
    names = [name] if name else names_of(context)
    if not names:
        raise Error(
            Kind.NOT_FOUND, f"no resource in {context.config_directory} has a part on host {context.host}"
        )
    actions.run(context.run_directory, names, command, arguments, line, as_json=as_json)
    return names


def _warn_of_bare_ports(context: Context, names: list[str]) -> None:
    from tcmu_replication.daemon import config, guards

    resources, _ = config.load_all(context.config_directory)
    for name in names:
        for warning in guards.warnings(resources[name]) if name in resources else ():
            click.echo(f"warning: {name}: {warning}", err=True)


def _outcome(done: str) -> Callable[[dict[str, Any]], str]:
    """The line of a command that QEMU's rules ignore once a replication is done."""

    def line(result: dict[str, Any]) -> str:
        if result.get("ignored"):
            return f"ignored: its replication is in stage {result['stage']}; see tcmu-replication status"
        return done

    return line


def _checkpoint_line(result: dict[str, Any]) -> str:
    if not result:
        return "nothing to do: it does not replicate any more"
    return f"checkpoint: epoch {result['epoch']}, writes were held {result['pause-ms']:.1f} ms"


def _failover_line(result: dict[str, Any]) -> str:
    if not result:
        return "nothing to do: this host counts already"
    return f"failover to {result['to']}: the LUN is writable, stage {result['stage']}"
