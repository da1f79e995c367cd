"""A Hub of one's own: what huggingface_hub asks of the real one, from local folders."""

import http.server
import json
import threading
from contextlib import contextmanager
from pathlib import Path


class StandInHub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the Hub, from local folders: refs, the files of a revision, and their content."""

    root = Path()
    fetched: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        folders = sorted(self.root.iterdir())
        commits = {folder.name.replace("global_", ""): f"{i:040x}" for i, folder in enumerate(folders, 1)}
        by_commit = {commits[folder.name.replace("global_", "")]: folder for folder in folders}
        headers, content = {"Content-Type": "application/json"}, b""
        if path.endswith("/refs"):
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in commits.items()]
            content = json.dumps({"branches": refs, "tags": [], "converts": []}).encode()
        elif "/revision/" in path or "/tree/" in path:
            name = path.split("/revision/" if "/revision/" in path else "/tree/")[1].split("/")[0]
            commit = commits.get(name, name)
            files = [file for file in by_commit[commit].iterdir() if file.is_file()]
            if "/tree/" in path:
                listing = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                content = json.dumps(listing).encode()
            else:
                siblings = [{"rfilename": file.name} for file in files]
                content = json.dumps({"id": "some/run", "sha": commit, "siblings": siblings}).encode()
        elif "/resolve/" in path:
            name, file = path.split("/resolve/")[1].split("/", 1)
            commit = commits.get(name, name)
            content = (by_commit[commit] / file).read_bytes()
            if body:
                self.fetched.append(f"{by_commit[commit].name}/{file}")
            headers = {"ETag": f'"{commit}-{file}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def serving(root, fetched=None):
    """The address of a Hub whose repositories all have the folders of `root` as revisions.

    Args:
        root: the folders.
        fetched: a list that grows with every file that is downloaded, "folder/file".
    """
    handler = type("Hub", (StandInHub,), {"root": root, "fetched": [] if fetched is None else fetched})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
