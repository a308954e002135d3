"""`colintern serve`: what a reader sees in a real browser, the JSON endpoint, and what is refused."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import quote, urlsplit

import browser
import pytest
from conftest import ROOT, page_image
from pages import documented, words
from pdf_writer import write_pdf
from test_adapters import trained

from colintern.__main__ import main
from colintern.core.recipes import render_recipe

pytestmark = pytest.mark.integration
PHONE = (360, 740)
HOSTILE_NAME = "<script>document.title='x'<∕script>\n\x1b[2J #2 50%.png"
HOSTILE_QUERY = '"><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)> Oslo'
MAX_SECONDS = 300  # until the pages are embedded, on a busy machine
TAB, ENTER, RIGHT = ("Tab", 9), ("Enter", 13), ("ArrowRight", 39)


@pytest.fixture(scope="module")
def served(tmp_path_factory, processor, pages):
    """The URL of a server for a PDF of three pages and an image with a hostile name; Ctrl-C ends it."""
    top = trained(tmp_path_factory.mktemp("serve"), processor, pages, epochs=1, warmup_steps=0)
    for name in ("colintern", "stages", "dvc.yaml", "versions.yaml"):
        (top / name).symlink_to(ROOT / name)
    (top / "params.yaml").write_text(render_recipe(ROOT / "recipes" / "demo.yaml"))
    (top / "manuals" / "below").mkdir(parents=True)
    write_pdf(top / "manuals" / "below" / "three.pdf", [["Oslo"], ["Rome"], ["Halde"]])
    page_image("milk").save(top / "manuals" / HOSTILE_NAME)
    (top / "manuals" / "torn.pdf").write_bytes(b"%PDF-1.4 torn")
    command = [*words(documented("colintern serve ~/manuals"))[1:-1], "manuals", "--model", "adapter", "--port", "0"]
    log = top / "serve.log"
    with log.open("wb") as file:
        ask = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code = ask + "import sys; from colintern.__main__ import main; sys.exit(main())"
        process = subprocess.Popen([sys.executable, "-c", code, *command], cwd=top, stdout=file, stderr=file)
    deadline = time.monotonic() + MAX_SECONDS
    while not (found := re.search(r"^(http://127\.0\.0\.1:\d+/)  ", log.read_text(), re.M)):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    assert "4 pages, 4 of them new" in log.read_text() and "left out: torn.pdf" in log.read_text()
    yield found[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and log.read_text().endswith("\nended\n"), log.read_text()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if not browser.program():
        pytest.skip(f"no browser here: none of {', '.join(browser.NAMES)} is on the PATH")
    with browser.tab(tmp_path_factory.mktemp("browser") / "profile") as one:
        yield one


def get(served: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Ask for a path as it stands: no client rewrites it."""
    connection = http.client.HTTPConnection(urlsplit(served).netloc, timeout=MAX_SECONDS)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def search(served: str, query: str, top: int) -> dict:
    return json.loads(get(served, f"/api/search?q={quote(query)}&top={top}")[2])


@pytest.mark.parametrize("size", [browser.DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_light_and_dark_and_asks_no_other_host(served, tab, size, dark):
    url = f"{served}?q={quote(HOSTILE_QUERY)}"
    tab.show(url, size, dark)
    assert tab.value("document.documentElement.scrollWidth") <= size[0]
    assert tab.value("document.images.length") == 4 and tab.value("document.scripts.length") == 0
    assert tab.value("document.querySelector('h1').textContent") == HOSTILE_QUERY
    assert tab.value("document.querySelector('#q').value") == HOSTILE_QUERY
    assert tab.fetched() == [url] and tab.complaints() == []
    red, *_ = map(int, re.findall(r"\d+", tab.value("getComputedStyle(document.body).backgroundColor")))
    assert (red < 60) == dark
    assert tab.value("getComputedStyle(document.querySelector('.sheet i')).mixBlendMode") == "multiply"


# After the tests of the page alone: the browser asks for the icon of a PDF late, when another page may be shown.
def test_a_reader_asks_by_keyboard_and_opens_the_page_of_the_pdf(served, tab):
    tab.show(served)
    assert tab.value("document.activeElement.id") == "q"
    tab.call("Input.insertText", text="from Oslo")
    tab.press(*ENTER, loads=True)
    shown = json.loads(tab.value("JSON.stringify([...document.querySelectorAll('figcaption')].map(f => f.innerText))"))
    results = search(served, "from Oslo", 10)["results"]
    assert [re.match(r"rank (\d+) · score ([\d.]+)", text).groups() for text in shown] == [
        (str(page["rank"]), f"{page['score']:.2f}") for page in results
    ]
    places = (
        "JSON.stringify([...document.querySelectorAll('.sheet i')].map(i => getComputedStyle(i).backgroundPosition))"
    )
    before = json.loads(tab.value(places))
    for _ in range(10):
        tab.press(*TAB)
        if tab.value("document.activeElement.type") == "radio":
            break
    tab.press(*RIGHT)
    assert tab.value("document.querySelector('input:checked').value") != "0"
    assert all(a != b for a, b in zip(before, json.loads(tab.value(places)), strict=True))
    for _ in range(10):
        tab.press(*TAB)
        if tab.value("document.activeElement.tagName") == "A":
            break
    link = tab.value("document.activeElement.getAttribute('href')")
    assert link == results[0]["link"]
    tab.press(*ENTER)
    tab.wait("Page.frameNavigated")
    assert tab.value("location.pathname + location.hash") == link


def test_a_program_asks_for_json_as_it_is_described(served):
    answer = search(served, "from Oslo", 2)
    assert (answer["query"], answer["pages"], len(answer["results"])) == ("from Oslo", 4, 2)
    every = search(served, "from Oslo", 100)["results"]
    assert every[:2] == answer["results"] and [page["rank"] for page in every] == [1, 2, 3, 4]
    assert sorted(page["page"] or 0 for page in every) == [0, 1, 2, 3]
    described = json.loads(get(served, "/openapi.json")[2])
    assert list(described["paths"]) == ["/api/search"]
    schema = described["components"]["schemas"]["SearchResult"]
    assert "score: MaxSim" in schema["description"]
    assert list(schema["properties"]) == list(every[0]) == ["rank", "score", "file", "page", "link"]
    for page in every:
        status, headers, data = get(served, page["link"].partition("#")[0])
        kind = "image/png" if page["page"] is None else "application/pdf"
        assert status == 200 and headers["content-type"] == kind, page
        assert data[:4] == (b"\x89PNG" if page["page"] is None else b"%PDF")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/files/../../params.yaml", 404),
        ("/files/1/../../../params.yaml", 404),
        ("/files/%2e%2e%2f%2e%2e%2fparams.yaml", 404),
        ("/files//etc/passwd", 404),
        ("/files/1/torn.pdf", 404),  # in the folder, and no page of it was read
        ("/files/9/below/three.pdf", 404),
        ("/docs", 404),  # would load scripts of another host
        ("/redoc", 404),
        ("/api/search", 422),
        ("/api/search?q=%20", 422),
        ("/api/search?q=x&top=0", 422),
        (f"/api/search?q={'x' * 1001}", 422),
    ],
)
def test_what_is_no_page_and_no_query_is_refused(served, path, status):
    assert get(served, path)[0] == status


def test_other_hosts_neither_embed_nor_read_it(served):
    for path in ("/", "/api/search?q=Oslo", "/files/none"):
        _, headers, _ = get(served, path, Origin="http://example.org")
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert (
            headers["cross-origin-resource-policy"] == "same-origin" and headers["x-content-type-options"] == "nosniff"
        )
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    for host, status in (("example.org", 400), ("127.0.0.1.example.org", 400), ("localhost:1", 200), ("[::1]", 200)):
        assert get(served, "/", Host=host)[0] == status, host


def refuse(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "manuals", "--model", "adapter", *options])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "manuals/page.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port: {port}: cannot listen on 127.0.0.1" in refuse(capsys, "--port", port)
    assert "--port: 65536 is not valid" in refuse(capsys, "--port", "65536")
    assert "--host: 192.0.2.1: cannot listen" in refuse(capsys, "--host", "192.0.2.1")
    assert "--host: 'aaaa" in refuse(capsys, "--host", "a" * 70)
    assert "--rescore: 3 has no effect" in refuse(capsys, "--rescore", "3")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "serve: fastapi not installed; install the extra `serve`" in refuse(capsys)
