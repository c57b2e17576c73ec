"""A store of objects on this machine, spoken to over HTTP in the protocol of Google Cloud Storage.

The store is `gcp_storage_emulator`. Added to it is what that leaves out and checkpoints rely on (generations that
readers are told and writers may insist on, objects that move), and what a test needs: a place to make the store fail or
wait.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import pytest

pytest.importorskip("gcp_storage_emulator")
if importlib.util.find_spec("gcsfs") is None:  # it reads the environment when it is imported, so not yet
    pytest.skip("could not import 'gcsfs'", allow_module_level=True)

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class ObjectStore(ThreadingHTTPServer):
    """`gs://bucket`, empty. One request at a time changes it."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self) -> None:
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(BUCKET, self.storage)
        self.storage.objects[BUCKET] = {}
        self.refused = ""  # objects whose upload the store refuses: a pattern
        self.held = ""  # objects whose upload it takes and never answers
        self.reached = threading.Event()  # such an upload has come
        self.lock = threading.RLock()
        super().__init__(("127.0.0.1", 0), partial(_Request, self.storage))

    @property
    def environment(self) -> dict[str, str]:
        """What leads TensorStore, gcsfs and Google's own client here, without credentials."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Sizes by name, the listing of the store itself."""
        with self.lock:
            return {item["name"]: int(item["size"]) for item in self.storage.get_file_list(BUCKET, prefix)[0]}

    def read(self, name: str) -> bytes:
        with self.lock:
            return self.storage.get_file(BUCKET, name)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of the store's business."""


class _Request(RequestHandler):
    server: ObjectStore

    generation = ""

    def do_GET(self) -> None:
        url = urlparse(self.path)
        with self.server.lock:
            if parse_qs(url.query).get("alt") == ["media"]:
                self.generation = self._generation(unquote(url.path.rpartition("/o/")[2]))
            super().do_GET()

    def end_headers(self) -> None:
        if self.generation:
            self.send_header("x-goog-generation", self.generation)
        super().end_headers()

    def _generation(self, name: str) -> str:
        return self.server.storage.objects[BUCKET].get(name, {}).get("generation", "0")

    def do_DELETE(self) -> None:
        with self.server.lock:
            super().do_DELETE()

    def do_PUT(self) -> None:
        with self.server.lock:
            super().do_PUT()

    def do_POST(self) -> None:
        url = urlparse(self.path)
        query = parse_qs(url.query)
        name = unquote(query["name"][0]) if "name" in query else ""
        if self.server.held and fnmatch.fnmatch(name, self.server.held):
            self.server.reached.set()
            threading.Event().wait()
        if self.server.refused and fnmatch.fnmatch(name, self.server.refused):
            self._answer(403)  # as a bucket over its quota, or without permission
            return
        if move := re.fullmatch(r".*/o/([^/]+)/moveTo/o/([^/]+)", url.path):
            self._move(*map(unquote, move.groups()))
            return
        with self.server.lock:
            wanted = query.get("ifGenerationMatch", [None])[0]
            if wanted is not None and wanted != self._generation(name):
                self._answer(412)
            else:
                super().do_POST()

    def _move(self, source: str, target: str) -> None:
        storage = self.server.storage
        with self.server.lock:
            if source not in storage.objects[BUCKET]:
                self._answer(404)
                return
            moved = storage.get_file_obj(BUCKET, source) | {"name": target}
            storage.create_file(BUCKET, target, storage.get_file(BUCKET, source), moved)
            storage.delete_file(BUCKET, source)
        self._answer(200, json.dumps(moved).encode())

    def _answer(self, code: int, body: bytes = b"") -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def running_store() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()
