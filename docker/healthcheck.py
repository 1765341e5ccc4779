"""The container's health: exit code 0 if the server in it is ready. POLYLOGIT_PORT where it does not listen on 8000."""

import os
import sys
from http.client import HTTPConnection, HTTPException

connection = HTTPConnection("127.0.0.1", int(os.environ.get("POLYLOGIT_PORT", "8000")), timeout=4)
try:
    connection.request("GET", "/health/ready")
    response = connection.getresponse()
    print(response.read().decode(errors="replace"))
    sys.exit(response.status != 200)
except (OSError, HTTPException) as error:
    sys.exit(f"not answering: {error}")
