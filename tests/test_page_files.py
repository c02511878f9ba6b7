"""The page as files: what a browser may keep, what it may load, and an edge that has no page."""

import re
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.routing import Route

from services.edge.app import PageFiles
from tests.client import Client, problem


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
