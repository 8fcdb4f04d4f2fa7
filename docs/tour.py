#!/usr/bin/env python3
"""Draws docs/tour.svg: the commands of the README's tour and what they print.

Starts the server with an empty database of its own (`cargo run`, or the command in the
arguments), runs the commands with grpcurl, and stops the server.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "localhost:50051"

# Characters in a line, and lines of output that is not JSON.
WIDTH = 112
MAX_TEXT_LINES = 3
# Longer strings, such as IDs and times, are cut to the second length.
MAX_STRING, CUT_STRING = 22, 4
# Separates the output of the commands: the record separator of ASCII.
SEPARATOR = "\036"

# Pixels.
FONT_SIZE, LINE_HEIGHT, PADDING, BAR = 13, 19, 16, 34
# A part of the font size, for the widest of the fonts.
CHARACTER_WIDTH = 0.605
STYLE = """
text{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'Liberation Mono',monospace}
text{fill:#b1bac4;white-space:pre}
.comment{fill:#8b949e;font-style:italic}.command{fill:#f0f6fc;font-weight:600}.prompt{fill:#7ee787}
"""


def statements(script):
    """The lines of a shell script, with continued lines joined: comments and commands."""
    joined = re.sub(r"(?: \\|(?<=\|))\n\s*", " ", script)
    return [line for line in joined.splitlines() if line]


def tour():
    """The statements of the tour."""
    section = (ROOT / "README.md").read_text().split("\n## A tour\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return statements("\n".join(blocks))


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def wait_until_serving(server, address):
    probe = ["grpcurl", "-plaintext", address, "grpc.health.v1.Health/Check"]
    while server.poll() is None:
        if b'"SERVING"' in subprocess.run(probe, capture_output=True, check=False).stdout:
            return
        time.sleep(0.5)
    sys.exit("the server does not start")


def outputs(script, server_command):
    """What each statement prints, with a server of its own."""
    address = free_address()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as data:
        # Where root runs this, PostgreSQL has another user, which must reach its directory.
        os.chmod(data, 0o711)
        variables = {
            "LISTEN_ADDR": address,
            "FASTZERO_DATA_DIR": f"{data}/data",
            "RUST_LOG": "warn",
        }
        environment = {key: os.environ[key] for key in os.environ if key != "DATABASE_URL"}
        server = subprocess.Popen(
            server_command, cwd=ROOT, env=environment | variables, start_new_session=True
        )
        try:
            wait_until_serving(server, address)
            lines = "\n".join(f"{line}\nprintf '{SEPARATOR}'" for line in script)
            shell = ["bash", "-euo", "pipefail", "-c", lines.replace(ADDRESS, address)]
            printed = subprocess.run(shell, check=True, stdout=subprocess.PIPE, text=True).stdout
        finally:
            os.killpg(server.pid, signal.SIGINT)
            server.wait()
    return printed.split(SEPARATOR)[:-1]


def cut(line, width=WIDTH):
    return line if len(line) <= width else line[: width - 1] + "…"


def scalar(value):
    """The value as JSON, cut if it is a long string."""
    if isinstance(value, str) and len(value) > MAX_STRING:
        value = value[:CUT_STRING] + "…"
    return json.dumps(value, ensure_ascii=False)


def json_object(fields, room):
    """The object as JSON, without the last fields if there is no room for them."""
    items = [f'"{key}": {scalar(value)}' for key, value in fields.items()]
    complete = len(items)
    while len(", ".join(items)) + len("{, …}") > room:
        items.pop()
    return "{" + ", ".join(items if len(items) == complete else [*items, "…"]) + "}"


def json_lines(response):
    """The response as JSON: each resource in it is a line."""
    if not any(isinstance(value, (dict, list)) for value in response.values()):
        return [json_object(response, WIDTH)]
    (key, value), = response.items()
    start, end = (f'{{"{key}": [', "]}") if isinstance(value, list) else (f'{{"{key}": ', "}")
    resources = value if isinstance(value, list) else [value]
    lines = [json_object(resource, WIDTH - len(start + end)) for resource in resources]
    return (start + (",\n" + " " * len(start)).join(lines) + end).splitlines()


def output_lines(printed):
    if printed.startswith("{"):
        return json_lines(json.loads(printed))
    lines = [cut(line) for line in printed.splitlines()]
    return lines if len(lines) <= MAX_TEXT_LINES else [*lines[: MAX_TEXT_LINES - 1], "…"]


def command_lines(command):
    """The command with what all commands share cut, in one line or two."""
    shown = re.sub(r'grpcurl -plaintext( -H "authorization: [^"]*")?', "grpcurl …", command)
    shown = re.sub(rf"{ADDRESS} ([a-z0-9]+\.)*(?=[A-Z]\w*/)", "…", shown)
    shown = re.sub(rf" {ADDRESS}", "", shown)
    shown = shown.replace("… …", "…")
    shown = re.sub(r"\| sed .*\)", "| sed …)", shown)
    if len(shown) <= WIDTH - 2:
        return [shown]
    start, end = re.match(r"(.*) (…\w+/.*)", shown).groups()
    return [cut(start, WIDTH - 4) + " \\", "    " + end]


def draw(script, printed):
    lines = []

    def add(text, attributes="", prompt=""):
        y = BAR + PADDING + LINE_HEIGHT * len(lines)
        content = prompt + escape(text, quote=False)
        lines.append(f'<text x="{PADDING}" y="{y}"{attributes}>{content}</text>')

    for statement, output in zip(script, printed, strict=True):
        if statement.startswith("#"):
            add(statement, ' class="comment"')
            continue
        first, *rest = command_lines(statement)
        attributes = f' class="command" data-command="{escape(statement)}"'
        add(first, attributes, prompt='<tspan class="prompt">$ </tspan>')
        for line in rest:
            add(line, ' class="command"')
        for line in output_lines(output):
            add(line)

    width = round(WIDTH * FONT_SIZE * CHARACTER_WIDTH) + 2 * PADDING
    height = BAR + PADDING + LINE_HEIGHT * len(lines)
    dots = "".join(
        f'<circle cx="{PADDING + 6 + 18 * i}" cy="18" r="5" fill="{color}"/>'
        for i, color in enumerate(["#ff5f57", "#febc2e", "#28c840"])
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"',
        f'height="{height}" font-size="{FONT_SIZE}" xml:space="preserve" role="img"',
        'aria-labelledby="title">',
        '<title id="title">The tour of the README in a terminal, with its output</title>',
        f"<style>{STYLE}</style>",
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" fill="#0d1117"',
        'stroke="#444c56"/>',
        dots,
        *lines,
        "</svg>",
        "",
    ])


def main():
    script = tour()
    printed = outputs(script, sys.argv[1:] or ["cargo", "run", "--locked", "--quiet"])
    (ROOT / "docs/tour.svg").write_text(draw(script, printed))


if __name__ == "__main__":
    main()
