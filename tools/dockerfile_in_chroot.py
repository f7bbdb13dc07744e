"""Builds and runs the Dockerfile without Docker: the same instructions, in the same order, in fresh Debian roots.

For machines that have root and Debian's packages and no Docker engine, such as CI sandboxes. Each stage is a copy of
one root made by debootstrap, RUN is a chroot, and the result runs as Docker would run the image with --read-only
--network none: as its own user, on a read-only root with a fresh /tmp, in network, mount and process namespaces of its
own, until its HEALTHCHECK passes. Debian's Python stands in for the python image's. It understands what this Dockerfile
uses. --bind lends RUN what pip needs on this machine, such as its configuration or certificates.

  sudo python tools/dockerfile_in_chroot.py WORK_FOLDER [--target STAGE] [--build-arg NAME=VALUE] [--bind PATH]
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

CONTEXT = Path(__file__).resolve().parent.parent
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
DOCKER_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Instruction = tuple[str, str]  # keyword, the rest of the line


@dataclass
class Stage:
    """A root on the disk and what the image would say of it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": DOCKER_PATH})
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    lent: tuple[str, ...] = ()
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def parse(text: str) -> list[Instruction]:
    """Instructions with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(keyword.upper(), rest) for keyword, rest in (line.split(None, 1) for line in joined.splitlines())]


def wanted(instructions: list[Instruction], target: str) -> list[Instruction]:
    """The instructions before the first FROM, and those of the stages that `target` is made of ("": the last)."""
    starts = [i for i, (keyword, _) in enumerate(instructions) if keyword == "FROM"]
    stages = {
        instructions[i][1].split()[-1]: instructions[i:j]
        for i, j in zip(starts, [*starts[1:], len(instructions)], strict=True)
    }
    needed = [target or list(stages)[-1]]
    for name in needed:  # grows while it is walked
        needed += [found for _, rest in stages[name] if (found := _from(rest)) in stages and found not in needed]
    return instructions[: starts[0]] + [step for name, steps in stages.items() if name in needed for step in steps]


def build(
    instructions: list[Instruction], base: Path, work: Path, given: dict[str, str], lent: tuple[str, ...]
) -> Stage:
    """Carries out the instructions; returns the last stage."""
    stages: dict[str, Stage] = {}
    shared: dict[str, str] = {}
    stage: Stage | None = None
    for keyword, rest in instructions:
        print(f"==> {keyword} {rest[:150]}", flush=True)
        began = time.monotonic()
        if keyword == "ARG":
            name, _, default = rest.partition("=")
            (shared if stage is None else stage.args)[name] = given.get(name, default.strip('"'))
        elif keyword == "FROM":
            name = rest.split()[-1]
            stage = stages[name] = Stage(work / name, lent=lent)
            subprocess.run(["rm", "-rf", "--one-file-system", stage.root], check=True)
            subprocess.run(["cp", "-a", "--reflink=auto", base, stage.root], check=True)
        elif stage is None:
            raise SystemExit(f"{keyword} before FROM")
        else:
            stage = _step(stage, keyword, rest, stages)
            stages[stage.root.name] = stage
        if time.monotonic() - began > 1:
            print(f"    {time.monotonic() - began:.0f} s", flush=True)
    assert stage is not None
    return stage


def _step(stage: Stage, keyword: str, rest: str, stages: dict[str, Stage]) -> Stage:
    if keyword == "ENV":
        pairs = (part.split("=", 1) for part in shlex.split(rest))
        return replace(stage, env=stage.env | {name: _filled(value, stage.env) for name, value in pairs})
    if keyword == "RUN":
        _chroot(stage, ["/bin/sh", "-c", rest])
    elif keyword == "COPY":
        _copy(stage, rest, stages)
    elif keyword == "WORKDIR":
        (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        return replace(stage, workdir=rest)
    elif keyword == "USER":
        return replace(stage, user=rest)
    elif keyword == "HEALTHCHECK":
        return replace(stage, health=json.loads(rest[rest.index("CMD") + 3 :]))
    elif keyword in ("ENTRYPOINT", "CMD"):
        return replace(stage, **{"entrypoint" if keyword == "ENTRYPOINT" else "command": json.loads(rest)})
    elif keyword not in ("EXPOSE", "VOLUME"):
        raise SystemExit(f"This script does not know {keyword}.")
    return stage


def _from(rest: str) -> str:
    found = re.match(r"--from=(\S+)", rest)
    return found[1] if found else ""


def _filled(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], ""), text)


def _chroot(stage: Stage, command: list[str]) -> None:
    """RUN: as root, with the network, and with this machine's way to its package index."""
    borrowed = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "CERT" in name}
    script = (
        'for d in proc dev; do mount --rbind /$d "$0/$d"; done; '
        'for f in $LENT; do if [ -d $f ]; then mkdir -p "$0$f"; else touch "$0$f"; fi; mount --bind $f "$0$f"; done; '
        'cd "$0"; exec chroot . /bin/sh -c \'cd "$0" && exec "$@"\' "$@"'
    )
    lent = " ".join(["/etc/resolv.conf", "/etc/hosts", *stage.lent])
    subprocess.run(
        ["unshare", "-m", "/bin/sh", "-ec", script, stage.root, stage.workdir, *command],
        env={**borrowed, **stage.args, **stage.env, "LENT": lent},
        check=True,
    )


def _copy(stage: Stage, rest: str, stages: dict[str, Stage]) -> None:
    *sources, target = [part for part in rest.split() if not part.startswith("--")]
    inside = target if target.startswith("/") else f"{stage.workdir}/{target}"
    goal = stage.root / inside.lstrip("/")
    other = _from(rest)
    for source in sources:
        place = (stages[other].root if other else CONTEXT) / source.lstrip("/")
        end = goal / place.name if target.endswith("/") and place.is_file() else goal
        end.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            left_out = None if other else _ignored
            shutil.copytree(place, end, symlinks=True, dirs_exist_ok=True, ignore=left_out)
        else:
            shutil.copy2(place, end)


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What .dockerignore leaves out below the folders that it lets in."""
    lines = [line for line in (CONTEXT / ".dockerignore").read_text().splitlines() if line.startswith("**/")]
    return {name for name in names if any(fnmatch.fnmatch(name, line.removeprefix("**/")) for line in lines)}


def run(stage: Stage, then: str, seconds: float) -> None:
    """Starts the image, waits until it is healthy, runs `then` beside it, and stops it with SIGTERM.

    Raises SystemExit where it does not get healthy, `then` fails, or it ends with another status than 0.
    """
    print(f"==> run {stage.entrypoint + stage.command} as {stage.user}", flush=True)
    inside = _start(stage)
    try:
        began = time.monotonic()
        while _beside(inside.pid, stage, stage.health, quiet=True):
            if inside.poll() is not None or time.monotonic() - began > seconds:
                raise SystemExit(f"not healthy after {time.monotonic() - began:.0f} s, status {inside.poll()}")
            time.sleep(0.5)
        print(f"==> healthy after {time.monotonic() - began:.1f} s", flush=True)
        if then and _beside(inside.pid, stage, ["/bin/sh", "-c", then]):
            raise SystemExit("the command beside it failed")
        if _beside(inside.pid, stage, ["grep", "-q", " / [^ ]* ro[, ]", "/proc/self/mounts"]):
            raise SystemExit("the root file system is not read-only")
    finally:
        children = Path(f"/proc/{inside.pid}/task/{inside.pid}/children").read_text().split()
        for child in children:  # the first process of the namespace; unshare itself only waits for it
            os.kill(int(child), 15)
        status = inside.wait(60)
    if status:
        raise SystemExit(f"ended with status {status} after SIGTERM")
    print("==> ended cleanly after SIGTERM", flush=True)


def _start(stage: Stage) -> "subprocess.Popen[bytes]":
    script = (
        'mount --bind "$0" "$0"; cd "$0"; mount -t tmpfs tmpfs tmp; chmod 1777 tmp; '
        "mkdir -p data; mount -t tmpfs tmpfs data; chown 10001 data; mount -t proc proc proc; mount --rbind /dev dev; "
        "mount -o remount,ro,bind .; ip link set lo up 2>/dev/null || true; "
        'exec chroot . /usr/bin/setpriv --reuid "$1" --regid 0 --clear-groups --no-new-privs --bounding-set=-all '
        '--inh-caps=-all /bin/sh -c \'cd "$0" && exec "$@"\' "$2" '
    )
    words = [*stage.entrypoint, *stage.command]
    script += " ".join(shlex.quote(word) for word in words)
    apart = ["unshare", "-m", "-n", "-p", "-f", "/bin/sh", "-ec", script]
    return subprocess.Popen([*apart, str(stage.root), stage.user, stage.workdir], env=stage.env)


def _beside(pid: int, stage: Stage, command: list[str], quiet: bool = False) -> int:
    """Runs a command in the namespaces of the running image, as its user; returns the exit status."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if not children:
        return 1
    enter = ["nsenter", "-t", children[0], "-m", "-n", "-p", "-r", f"--wdns={stage.workdir}"]
    enter += ["setpriv", "--reuid", stage.user, "--clear-groups"]
    said = subprocess.DEVNULL if quiet else None
    return subprocess.run([*enter, *command], env=stage.env, stdout=said, stderr=said).returncode


def debian(work: Path, suite: str) -> Path:
    """A Debian root with Python, made once and kept."""
    base = work / f"debian-{suite}"
    if not base.is_dir():
        part = work / f"{base.name}.part"
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, part], check=True)
        (part / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        part.rename(base)
    return base


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the roots; some gigabytes")
    parser.add_argument("--target", default="", help="stage to build; the last")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], metavar="PATH", help="path of this machine for RUN")
    parser.add_argument("--suite", default="bookworm", help="Debian release of the base")
    parser.add_argument("--then", default="", help="shell command to run inside once it is healthy")
    parser.add_argument("--seconds", type=float, default=120, help="patience until it is healthy")
    arguments = parser.parse_args(argv)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    instructions = wanted(parse((CONTEXT / "Dockerfile").read_text()), arguments.target)
    given = dict(pair.split("=", 1) for pair in arguments.build_arg)
    stage = build(instructions, debian(work, arguments.suite), work, given, tuple(arguments.bind))
    size = subprocess.run(["du", "-sm", stage.root], capture_output=True, text=True, check=True).stdout.split()[0]
    print(f"==> {stage.root}: {size} MB", flush=True)
    run(stage, arguments.then, arguments.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
