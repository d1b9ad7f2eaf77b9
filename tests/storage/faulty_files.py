"""Storage in RAM behind `faulty://`, which counts requests and fails where a test says."""

import fnmatch
from dataclasses import dataclass

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


@dataclass
class Fault:
    """A fault of the requests to some files.

    Attributes:
        request: "read", "write" or "info".
        file: pattern of the file's name.
        error: the exception; None changes a byte of what is read or written instead.
        times: number of requests that fail.
        after: share of the bytes that are written before.
    """

    request: str
    file: str
    error: BaseException | None
    times: int = 1
    after: float = 0.0


class FaultyFiles(MemoryFileSystem):
    protocol = "faulty"
    store, pseudo_dirs = {}, [""]
    calls, faults = [], []

    @classmethod
    def _strip_protocol(cls, path):
        rest = path.removeprefix("faulty://")
        return super()._strip_protocol(rest.rpartition("@")[2])

    @classmethod
    def _fault(cls, request, path):
        name = path.rpartition("/")[2]
        cls.calls.append((request, name))
        for fault in cls.faults:
            if fault.times and fault.request == request and fnmatch.fnmatch(name, fault.file):
                fault.times -= 1
                return fault
        return None

    def info(self, path, **options):
        fault = self._fault("info", path)
        if fault:
            raise fault.error
        return super().info(path, **options)

    def cat_file(self, path, start=None, end=None, **options):
        fault = self._fault("read", path)
        if fault and fault.error:
            raise fault.error
        with self.open(path) as file:
            content = file.read()[start:end]
        return changed(content) if fault else content

    def put_file(self, lpath, rpath, **options):
        fault = self._fault("write", rpath)
        with open(lpath, "rb") as file:  # noqa: PTH123
            content = file.read()
        if fault is None:
            self.pipe_file(rpath, content)
        elif fault.error is None:
            self.pipe_file(rpath, changed(content))
        else:
            if fault.after:
                self.pipe_file(rpath, content[: int(len(content) * fault.after)])
            raise fault.error

    @classmethod
    def content(cls, folder):
        """The files of a folder, by their path inside it."""
        start = f"/{folder}/"
        return {path.removeprefix(start): file.getvalue() for path, file in cls.store.items() if path.startswith(start)}

    @classmethod
    def requests(cls, request):
        """The files of these requests, in order, and forget them."""
        names = [name for kind, name in cls.calls if kind == request]
        cls.calls.clear()
        return names


def changed(content):
    return content[:-1] + bytes([content[-1] ^ 1])


fsspec.register_implementation("faulty", FaultyFiles, clobber=True)
