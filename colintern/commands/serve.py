"""`colintern serve`: a search page for a browser."""

import argparse
import errno
import os
import socket
import sys
from contextlib import suppress
from importlib.util import find_spec

from colintern.commands.search import add_source_arguments, open_searcher, require_source
from colintern.core.errors import UserError

SUMMARY = "serve a search page and a JSON endpoint for the pages of a folder or PDF"
EXAMPLE = "colintern serve ~/manuals --port 8000"

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
PACKAGES = ("fastapi", "uvicorn")  # of the extra `serve`
SHUTDOWN_SECONDS = 3  # for requests that are being answered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_source_arguments(parser)
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any (default: %(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: %(default)s, this machine)"
    )


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C, which ends with 0."""
    if missing := [name for name in PACKAGES if not find_spec(name)]:
        raise UserError(
            f"serve: {' and '.join(missing)} not installed; install the extra `serve`: pip install '.[serve]'"
        )
    require_source(args)
    listener = _open_listener(args.host, args.port)  # refused before the pages are embedded, which may take hours
    searcher = open_searcher(args, sys.stdout)
    import uvicorn

    from colintern.search.sources import decode_name
    from colintern.search.web import make_app

    host = f"[{args.host}]" if ":" in args.host else args.host
    app = make_app(searcher, decode_name(args.source.resolve().name), [*LOCAL_NAMES, host, socket.gethostname()])
    print(f"http://{host}:{listener.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
    if host not in LOCAL_NAMES:
        print(f"anyone who can reach {args.host} can read these files: there is no password", file=sys.stderr)
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has ended
        uvicorn.Server(config).run(sockets=[listener])
    print("ended")


def _open_listener(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UserError(f"--port: {port} is not valid; it must be 0 to 65535")
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: {host!r} is no address ({error}); give 127.0.0.1 for this machine alone") from error
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        key, remedy = f"--port: {port}", "give another port, or 0 for any that is free"
        if error.errno == errno.EADDRNOTAVAIL:
            key, remedy = f"--host: {host}", "give an address of this machine"
        reason = os.strerror(error.errno or 0)
        raise UserError(f"{key}: cannot listen on {host}, port {port}: {reason}; {remedy}") from error
