"""moto's S3 server in this process, behind a layer that counts requests and breaks some of them."""

import re
import socket
import threading
from contextlib import contextmanager

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass


class Breakable:
    """A WSGI application that passes requests on, unless `plan` says what happens to them instead.

    `plan` is a list of (method, pattern of the path, fault, times); faults are "503", "cut" (of the answer, half-way),
    "drop" (the request is carried out, but not answered), or a function that is called before the request is passed on.
    """

    def __init__(self, application):
        self.application, self.plan, self.requests = application, [], []

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        for entry in self.plan:
            wanted, pattern, fault, times = entry
            if times and method == wanted and re.search(pattern, path):
                entry[3] -= 1
                return self.broken(fault, environ, start_response)
        return self.application(environ, start_response)

    def broken(self, fault, environ, start_response):
        if callable(fault):
            fault()
            return self.application(environ, start_response)
        if fault == "503":
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        if fault == "drop":
            b"".join(self.application(environ, lambda *_: None))
            hang_up(environ)
        return self.cut(self.application(environ, start_response), environ)

    def cut(self, answer, environ):
        content = b"".join(answer)
        yield content[: len(content) // 2]
        hang_up(environ)

    def count(self, method, pattern=""):
        return sum(1 for each, path in self.requests if each == method and re.search(pattern, path))


def hang_up(environ):
    """Close the connection of a request; an exception alone leaves it open, and the client waiting."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


@contextmanager
def s3_server():
    """Yield the address of a server and its `Breakable`."""
    breakable = Breakable(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, breakable, threaded=True, request_handler=Quiet)
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", breakable
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()
