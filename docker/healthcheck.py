"""The container's health: exit code 0 if what runs in it is ready. Without an argument that is the server, on
POLYLOGIT_PORT where it does not listen on 8000; with one, the port of `polylogit expert`, which listens once its engine
is loaded."""

import os
import socket
import sys
from http.client import HTTPConnection, HTTPException

if len(sys.argv) > 1:
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=4).close()
    except OSError as error:
        sys.exit(f"not listening: {error}")
    sys.exit(0)

connection = HTTPConnection("127.0.0.1", int(os.environ.get("POLYLOGIT_PORT", "8000")), timeout=4)
try:
    connection.request("GET", "/health/ready")
    response = connection.getresponse()
    print(response.read().decode(errors="replace"))
    sys.exit(response.status != 200)
except (OSError, HTTPException) as error:
    sys.exit(f"not answering: {error}")
