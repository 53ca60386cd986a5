"""The page's files over HTTP: complete, with their security policy, and with nothing that it would block."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("httpx")

from starlette.applications import Starlette
from starlette.testclient import TestClient

import olmoe.serve
from olmoe.serve.static_page import CONTENT_SECURITY_POLICY, HEADERS, page_files, page_routes

FOLDER = Path(olmoe.serve.__file__).parent / "page"
SCRIPTS = sorted(FOLDER.glob("*.js"))


@pytest.fixture(scope="module")
def client():
    return TestClient(Starlette(routes=page_routes()))


def test_every_file_is_served_with_its_type_and_the_policy(client):
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert {path.suffix for path in FOLDER.iterdir()} == set(types)
    assert sorted(page_files()) == sorted(path.name for path in FOLDER.iterdir())
    for path in FOLDER.iterdir():
        answer = client.get(f"/page/{path.name}")
        assert answer.status_code == 200
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"].startswith(types[path.suffix])
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
    assert client.get("/").content == (FOLDER / "index.html").read_bytes()
    assert client.get("/").headers["content-security-policy"] == CONTENT_SECURITY_POLICY


def test_the_policy_allows_only_this_origin():
    directives = dict(part.split(" ", 1) for part in CONTENT_SECURITY_POLICY.split("; "))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    assert directives["frame-ancestors"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert directives["img-src"] == "'self' data:"
    assert "unsafe" not in CONTENT_SECURITY_POLICY


def test_unchanged_files_are_cached_by_browsers(client):
    first = client.get("/page/main.js")
    again = client.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""
    weak = client.get("/page/main.js", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert weak.status_code == 304
    assert client.get("/page/main.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert first.headers["etag"] != client.get("/page/style.css").headers["etag"]


@pytest.mark.parametrize(
    "path",
    ["/page/none.js", "/page/..%2fstatic_page.py", "/page/../static_page.py", "/page/", "/page/%00", "/page/a/b"],
)
def test_nothing_outside_the_page_is_served(client, path):
    assert client.get(path).status_code == 404


def test_head_works_and_other_methods_are_refused(client):
    assert client.head("/").status_code == 200
    assert client.head("/").content == b""
    assert client.post("/").status_code == 405


def test_every_import_and_reference_exists():
    names = {path.name for path in FOLDER.iterdir()}
    for script in SCRIPTS:
        imported = re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8"))
        assert set(imported) <= names, script.name
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:src|href)="page/([^"]+)"', html)) <= names
    used = set(re.findall(r'(?:byId|getElementById)\("([^"]+)"\)', "".join(p.read_text("utf-8") for p in SCRIPTS)))
    assert used <= set(re.findall(r'id="([^"]+)"', html))


def test_no_string_becomes_html_or_code():
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        found = re.findall(
            r"innerHTML\s*=|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text
        )
        assert found == [], script.name
        assert len(text.splitlines()) <= 500
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"\son[a-z]+=|\sstyle=|<style|<script(?! type=\"module\" src=\"page/)", html) == []


def test_nothing_names_another_host():
    for path in FOLDER.iterdir():
        addresses = re.findall(r"https?://[a-z0-9.]+", path.read_text(encoding="utf-8"))
        assert set(addresses) <= {"http://www.w3.org"}, path.name  # the SVG namespace, never fetched


def test_a_wheel_holds_the_page(tmp_path):
    """`wheel.packages` takes every file of the package; built here without the C++ part."""
    build = pytest.importorskip("scikit_build_core.build", reason="scikit-build-core is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        if not Path("pyproject.toml").exists():
            pytest.skip("not a checkout")
        wheel = build.build_wheel(str(tmp_path), {"wheel.cmake": "false"})
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    assert {f"olmoe/serve/page/{path.name}" for path in FOLDER.iterdir()} <= set(names)
