"""
A stand-in for the Hub on this machine, enough of its HTTP API for the official client to create a repository, commit
files to it and read them back.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote


class HubStandIn:
    """
    Repositories in memory, served on a free port of the loopback address.

    Attributes:
        commits (`list[tuple[str, list[str]]]`): Every commit: its repository and the files in it.
        files (`dict[str, dict[str, bytes]]`): What every repository holds.
    """

    def __init__(self):
        self.commits, self.files = [], {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def sha(self, repo_id: str) -> str:
        return hashlib.sha1(repr((repo_id, len(self.commits))).encode()).hexdigest()

    def info(self, repo_id: str) -> dict:
        siblings = [{"rfilename": name} for name in sorted(self.files[repo_id])]
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": self.sha(repo_id),
            "siblings": siblings,
            "private": False,
            "tags": [],
        }

    def commit(self, repo_id: str, lines: bytes) -> dict:
        operations = [json.loads(line) for line in lines.splitlines() if line.strip()]
        added = [operation["value"] for operation in operations if operation["key"] == "file"]
        self.files[repo_id] |= {file["path"]: base64.b64decode(file["content"]) for file in added}
        self.commits.append((repo_id, sorted(file["path"] for file in added)))
        oid = self.sha(repo_id)
        return {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.address}/{repo_id}/commit/{oid}",
            "hookOutput": "",
        }

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, body: bytes | dict | list, status: int = 200, **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def not_found(self, code: str):
                self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = unquote(self.path.split("?")[0]).strip("/").split("/")
                if path == ["api", "repos", "create"]:
                    request = json.loads(body)
                    repo_id = f"{request.get('organization') or 'user'}/{request['name']}"
                    hub.files.setdefault(repo_id, {})
                    self.answer({"url": f"{hub.address}/{repo_id}", "name": repo_id, "id": repo_id})
                elif path == ["api", "validate-yaml"]:
                    self.answer({"errors": [], "warnings": []})
                elif path[4:5] == ["preupload"]:
                    files = json.loads(body)["files"]
                    self.answer(
                        {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                    )
                elif path[4:5] == ["commit"]:
                    self.answer(hub.commit("/".join(path[2:4]), body))
                else:
                    self.not_found("EntryNotFound")

            def do_GET(self):
                path = unquote(self.path.split("?")[0]).strip("/").split("/")
                path = path[1:] if path[0] == "datasets" else path
                is_api = path[:2] in (["api", "models"], ["api", "datasets"])
                repo_id = "/".join(path[2:4] if is_api else path[:2])
                if repo_id not in hub.files:
                    self.not_found("RepoNotFound")
                elif is_api and path[4:5] == ["tree"]:
                    folder = "/".join(path[6:])
                    names = [
                        name for name in sorted(hub.files[repo_id]) if not folder or name.startswith(folder + "/")
                    ]
                    if folder and not names:
                        self.not_found("EntryNotFound")
                    else:
                        self.answer(
                            [
                                {"type": "file", "path": name, "size": len(hub.files[repo_id][name]), "oid": "0" * 40}
                                for name in names
                            ]
                        )
                elif is_api:
                    self.answer(hub.info(repo_id))
                elif path[2] == "resolve" and (name := "/".join(path[4:])) in hub.files[repo_id]:
                    content = hub.files[repo_id][name]
                    etag = hashlib.sha1(content).hexdigest()
                    if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                        part = content[int(wanted[1]) : int(wanted[2] or len(content)) + 1]
                        place = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}"
                        self.answer(part, 206, ETag=f'"{etag}"', Content_Range=place)
                        return
                    self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=hub.sha(repo_id), Accept_Ranges="bytes")
                else:
                    self.not_found("EntryNotFound")

            do_HEAD = do_GET

        return Handler
