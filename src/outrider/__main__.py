"""`python -m outrider`: the command, where it came without its script, as into a job of Ray."""

from outrider.cluster.cli.main import run

if __name__ == "__main__":
    run()
