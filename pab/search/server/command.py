"""Serve an index as a web page and a REST interface: `python -m pab.search serve`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

from pab.core.commands import CommandParser
from pab.core.counts import counted
from pab.core.errors import InputError
from pab.search.flags import add_ann_flag, add_device_flag, add_index_flags, add_rerank_flags
from pab.search.index import Index
from pab.search.libraries import library
from pab.search.texts import check_query

PROG = "python -m pab.search serve"
IDLE_S = 5  # seconds until an idle connection is closed
BACKLOG = 128  # connections that may wait to be accepted


def build_parser() -> CommandParser:
    """Build the parser."""
    parser = CommandParser(
        prog=PROG, description="Serve an index as a web page and a REST interface."
    )
    add_index_flags(parser)
    add_rerank_flags(parser)
    output = parser.groups["output"]
    output.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen on; any but a loopback address needs --token (default: 127.0.0.1)",
    )  # fmt: skip
    output.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port, 0 for a free one (default: 8000)"
    )
    output.add_argument("--token", metavar="TEXT", help="secret that clients must send")
    output.add_argument(
        "--example", action="append", default=[], metavar="TEXT",
        help="query to show on the empty page; may be repeated",
    )  # fmt: skip
    parser.groups["speed"].add_argument(
        "--parallel", type=int, metavar="N",
        help="searches at a time; others wait or are refused (default: the number of cores)",
    )  # fmt: skip
    add_ann_flag(parser)
    add_device_flag(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse the command line, load the index and the models, and serve until Ctrl-C.

    Raises:
        InputError: a flag is invalid, a library is not installed, the address or the port cannot be
            used, or the index or a model cannot be used.
    """
    args = build_parser().parse_args(list(argv))
    library("pyarrow.parquet", "search indexes")
    for name in ("fastapi", "uvicorn", "python_multipart"):
        library(name, "the server's page and interface")
    # Imported here, because only the extra `search` installs the libraries.
    import uvicorn

    from pab.search.members import open_encoders
    from pab.search.rerank import check_depth, open_reranker
    from pab.search.server.app import EXAMPLES, create_app
    from pab.search.server.connections import Connection
    from pab.search.server.security import (
        LONGEST_HEADERS,
        SHORTEST_TOKEN,
        Access,
        is_loopback,
    )
    from pab.search.server.service import Service

    if args.token is None and not is_loopback(args.host):
        raise InputError(
            "--host", f"expected --token, because other machines can reach {args.host}, found none",
            todo="make one: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )  # fmt: skip
    if args.token is not None and len(args.token) < SHORTEST_TOKEN:
        problem = f"expected at least {SHORTEST_TOKEN} characters, found {len(args.token)}"
        raise InputError("--token", problem)
    if args.token is not None and not (args.token.isascii() and args.token.isprintable()):
        raise InputError("--token", "expected printable ASCII characters, found others")
    parallel = os.cpu_count() or 1 if args.parallel is None else args.parallel
    if parallel < 1:
        raise InputError("--parallel", f"must be at least 1, found {parallel}")
    check_depth(args.rerank_depth)
    for text in args.example:
        check_query(text, "--example")
    index = Index.open(args.index)
    if not index.rows:
        raise InputError(args.index, "expected an index with images, found none")
    listening = listen(args.host, args.port)
    # A query has few images, and a process with threads should not fork loader processes.
    settings = {"num_workers": 0, **({} if args.device is None else {"device": args.device})}
    more = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    reranker = open_reranker(args.rerank, **settings) if args.rerank else None
    encoders = open_encoders(index, prog=PROG, names=args.members, more=more)
    service = Service(
        index, encoders, reranker=reranker, rerank_depth=args.rerank_depth, ann=args.ann
    )
    access = Access.create(args.host, args.token)
    app = create_app(service, access, parallel, args.example or EXAMPLES)
    config = uvicorn.Config(
        app, http=Connection, ws="none", access_log=False, log_level="error", server_header=False,
        proxy_headers=False, timeout_keep_alive=IDLE_S,
        h11_max_incomplete_event_size=LONGEST_HEADERS,
    )  # fmt: skip
    images = counted(index.rows, "image", spec=",")
    print(f"serving {images} of {args.index} at {address(listening)}", file=sys.stderr)
    uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        InputError: the address or the port cannot be used.
    """
    if not 0 <= port <= 65_535:
        raise InputError("--port", f"expected 0 to 65535, found {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, place = found[0]
        return socket.create_server(place[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--host {host} --port {port}", f"cannot be used: {problem}") from error


def address(listening: socket.socket) -> str:
    """Return the address of the page."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
