"""`outrider serve` as a process of its own; the server alone in a thread of this one."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from outrider.cluster.serving.gate import App
from outrider.cluster.serving.server import address_of, bind, listen
from outrider.configs.schema import ServerConfig

START_S = 120.0
END_S = 30.0


@dataclass
class Server:
    """One that runs. `lines`: what it has said on stderr."""

    process: "subprocess.Popen[str]"
    url: str = ""
    lines: list[str] = field(default_factory=list)


@contextmanager
def running_server(config: str, overrides: Sequence[str]) -> Iterator[Server]:
    """Starts the command on a free port and waits until it serves; ends it as a system does, by SIGTERM."""
    arguments = ["outrider", "serve", config, "server.port=0", *overrides]
    code = f"import sys; from outrider.cluster.cli.main import run; sys.argv = {arguments!r}; run()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    server, ready = Server(process), threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line)
            if found := re.search(r"serving at (http://\S+)", line):
                server.url = found[1]
                ready.set()
        ready.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        assert ready.wait(START_S)
        assert server.url, "".join(server.lines)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        finally:
            process.kill()
            listener.join()


@contextmanager
def served(app: App) -> Iterator[str]:
    """The URL of an application, which real sockets reach."""
    with bind(ServerConfig(port=0)) as listener:
        listen(listener)
        settings = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield address_of(listener)
        finally:
            server.should_exit = True
            thread.join(END_S)
