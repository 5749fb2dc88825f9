"""A server on loopback that answers as much of W&B's interface as runs need, and keeps what it was sent."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Run:
    """What the server was told of a run: its last settings, and the lines of its files by their numbers."""

    told: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, without what the library adds."""
        found = json.loads(self.told["config"])
        return {name: one["value"] for name, one in found.items() if name != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The points in their order."""
        return [json.loads(line) for _, line in sorted(self.files["wandb-history.jsonl"].items())]

    @property
    def summary(self) -> dict[str, Any]:
        """The last value of each metric."""
        found: dict[str, Any] = json.loads(self.files["wandb-summary.json"][0])
        return found


@dataclass
class Server:
    """What was sent."""

    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    used: list[dict[str, Any]] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    refuses: bool = False  # whoever it is

    def graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data that answers a query."""
        name = query.split("(")[0].split("{")[0].split()[-1]
        self.operations.append(name)
        one = getattr(self, f"_{name.lower()}", None)
        return one(given) if one else {}

    def _upsertbucket(self, given: dict[str, Any]) -> dict[str, Any]:
        new = given["name"] not in self.runs
        run = self.runs.setdefault(given["name"], Run())
        run.told |= {name: value for name, value in given.items() if value is not None}
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}}
        lines = len(run.files["wandb-history.jsonl"])
        bucket = {"id": given["name"], "name": given["name"], "displayName": given.get("displayName"), "description": "",
                  "config": run.told.get("config"), "sweepName": None, "project": project, "historyLineCount": lines}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _runresumestatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        if run is None:
            return {"model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}, "bucket": None}}
        lines = [line for _, line in sorted(run.files["wandb-history.jsonl"].items())]
        started = json.dumps(json.loads(run.told["config"])["_wandb"]["value"])
        bucket = {
            "id": given["name"], "name": given["name"], "config": run.told.get("config"), "tags": run.told.get("tags") or [],
            "summaryMetrics": run.files["wandb-summary.json"].get(0, "{}"), "displayName": run.told.get("displayName"),
            "historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "wandbConfig": started,
        }  # fmt: skip
        return {"model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def _viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": "me"}}]}
        return {
            "viewer": {
                "id": "u",
                "entity": "me",
                "username": "me",
                "email": "",
                "flags": "{}",
                "teams": teams,
                "admin": False,
            }
        }

    def _getdefaultentity(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "me"}}

    def _serverfeaturesquery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _artifacttype(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _createartifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given["input"])
        id_ = given["input"]["artifactCollectionName"]
        # committed: the server has its files already, and none are sent
        return {
            "createArtifact": {
                "artifact": {"id": id_, "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            }
        }

    def _createrunfiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _useartifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.used.append(given)
        return {"useArtifact": {"artifact": {"id": given.get("artifactID", "a")}}}

    def _projectinternalid(self, given: dict[str, Any]) -> dict[str, Any]:
        there = given["projectName"] in {run.told["project"] for run in self.runs.values()}
        return {"project": {"id": "p", "internalId": "1"} if there else None}

    def _getprojects(self, given: dict[str, Any]) -> dict[str, Any]:
        node = {"__typename": "Project", "id": "p", "entityName": "me", "createdAt": "2026-01-01T00:00:00",
                "isBenchmark": False, "user": None}  # fmt: skip
        edges = [{"node": {**node, "name": name}} for name in {run.told["project"] for run in self.runs.values()}]
        end = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": end, "edges": edges}}

    def _upsertview(self, given: dict[str, Any]) -> dict[str, Any]:
        self.views.append(given)
        project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        view = {"id": "dmlldw==", "type": given["type"], "name": given["name"], "displayName": given["displayName"],
                "description": given["description"], "project": project, "spec": given["spec"],
                "updatedAt": "2026-01-01T00:00:00"}  # fmt: skip
        return {"upsertView": {"view": view, "inserted": True}}

    def stream(self, id_: str, sent: dict[str, Any]) -> None:
        """Lines of files: each at its number, whatever stood there."""
        for name, part in (sent.get("files") or {}).items():
            for i, line in enumerate(part["content"]):
                self.runs[id_].files[name][part["offset"] + i] = line


@contextmanager
def serve() -> Iterator[Server]:
    """A server that runs as long as the block."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_PUT(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            plain = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            known = self.path == "/graphql" or self.path.endswith("/file_stream")
            sent = json.loads(plain) if known else {}
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                answer = {"data": state.graphql(sent["query"], sent.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                state.stream(self.path.split("/")[-2], sent)
            content = json.dumps(answer).encode()
            self.send_response(401 if state.refuses else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # a client that hangs up is none
                super().handle_error(request, client_address)

    with Quiet(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
