"""Chat templates: Jinja programs that come with a model's file, so foreign code.

A template runs in Jinja's immutable sandbox, which keeps it from Python's internals, and in a process of its own with
limits on memory, CPU time and output, because a sandboxed template can still loop for ever or double a string forty
times. `render` is the caller's side; run as a script this file is that process, which imports nothing of pyarch. A call
costs about 0.1 s (docs/decisions/0051).
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SECONDS = 3
MEMORY = 512 << 20  # bytes of address space
OUTPUT = 8 << 20  # characters


def render(template: str, variables: dict[str, Any]) -> str:
    """The text a template makes of JSON-like variables; ValueError if it is wrong, refuses, or exceeds a limit."""
    try:
        request = json.dumps({"template": template, "variables": variables})
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"messages: must be plain JSON-like data: {e}") from None
    from .. import arch  # not where this file is a script

    try:
        child = subprocess.run(
            [sys.executable, __file__], input=request.encode(), capture_output=True, timeout=2 * SECONDS,
            env=arch.environment_of_a_limited_process(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"chat template: took more than {SECONDS} s") from None
    try:
        reply = json.loads(child.stdout)
    except ValueError:
        if b"No module named 'jinja2'" in child.stderr:
            raise ModuleNotFoundError("chat templates need jinja2: pip install 'pyarch-kernels[models]'") from None
        last = child.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        limits = f"{SECONDS} s, {MEMORY >> 20} MiB"
        raise ValueError(f"chat template: was stopped (limits: {limits}) {last}".rstrip()) from None
    if "error" in reply:
        raise ValueError(f"chat template: {reply['error']}")
    return reply["text"]


def _limit() -> None:
    try:
        import resource
    except ImportError:  # not Linux: the caller's time limit remains
        return
    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)  # which may be lower already
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _environment() -> Any:
    """What templates written for Hugging Face's tokenizers expect: its whitespace rules, functions and tags."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's words for training: here only its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _serve() -> dict[str, str]:
    request = json.loads(sys.stdin.buffer.read())
    env = _environment()
    _limit()
    try:
        pieces, length = [], 0
        for piece in env.from_string(request["template"]).generate(**request["variables"]):
            length += len(piece)
            if length > OUTPUT:
                return {"error": f"makes more than {OUTPUT} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": f"needs more than {MEMORY >> 20} MiB"}
    except Exception as e:  # whatever foreign code raises
        return {"error": f"{type(e).__name__}: {str(e)[:1000]}"}


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are not top-level ones
    json.dump(_serve(), sys.stdout)
