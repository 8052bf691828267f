"""A TCP server that gives back what it gets, and who asks it: `serve PORT` or `ask HOST PORT TIMEOUT`."""

import socket
import sys
import time


def serve(port: int) -> None:
    with socket.create_server(("", port)) as server:
        print("listening", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(4096):
                    connection.sendall(data)


def ask(host: str, port: int, timeout_s: float) -> None:
    """Prints how long one question took, or the error's name with exit status 1."""
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            began = time.monotonic()
            connection.sendall(b"?")
            if connection.recv(1) != b"?":
                raise ConnectionError("closed")
            print(f"{(time.monotonic() - began) * 1000:.1f} ms")
    except OSError as e:
        print(type(e).__name__)
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        ask(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
