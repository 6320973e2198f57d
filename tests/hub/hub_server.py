"""A stand-in for the Hub: enough of its HTTP API for `huggingface_hub` and `from_pretrained`, in this process.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=TOKEN).create_repo("user/model")

Models only, kept in memory; large files by the basic LFS transfer (set HF_HUB_DISABLE_XET=1). `hub.faults` maps the
number of a request, counted from `hub.requests.clear()`, to what goes wrong there.
"""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, READ_TOKEN, OTHER_TOKEN = "hf_writes0123456789", "hf_reads0123456789", "hf_other0123456789"
USERS = {TOKEN: ("user", True), READ_TOKEN: ("user", False), OTHER_TOKEN: ("somebody", True)}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
LFS_BYTES = 10_000_000


class HubError(Exception):
    """An answer other than 200. `code`: what the Hub says in X-Error-Code; `facts`: more of the answer's JSON."""

    def __init__(self, status, message, code=None, **facts):
        super().__init__(message)
        self.status, self.code, self.facts = status, code, facts


def blob_id(content):
    """git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    """Branches of commits; a commit is {"oid", "parent", "message", "files": {path: (content, is_lfs)}}."""

    def __init__(self, name, private):
        self.name, self.private = name, private
        first = self._commit(None, "initial commit", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        self.commits, self.branches = {first["oid"]: first}, {"main": first["oid"]}

    def _commit(self, parent, message, files):
        facts = [parent, message, sorted((path, blob_id(content)) for path, (content, _) in files.items())]
        oid = hashlib.sha1(json.dumps([self.name, *facts]).encode()).hexdigest()
        return {"oid": oid, "parent": parent, "message": message, "files": files}

    def at(self, revision):
        """The commit of a branch or commit id."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add(self, branch, message, files):
        commit = self._commit(self.at(branch)["oid"], message, files)
        self.commits[commit["oid"]] = commit
        self.branches[branch] = commit["oid"]
        return commit


def entry(path, content, is_lfs):
    """A file as the tree and paths-info answers show it."""
    found = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if is_lfs:
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


class HubServer(ThreadingHTTPServer):
    """The server, in threads of its own. `requests`: "METHOD /path" of everything asked for, in order.

    `faults[n]`, of the n-th request (from 0): a status such as 500; "drop", the connection is cut before anything
    happens; "lose", the request is done but the answer is lost. `sent`: {sha256: times} of uploaded LFS contents.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects = {}, {}
        self.requests, self.faults, self.sent = [], {}, defaultdict(int)
        self.lock = threading.RLock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that goes away in the middle is what the tests are about."""

    def files(self, name, revision="main"):
        """{path: content} of a repository."""
        return {path: content for path, (content, _) in self.repos[name].at(revision)["files"].items()}

    # -- the API; each returns what is sent as JSON

    def repo(self, name, user, writes=False):
        found = self.repos.get(name)
        if found is None or (found.private and (user is None or user[0] != name.split("/")[0])):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if writes:
            self.check_writes(name.split("/")[0], user)
        return found

    def check_writes(self, owner, user):
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user[0] != owner or not user[1]:
            raise HubError(403, f'You don\'t have the rights to write to the namespace "{owner}"')

    def create(self, user, body):
        owner = body.get("organization") or (user or ["?"])[0]
        self.check_writes(owner, user)
        name = f"{owner}/{body['name']}"
        address = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            raise HubError(409, "You already created this model repo", **address)
        self.repos[name] = Repo(name, body.get("visibility") == "private" or bool(body.get("private")))
        return address

    def info(self, name, user, revision):
        repo = self.repo(name, user)
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit["files"])]
        return {"id": name, "modelId": name, "sha": commit["oid"], "private": repo.private, "tags": [], "downloads": 0,
                "siblings": siblings}  # fmt: skip

    def tree(self, name, user, revision, folder, recursive):
        found, folders = [], set()
        for path, (content, is_lfs) in sorted(self.repo(name, user).at(revision)["files"].items()):
            if folder and not path.startswith(folder + "/"):
                continue
            rest = path[len(folder) + 1 if folder else 0 :]
            if "/" in rest and not recursive:
                folders.add(path[: len(path) - len(rest)] + rest.split("/")[0])
            else:
                found.append(entry(path, content, is_lfs))
        if folder and not found and not folders:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]

    def paths_info(self, name, user, revision, body):
        files = self.repo(name, user).at(revision)["files"]
        return [entry(path, *files[path]) for path in body["paths"] if path in files]

    def branch(self, name, user, branch, body):
        repo = self.repo(name, user, writes=True)
        if branch in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[branch] = repo.at(body.get("startingPoint", "main"))["oid"]
        return {}

    def refs(self, name, user):
        branches = self.repo(name, user).branches.items()
        listed = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": oid} for key, oid in branches]
        return {"branches": listed, "tags": [], "converts": []}

    def preupload(self, name, user, revision, body):
        existing, answer = self.repo(name, user, writes=True).at(revision)["files"], []
        for file in body["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            found = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in existing:
                content, is_lfs = existing[file["path"]]
                found["oid"] = hashlib.sha256(content).hexdigest() if is_lfs else blob_id(content)
            answer.append(found)
        return {"files": answer}

    def batch(self, name, user, body):
        self.repo(name, user, writes=True)
        objects = []
        for wanted in body["objects"]:  # without actions: the content is there already
            upload = {"upload": {"href": f"{self.url}/lfs/{name}/{wanted['oid']}"}}
            objects.append(wanted | ({} if (name, wanted["oid"]) in self.objects else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def put(self, name, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "the content does not match its oid")
        self.sent[oid] += 1
        self.objects[name, oid] = content
        return {}

    def commit(self, name, user, revision, lines):
        repo = self.repo(name, user, writes=True)
        files, message = dict(repo.at(revision)["files"]), ""
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.at(revision)["oid"]) != repo.at(revision)["oid"]:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if (name, value["oid"]) not in self.objects:
                    raise HubError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = (self.objects[name, value["oid"]], True)
            elif kind == "deletedFile":
                if value["path"] not in files:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            else:
                raise HubError(400, f"unknown operation {kind}")
        commit = repo.add(revision, message, files)
        return {"commitUrl": f"{self.url}/{name}/commit/{commit['oid']}", "commitOid": commit["oid"]}

    def validate(self, body):
        found = re.match(r"---\n(.*?)\n---", body["content"], re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else None
        for model in (metadata or {}).get("model-index", ()):
            for result in model["results"]:
                if not (result["task"]["type"] and result["dataset"]["type"] and result["metrics"]):
                    raise HubError(400, '"model-index" lacks a task, data set or metric')
        return {"warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}], "errors": []}


class Handler(BaseHTTPRequestHandler):
    """Reads a request, finds what answers it, and sends that, or what `faults` says instead."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _user(self):
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in USERS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return USERS.get(given)

    def _send(self, status, content, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self):
        self.close_connection = True
        self.connection.close()

    def _serve(self):
        content, hub = self._body(), self.server
        with hub.lock:
            number = len(hub.requests)
            hub.requests.append(f"{self.command} {urlsplit(self.path).path}")
            fault = hub.faults.pop(number, None)
            if fault == "drop":
                return self._cut()
            try:
                if isinstance(fault, int):
                    raise HubError(fault, "a fault of the test")
                status, answer, headers = self._answer(content)
            except HubError as error:
                status, answer = error.status, json.dumps({"error": str(error), **error.facts}).encode()
                headers = {"X-Error-Code": error.code} if error.code else {}
                headers["X-Error-Message"] = str(error)
        if fault == "lose":
            return self._cut()
        self._send(status, answer, headers)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _answer(self, content):
        """-> status, body, headers of the request."""
        url = urlsplit(self.path)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            return self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        answer = self._api(url, content)
        return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}

    def _resolve(self, name, revision, path):
        commit = self.server.repo(name, self._user()).at(revision)
        if path not in commit["files"]:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        content, is_lfs = commit["files"][path]
        etag = hashlib.sha256(content).hexdigest() if is_lfs else blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit["oid"], "X-Linked-Size": str(len(content)),
                   "X-Linked-Etag": f'"{etag}"', "Accept-Ranges": "bytes"}  # fmt: skip
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            end = int(found[2]) + 1 if found[2] else len(content)
            headers["Content-Range"] = f"bytes {found[1]}-{end - 1}/{len(content)}"
            return 206, content[int(found[1]) : end], headers
        return 200, content, headers

    def _api(self, url, content):
        hub, user = self.server, self._user()
        if self.command == "PUT":
            return hub.put(*url.path.removeprefix("/lfs/").rsplit("/", 1), content)
        if url.path == "/api/whoami-v2":
            if user is None:
                raise HubError(401, "Invalid username or password.")
            role = {"role": "write" if user[1] else "read"}
            return {"type": "user", "name": user[0], "auth": {"type": "access_token", "accessToken": role}}
        read = lambda: json.loads(content)
        if url.path == "/api/repos/create":
            return hub.create(user, read())
        if url.path == "/api/validate-yaml":
            return hub.validate(read())
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", url.path):
            return hub.batch(found[1], user, read())
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?", url.path)
        if found is None:
            raise HubError(404, f"no such address: {url.path}")
        name, what, revision, path = (unquote(part or "") for part in found.groups())
        if what == "commit":
            return hub.commit(name, user, revision, [json.loads(line) for line in content.splitlines()])
        routes = {
            "": lambda: hub.info(name, user, "main"),
            "revision": lambda: hub.info(name, user, revision),
            "tree": lambda: hub.tree(name, user, revision, path, "recursive=true" in url.query.lower()),
            "paths-info": lambda: hub.paths_info(name, user, revision, read()),
            "branch": lambda: hub.branch(name, user, revision, read()),
            "refs": lambda: hub.refs(name, user),
            "preupload": lambda: hub.preupload(name, user, revision, read()),
        }
        if what not in routes:
            raise HubError(404, f"no such address: {url.path}")
        return routes[what]()
