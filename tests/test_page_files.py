"""The page as files: what a browser may keep, what it may load, and an edge that has no page."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from services.edge.app import PageFiles
from tests import ROOT
from tests.client import Client, problem
from tests.stack import free_port, wait_until
from tests.system import DOWN_TIMEOUT_S, UP_TIMEOUT_S


async def test_names_change_with_content_and_may_be_kept_for_ever(client: Client) -> None:
    page = await client.http.get("/")
    assert page.headers["cache-control"] == "no-cache"
    assert (await client.http.get("/", headers={"If-None-Match": page.headers["etag"]})).status_code == 304
    names = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert {name.rpartition(".")[2] for name in names} == set(kinds)
    for name in names:
        assert re.search(r"-[A-Z0-9]{8}\.\w+$", name)
        file = await client.http.get(f"/{name}")
        assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert file.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
        assert file.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/page-OLD00000.js", "/page/index.html"):
        missing = await client.http.get(path)
        assert missing.status_code == 404
        assert "cache-control" not in missing.headers


async def test_nothing_comes_from_elsewhere_and_nothing_is_inline(client: Client) -> None:
    page = await client.http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    allowed = {source for name, sources in policy.items() if name.endswith("-src") for source in sources.split()}
    assert allowed == {"'none'", "'self'", "data:"}
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", page.text)


async def test_an_edge_without_a_page_says_what_to_do(tmp_path: Path) -> None:
    here = httpx.ASGITransport(Starlette(routes=[Route("/", PageFiles(directory=tmp_path).index)]))
    async with Client("http://127.0.0.1", transport=here) as client:
        assert "scripts/page" in problem(await client.http.get("/"), 503, "page_not_built")["detail"]


@pytest.mark.timeout(UP_TIMEOUT_S + DOWN_TIMEOUT_S + 60)
def test_where_the_page_cannot_be_built_the_rest_is_up_and_that_is_said(tmp_path: Path) -> None:
    """`scripts/up` in a copy of the repository whose page is broken; what is installed is this one's."""
    copy = tmp_path / "copy"
    leave_out = shutil.ignore_patterns("node_modules", "dist", "__pycache__")
    shutil.copytree(ROOT / "services", copy / "services", ignore=leave_out)
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    (copy / "scripts" / "install").write_text("#!/bin/sh\n")
    page = Path("services") / "edge" / "page"
    for name in (".venv", "shared", "pyproject.toml", page / "node_modules"):
        (copy / name).symlink_to(ROOT / name)
    (copy / page / "src" / "page.ts").write_text("this is no script")

    url = f"http://127.0.0.1:{(port := free_port())}"
    ours = ("TAPELINE_", "OTEL_", "OPENAI_", "ANTHROPIC_")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environ |= {"TAPELINE_DATA": str(tmp_path / "data"), "TAPELINE_PORT": str(port)}
    log = tmp_path / "log"
    with log.open("wb") as output:
        up = subprocess.Popen([copy / "scripts" / "up"], env=environ, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until("up", lambda: f"ready {url}\n" in log.read_text() or up.poll() is not None, UP_TIMEOUT_S)
        said = log.read_text()
        assert f"ready {url}\n" in said, said
        assert "scripts/up: the page could not be built, for the reason above; everything else works" in said
        assert "page.ts" in said.partition("scripts/up:")[0], "the reason is above"
        assert "scripts/page" in problem(httpx.get(url), 503, "page_not_built")["detail"]
        assert httpx.post(f"{url}/v1/conversations", json={"id": "one"}).status_code == 201
        stream = {"Accept": "text/event-stream"}
        told = httpx.post(f"{url}/v1/conversations/one/messages", json={"content": "Hi"}, headers=stream, timeout=30)
        assert "event: done" in told.text
        up.send_signal(signal.SIGINT)
        assert up.wait(DOWN_TIMEOUT_S) == 0, log.read_text()
    finally:
        if up.poll() is None:
            up.kill()
            up.wait()
