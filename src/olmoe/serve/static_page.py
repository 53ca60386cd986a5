"""The chat page that shows the experts: its files, served with a strict Content-Security-Policy.

The page consists of the files in `page/`: HTML, one style sheet and ES modules, without a build step. It loads nothing
from anywhere else, so it works offline, and its policy makes the browser enforce that: scripts, styles and connections
only of this origin, nothing inline, and no string ever becomes HTML (`require-trusted-types-for`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import BaseRoute

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",  # cached, but always revalidated: an upgraded server must not run an old page
}
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page as it is sent. `etag` lets a browser cache it."""

    content: bytes
    media_type: str
    etag: str

    def respond(self, request: Request) -> Response:
        """The file, or 304 if the browser has it."""
        headers = {**HEADERS, "ETag": self.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def page_files() -> dict[str, PageFile]:
    """The files of the page by name, read from the installed package: about 100 kB."""
    found = {}
    for entry in files("olmoe.serve").joinpath("page").iterdir():
        media_type = _MEDIA_TYPES.get(PurePosixPath(entry.name).suffix)
        if media_type is not None:
            content = entry.read_bytes()
            found[entry.name] = PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def page_routes() -> list[BaseRoute]:
    """Routes of the page, `/` and `/page/NAME`, for GET and HEAD. They need no API key: what they serve is public.

    The files are kept in memory, so upgrading the package under a running server does not mix two versions of the page.
    """
    pages = page_files()

    async def index(request: Request) -> Response:
        return pages["index.html"].respond(request)

    async def part(request: Request) -> Response:
        page = pages.get(request.path_params["name"])
        if page is None:
            raise HTTPException(404)
        return page.respond(request)

    return [Route("/", index, methods=["GET"]), Route("/page/{name}", part, methods=["GET"])]
