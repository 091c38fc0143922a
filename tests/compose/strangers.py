"""Nobody is root, nothing is published beyond the loopback, and without a token there is no answer."""

from __future__ import annotations

import urllib.error
import urllib.request

from outcome import Check
from stack import run

SERVICES = ("queue", "teacher", "sampler", "trainer", "report")


def closed_to_strangers(check: Check) -> None:
    stack = check.stack
    for service in SERVICES:
        for name in stack.containers(service):
            found = stack.inspect(name)
            host = found["HostConfig"]
            check.that(
                found["Config"]["User"] == "10001:10001"
                and host["ReadonlyRootfs"]
                and host["CapDrop"] == ["ALL"]
                and not host["Privileged"],
                f"{name}: user 10001, read-only root, no capabilities",
            )
            addresses = {
                b["HostIp"] for some in found["NetworkSettings"]["Ports"].values() for b in some or ()
            }
            check.that(
                addresses <= {"127.0.0.1"}, f"{name}: published on {sorted(addresses) or 'no address'}"
            )
    address = stack.compose("port", "--index", "2", "teacher", "8081").strip()
    token = run(["docker", "exec", stack.container("teacher", 2), "cat", "/run/tutelage/token"]).strip()
    answers = [ask(f"http://{address}/v1/teacher", given) for given in (None, "guess", token)]
    check.that(answers == [401, 401, 200], f"a teacher without, with a wrong and with its token: {answers}")
    noauth = run(["docker", "exec", stack.container("queue"), "valkey-cli", "PING"], check=False).strip()
    check.that("NOAUTH" in noauth, f"the queue without a password: {noauth}")


def ask(url: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
