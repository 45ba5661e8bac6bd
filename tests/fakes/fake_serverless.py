"""Vast's serverless side on loopback, on top of fake_vast: templates, endpoints, worker groups.

    with ServerlessVast(tmp_path, {}) as vast:
        vast.add_offer()
        subprocess.run(["manage-bark-worker.sh", "endpoint", "up", "--yes"], env=...)

An endpoint has no worker until a request comes. Then workers are recruited from the offers that the
worker group's search lets in, as many as the queue asks for and the endpoint allows. Each is an
instance by the group's template, so its on-start command starts whatever it is; what is routed to
it is signed with RSA as Vast signs, and its PyWorker fetches the public key here and reports here.
A worker counts as ready when it has reported its performance, as to Vast. When no request has come
for the endpoint's `inactivity_timeout`, all are let go.

Where the documents leave two ways, the nastier: instances outlive their worker group (as the CLI's
help says; `group_takes_workers` changes that), have no label, and the list of workers knows them
until they are gone.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import math
import secrets
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from Crypto.Hash import SHA256
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15
from fake_vast import (
    ApiError,
    FakeVast,
    Instance,
    Request,
    fits,
    invalid,
    offer_row,
    parse_json,
    route,
)

FOR_WORKERS = ("/pubkey/", "/worker_status/", "/delete_requests/")  # need no key of the account
BY_ENDPOINT_KEY = ("/route/",)
INSIDE = "3000/tcp"  # where the container's PyWorker listens
PER_WORKER = 8  # requests in the queue for which one worker is recruited
AT_ONCE = 24  # requests that one worker is given before it has answered any


@functools.cache
def signing_key() -> RSA.RsaKey:
    return RSA.generate(2048)


@functools.cache
def cli_query() -> ModuleType:
    """The CLI's own reader of searches, without the package around it."""
    package = importlib.util.find_spec("vastai")
    assert package and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "api", "query.py")
    spec = importlib.util.spec_from_file_location("vast_query", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sign(key: RSA.RsaKey, url: str) -> str:
    """What Vast puts beside a worker's address, so that the worker serves who comes with it."""
    message = json.dumps({"url": url}, indent=4, sort_keys=True)
    return base64.b64encode(pkcs1_15.new(key).sign(SHA256.new(message.encode()))).decode()


def docker_options(text: str) -> dict[str, str]:
    """A template's `env`: -p and -e alone, as a container's environment."""
    found, words = {}, shlex.split(text or "")
    for flag, value in zip(words[::2], words[1::2], strict=True):
        if flag == "-p":
            found[f"-p {value}"] = "1"
        elif flag == "-e" and "=" in value:
            found.update([value.split("=", 1)])
        else:
            raise invalid(f"docker option {flag} {value}")
    return found


class ServerlessWorker(Instance):
    """A worker of a group. There is no NAT here: PyWorker listens on the public port itself."""

    group_id = endpoint_id = 0
    report: dict[str, Any] | None = None  # the last of PyWorker's
    errors: list[str]  # that it ever reported

    def environment(self) -> dict[str, str]:
        port = str(self.container.ports[INSIDE].getsockname()[1])
        return {**super().environment(), "WORKER_PORT": port, f"VAST_TCP_PORT_{port}": port,
                "WORKER_HTTP_PORT": "0", "MASTER_TOKEN": self.master_token,
                "REPORT_ADDR": self.vast.url}

    @functools.cached_property
    def master_token(self) -> str:
        return f"master-{secrets.token_hex(16)}"

    @property
    def is_ready(self) -> bool:
        report = self.report or {}
        return bool(report.get("max_perf")) and not report.get("error_msg")

    @property
    def status(self) -> str:
        if self.report and self.report["error_msg"]:
            return "error"
        if self.actual != "running":
            return "creating" if self.actual is None else "loading"
        return "idle" if self.is_ready else "loading"


@dataclass
class Asked:
    """A request that was routed, or waits for that."""

    endpoint_id: int
    cost: float
    worker_id: int | None = None
    outcomes: list[str] = field(default_factory=list)


class ServerlessVast(FakeVast):
    """FakeVast with endpoints. Public, beside what FakeVast has:

    - templates, endpoints, groups: rows by id, the endpoints' with their keys; asked: by index;
    - recruits: False lets no worker be rented; group_takes_workers: deleting a group ends them;
    - hurry: how much faster than a clock inactivity runs;
    - removed: what was deleted, as (kind, id).
    """

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.templates: dict[int, dict[str, Any]] = {}
        self.endpoints: dict[int, dict[str, Any]] = {}
        self.groups: dict[int, dict[str, Any]] = {}
        self.asked: dict[int, Asked] = {}
        self.removed: list[tuple[str, int]] = []
        self.recruits, self.group_takes_workers, self.hurry = True, False, 1.0
        self._active: dict[int, float] = {}  # endpoints' last requests, monotonic
        super().__init__(folder, models)
        self._next_id.update(template=500, endpoint=7000, group=9000, request=0)

    # the autoscaler

    def workers(self, endpoint_id: int | None = None) -> list[ServerlessWorker]:
        """Those of one endpoint or of all, of groups that are gone, too."""
        found = [one for one in self.instances.values() if isinstance(one, ServerlessWorker)]
        return [one for one in found if endpoint_id in (None, one.endpoint_id)]

    def _all(self) -> list[Instance]:
        if self.groups and not self.closing.is_set():
            self._scale()
        return super()._all()

    def _scale(self) -> None:
        for endpoint_id, endpoint in self.endpoints.items():
            waiting = sum(one.endpoint_id == endpoint_id and one.worker_id is None
                          for one in self.asked.values())
            wanted = min(endpoint["max_workers"], max(math.ceil(waiting / PER_WORKER),
                                                      endpoint["cold_workers"]))
            groups = [one for one in self.groups.values() if one["endpoint_id"] == endpoint_id]
            if groups and self.recruits and len(self.workers(endpoint_id)) < wanted:
                self._recruit(groups[0], endpoint_id)
            timeout = endpoint["inactivity_timeout"] or math.inf
            quiet = time.monotonic() - self._active.get(endpoint_id, math.inf)
            if not waiting and quiet * self.hurry > timeout and not self._working(endpoint_id):
                for worker in self.workers(endpoint_id):
                    self._let_go(worker)

    def _working(self, endpoint_id: int) -> int:
        return sum(one.endpoint_id == endpoint_id and not one.outcomes
                   for one in self.asked.values())

    def _let_go(self, worker: ServerlessWorker) -> None:
        if worker.destroy():
            self.instances.pop(worker.id, None)
            self.destroyed.append(worker.id)

    def _recruit(self, group: dict[str, Any], endpoint_id: int) -> None:
        """Rents the cheapest offer that the group's search lets in, if there is one."""
        query = cli_query()
        conditions = query.parse_query(group["search_params"], {}, query.offers_fields,
                                       query.offers_alias, query.offers_mult)
        template = next(one for one in self.templates.values()
                        if one["hash_id"] == group["template_hash"])
        disk = float(template["recommended_disk_space"] or 10)
        rows = [offer_row(one, False, disk) for one in self.offers.values() if one["rentable"]]
        rows = sorted((row for row in rows if fits(row, conditions, row.keys())),
                      key=lambda row: row["dph_total"])
        if not rows:
            return
        offer = self.offers[rows[0]["id"]]
        offer.update(rentable=False, rented=True)
        worker = ServerlessWorker(
            self._draw_id("instance"), self, dict(offer), None, docker_options(template["env"]),
            template["onstart"], "ssh_direc ssh_proxy",
            f"{template['image']}:{template['tag'] or 'latest'}"
            if ":" not in template["image"].rpartition("/")[2] else template["image"],
            disk, fate=offer["fate"],
            user="root")  # assumed: no template can say so, and Vast's words leave it open
        worker.group_id, worker.endpoint_id, worker.errors = group["id"], endpoint_id, []
        self.instances[worker.id] = worker
        self.secrets += [worker.api_key, worker.master_token]
        worker.boot(first=True)

    # access

    def _dispatch(self, request: Request) -> object:
        if request.path in FOR_WORKERS:
            return super()._dispatch(open_to_all(request))
        if request.path in BY_ENDPOINT_KEY:
            key = (request.body or {}).get("api_key")
            if key not in [one["api_key"] for one in self.endpoints.values()]:
                raise ApiError(401, "auth_error", "Invalid endpoint key")
            return super()._dispatch(open_to_all(request))
        return super()._dispatch(request)

    # templates

    @route("POST", "/api/v0/template/")
    def _create_template(self, request: Request) -> object:
        body = dict(request.body)
        if not body.get("image"):
            raise invalid("image is missing")
        docker_options(body["env"])
        number = self._draw_id("template")
        self.templates[number] = {**body, "id": number, "hash_id": secrets.token_hex(16)}
        return {"success": True, "template": self.templates[number]}

    @route("GET", "/api/v0/template/")
    def _search_templates(self, request: Request) -> object:
        filters = parse_json(request.query.get("select_filters"), {})
        rows = [row for row in self.templates.values() if fits(row, filters, row.keys())]
        return {"success": True, "templates": rows}

    @route("DELETE", "/api/v0/template/")
    def _delete_template(self, request: Request) -> object:
        body = request.body or {}
        for number, row in list(self.templates.items()):
            if body.get("template_id") == number or body.get("hash_id") == row["hash_id"]:
                if any(one["template_hash"] == row["hash_id"] for one in self.groups.values()):
                    raise invalid("a worker group uses this template")
                del self.templates[number]
                self.removed.append(("template", number))
                return {"success": True, "msg": "Template deleted"}
        raise ApiError(404, "no_such_template", "Template not found")

    # endpoints

    @route("POST", "/api/v0/endptjobs/")
    def _create_endpoint(self, request: Request) -> object:
        return {"success": True, "result": self.add_endpoint(**request.body)["id"]}

    def add_endpoint(self, **fields: Any) -> dict[str, Any]:
        """An endpoint as `create endpoint` makes it; names need not be unique."""
        with self.lock:
            row = {"endpoint_name": "bark-worker", "max_workers": 20, "cold_workers": 5,
                   "min_load": 0.0, "target_util": 0.9, "cold_mult": 2.5,
                   "inactivity_timeout": None, "endpoint_state": "active", **fields,
                   "id": self._draw_id("endpoint"), "api_key": f"endpoint-{secrets.token_hex(24)}",
                   "user_id": 1, "created_at": time.time(), "auto_delete_in_seconds": None,
                   "auto_delete_due_24h": False}
            self.endpoints[row["id"]] = row
            self.secrets.append(row["api_key"])
            return row

    @route("GET", "/api/v0/endptjobs/")
    def _list_endpoints(self, request: Request) -> object:
        return {"success": True, "results": list(self.endpoints.values())}

    @route("DELETE", r"/api/v0/endptjobs/(\d+)/")
    def _delete_endpoint(self, request: Request, number: str) -> object:
        self._forget(self.endpoints, "endpoint", number)
        return {"success": True}

    def _forget(self, rows: dict[int, Any], kind: str, number: str) -> None:
        if int(number) not in rows:
            raise ApiError(404, f"no_such_{kind}", f"{kind} {number} not found")
        del rows[int(number)]
        self.removed.append((kind, int(number)))

    # worker groups

    @route("POST", r"/api/v0/(?:autojobs|workergroups)/")
    def _create_group(self, request: Request) -> object:
        body = request.body
        owners = [one for one in self.endpoints.values() if one["id"] == body.get("endpoint_id")
                  or one["endpoint_name"] == body.get("endpoint_name")]
        if not owners:
            raise ApiError(404, "no_such_endpoint", "endpoint not found")
        if body["template_hash"] not in [one["hash_id"] for one in self.templates.values()]:
            raise invalid("template_hash")
        number = self._draw_id("group")
        self.groups[number] = {**body, "id": number, "endpoint_id": owners[0]["id"],
                               "endpoint_name": owners[0]["endpoint_name"]}
        return {"success": True, "id": number}

    @route("GET", r"/api/v0/(?:autojobs|workergroups)/")
    def _list_groups(self, request: Request) -> object:
        return {"success": True, "results": list(self.groups.values())}

    @route("DELETE", r"/api/v0/(?:autojobs|workergroups)/(\d+)/")
    def _delete_group(self, request: Request, number: str) -> object:
        self._forget(self.groups, "group", number)
        for worker in self.workers():
            if worker.group_id == int(number) and self.group_takes_workers:
                self._let_go(worker)
        return {"success": True}

    # what run.vast.ai serves

    @route("POST", "/route/")
    def _route(self, request: Request) -> object:
        """A worker's address, signed, or the number under which to ask again."""
        body = request.body
        endpoint = next(one for one in self.endpoints.values() if one["api_key"] == body["api_key"])
        if endpoint["endpoint_name"] != body.get("endpoint"):
            raise invalid("endpoint")
        self._active[endpoint["id"]] = time.monotonic()
        index = body.get("request_idx") or self._draw_id("request")
        asked = self.asked.setdefault(index, Asked(endpoint["id"], float(body["cost"])))
        load = Counter(one.worker_id for one in self.asked.values() if not one.outcomes)
        ready = [one for one in self.workers(endpoint["id"])
                 if one.is_ready and load[one.id] < AT_ONCE]
        if not ready:
            return {"request_idx": index, "status": "no worker is ready"}
        worker = min(ready, key=lambda one: (load[one.id], one.id))
        asked.worker_id, url = worker.id, worker.report["url"]
        return {"url": url, "signature": sign(signing_key(), url), "cost": str(asked.cost),
                "endpoint": endpoint["endpoint_name"], "reqnum": index, "request_idx": index}

    @route("GET", "/pubkey/")
    def _pubkey(self, request: Request) -> object:
        return signing_key().publickey().export_key().decode()

    def _worker_of(self, number: int, token: str) -> ServerlessWorker | None:
        worker = next((one for one in self.workers() if one.id == number), None)
        if worker and worker.master_token != token:
            raise ApiError(401, "auth_error", "bad mtoken")
        return worker

    @route("POST", "/worker_status/")
    def _worker_status(self, request: Request) -> object:
        if worker := self._worker_of(request.body["id"], request.body["mtoken"]):
            worker.report = request.body
            worker.errors += [request.body["error_msg"]] if request.body["error_msg"] else []
        return {}

    @route("POST", "/delete_requests/")
    def _delete_requests(self, request: Request) -> object:
        self._worker_of(request.body["worker_id"], request.body["mtoken"])
        for one in request.body["requests"]:
            if one["request_idx"] in self.asked:
                self.asked[one["request_idx"]].outcomes.append(one["status"])
        return {}

    @route("POST", "/get_endpoint_workers/")
    def _endpoint_workers(self, request: Request) -> object:
        return [{"id": one.id, "status": one.status, "gpu_name": one.offer["gpu_name"],
                 "measured_perf": (one.report or {}).get("max_perf", 0.0)}
                for one in self.workers(request.body["id"])]

    @route("POST", "/get_endpoint_logs/")
    def _endpoint_logs(self, request: Request) -> object:
        if request.body["id"] not in self.endpoints:
            raise ApiError(404, "no_such_endpoint", "endpoint not found")
        if request.body.get("api_key") != self.account_key:
            raise ApiError(401, "auth_error", "Invalid user key")
        lines = [f"worker {one.id} {one.status}" for one in self.workers(request.body["id"])]
        text = "\n".join([f"endpoint {request.body['id']}", *lines]) + "\n"
        return {"info0": "", "info1": text, "trace": "", "debug": ""}


def open_to_all(request: Request) -> Request:
    """The request, as one that the account's key came with."""
    return Request(request.time, request.method, request.path, request.query, request.body, True)
