"""`outrider job`: what became of jobs that `outrider submit` sent."""

from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cluster.cli.terminal import AnsweredInterrupt

if TYPE_CHECKING:
    from outrider.cluster.jobs.client import JobEnd, Jobs

JobAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="The job server, as http://HEAD:8265; else RAY_API_SERVER_ADDRESS, or this machine's.",
        show_default=False,
    ),
]
_JobId = Annotated[str, typer.Argument(metavar="ID")]

job = typer.Typer(
    name="job",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Jobs of a Ray cluster: follow, stop, list.",
)


@job.command()
def logs(
    job_id: _JobId,
    address: JobAddress = None,
    follow_it: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
) -> None:
    """Print what a job has printed."""
    jobs = _jobs(address)
    if follow_it:
        end_as(follow(jobs, job_id, stop_on_interrupt=False))
    typer.echo(jobs.logs(job_id), nl=False)


@job.command()
def status(job_id: _JobId, address: JobAddress = None) -> None:
    """Print PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, and what Ray says about it on stderr."""
    details = _jobs(address).details(job_id)
    typer.echo(details.status.value)
    typer.echo(details.message or "", err=True)


@job.command()
def stop(job_id: _JobId, address: JobAddress = None) -> None:
    """Ask a job to end, and wait until it has."""
    typer.echo(_jobs(address).stop(job_id).status)


@job.command("list")
def list_jobs(address: JobAddress = None) -> None:
    """Print the jobs of the cluster, one a line: id, status, command."""
    for details in _jobs(address).all():
        typer.echo(f"{details.submission_id}\t{details.status.value}\t{details.entrypoint}")


def follow(jobs: "Jobs", job_id: str, stop_on_interrupt: bool) -> "JobEnd":
    """Prints what the job prints until it has ended. Ctrl-C leaves it alone, or stops it."""
    try:
        return jobs.follow(job_id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt as interrupt:
        if stop_on_interrupt:
            typer.echo(f"Interrupted: job {job_id} is told to stop", err=True)
            jobs.stop(job_id)
        else:
            typer.echo(
                f"Interrupted: job {job_id} goes on. `outrider job logs -f {job_id}` follows it, "
                f"`outrider job stop {job_id}` stops it",
                err=True,
            )
        raise AnsweredInterrupt from interrupt


def end_as(end: "JobEnd") -> None:
    """Says how a job ended if it did not succeed, and ends this process likewise."""
    if end.exit_code:
        typer.echo(f"job {end.status}: {end.message}", err=True)
    raise typer.Exit(end.exit_code)


def _jobs(address: str | None) -> "Jobs":
    # Ray takes seconds to import.
    from outrider.cluster.jobs.client import Jobs

    return Jobs(address)
