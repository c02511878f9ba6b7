"""compose.yaml, the Dockerfile and the configuration they mount, as far as that can be told without an engine."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml
from tapeline import limits, permissions
from tapeline.settings import EX_CONFIG

ROOT: Final = Path(__file__).parent.parent
SERVICES: Final = ("edge", "inference", "tools", "provision")
BUILT: Final = shutil.ignore_patterns("__pycache__", "node_modules", "dist")  # as .dockerignore does


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def stages() -> dict[str, list[str]]:
    """The Dockerfile's stages by name, each with its lines; the first of them says what it is built from."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[start[2]] = [start[1]]
        elif found:
            found[next(reversed(found))].append(line)
    return found


def specification() -> dict[str, Any]:
    """The Compose specification's own schema, as check-jsonschema ships it."""
    file = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema: dict[str, Any] = json.loads(file.read_text())
    return schema


def test_follows_the_compose_specification(compose: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(specification()).validate(compose)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"services": {"edge": {"imagee": "x"}}},
        {"services": {"edge": {"image": "x", "depends_on": {"nats": {"condition": "service_ready"}}}}},
        {"services": {"edge": {"image": "x", "deploy": {"replicas": "two"}}}, "volums": {}},
    ],
)
def test_the_specification_would_catch_a_mistake(spoilt: dict[str, Any]) -> None:
    assert not jsonschema.Draft202012Validator(specification()).is_valid(spoilt)


def test_what_it_builds_mounts_and_waits_for_is_there(compose: dict[str, Any], stages: dict[str, list[str]]) -> None:
    for name, service in compose["services"].items():
        assert "build" in service or re.fullmatch(r"\S+:\d+\.\d+\S*", service["image"]), f"{name}: no version"
        if "build" in service:
            assert service["build"]["target"] in stages, name
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            there = (ROOT / source).is_file() if source.startswith(".") else source in compose["volumes"]
            assert there, f"{name} mounts {source}"
        for other in service.get("depends_on", ()):
            assert other in compose["services"], f"{name} waits for {other}"


def test_whoever_is_asked_to_end_has_the_time_that_it_takes(compose: dict[str, Any]) -> None:
    seconds = f"{limits.EXIT_S:.0f}"
    assert {compose["services"][name]["stop_grace_period"] for name in SERVICES} == {f"{seconds}s"}
    for page, words in (
        ("tools.md", f"give it {seconds} s"),
        ("operating.md", f"Give every service {seconds} s"),
        ("first-worker.md", f"stop_grace_period: {seconds}s"),
    ):
        assert words in (ROOT / "docs" / page).read_text()
    # A tool worker takes longest: calls end, those that are cut say so, then what brings calls and MCP servers end side
    # by side, and last the loop of the async tools, which one of them may block.
    fetches_s = limits.PULL_S + 2 * limits.TAKE_CANCEL_S
    worker_s = limits.DRAIN_S + limits.APPEND_TIMEOUT_S + max(fetches_s, limits.MCP_CLOSE_S) + limits.TOOL_CANCEL_S
    assert worker_s + 2 <= limits.EXIT_S, "and two seconds for a busy machine"


def test_nobody_starts_before_provision_has_succeeded(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["provision"]["depends_on"]["nats"]["condition"] == "service_healthy"
    assert "restart" not in services["provision"]
    for name in set(SERVICES) - {"provision"}:
        condition = services[name]["depends_on"]["provision"]["condition"]
        assert condition == "service_completed_successfully", name


def test_the_edges_are_told_who_may_come_in_and_do_not_start_without(
    compose: dict[str, Any], stages: dict[str, list[str]]
) -> None:
    edge = compose["services"]["edge"]
    assert edge["deploy"]["replicas"] == 2
    ways = ("TAPELINE_API_KEYS", "TAPELINE_JWT_SECRET", "TAPELINE_JWKS_URL")
    assert [edge["environment"][way] for way in ways] == [None, None, None], "passed on where they are set"
    (host,) = re.findall(r"TAPELINE_HOST=(\S+)", "\n".join(stages["edge"]))
    env = {**os.environ, "TAPELINE_HOST": host, "TAPELINE_PORT": "0"}
    for way in ways:
        env.pop(way, None)
    ended = subprocess.run([sys.executable, "-m", "services.edge"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == EX_CONFIG
    assert all(way in ended.stderr for way in ways)


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_what_its_service_imports(service: str, stages: dict[str, list[str]], tmp_path: Path) -> None:
    """Lays out the files a target copies, and no others, and runs its command there: it asks for its settings."""
    for stage in (stages[service][0], service):
        for line in stages[stage]:
            if copy := re.fullmatch(r"COPY (services/\S+) (services/\S+)", line):
                source, target = ROOT / copy[1], tmp_path / copy[2]
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, ignore=BUILT)
                else:
                    shutil.copy(source, target)
    (command,) = (json.loads(line[4:]) for line in stages[service] if line.startswith("CMD "))
    assert command[0] == "python"
    ended = subprocess.run(
        [sys.executable, *command[1:]], cwd=tmp_path, env={}, capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, len(ended.stderr.splitlines())) == (EX_CONFIG, 1), ended.stderr
    assert "TAPELINE_NATS_URL" in ended.stderr


def test_the_page_is_built_from_what_its_stage_copies(stages: dict[str, list[str]], tmp_path: Path) -> None:
    for line in stages["page"]:
        if copy := re.fullmatch(r"COPY (\S+) (\S+)", line):
            shutil.copytree(ROOT / copy[1], tmp_path / copy[2], ignore=BUILT)
        elif line.startswith("RUN "):
            ended = subprocess.run(line[4:].split(), cwd=tmp_path, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stderr
    (built,) = re.findall(r"COPY --from=page /build/(\S+) \1", "\n".join(stages["edge"]))
    html = (tmp_path / built / "index.html").read_text()
    assert html == (ROOT / built / "index.html").read_text(), "the same files, the same names"
    for name in re.findall(r'"(page/[^"]+)"', html):
        assert (tmp_path / built / name).is_file()


def test_the_image_for_other_peoples_tools_runs_the_modules_it_is_given(
    stages: dict[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "my_tools.py").write_text("from tapeline.tools import tool\n\n@tool\ndef mine() -> None: ...\n")
    (entry,) = (json.loads(line[11:]) for line in stages["worker"] if line.startswith("ENTRYPOINT "))
    ended = subprocess.run(
        [sys.executable, *entry[1:], "my_tools"], cwd=tmp_path, env={}, capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, len(ended.stderr.splitlines())) == (EX_CONFIG, 1), ended.stderr
    assert "TAPELINE_NATS_URL" in ended.stderr


def test_what_the_images_copy_is_there_and_not_ignored(stages: dict[str, list[str]]) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in (line for lines in stages.values() for line in lines if line.startswith("COPY ")):
        if "--from=" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert source.partition("/")[0] in kept, line


def test_every_image_installs_by_hash(stages: dict[str, list[str]]) -> None:
    for stage, lock in {"build": "requirements.lock", "build-worker": "requirements-worker.lock"}.items():
        locked, own = (line for line in stages[stage] if "pip install" in line)
        assert "--require-hashes" in locked
        assert f"-r {lock}" in locked
        assert "--no-deps --no-build-isolation ." in own
    assert str(stages).count("pip install") == 4, "and nothing else is installed"


def test_no_image_runs_as_root(stages: dict[str, list[str]]) -> None:
    assert "USER tapeline" in stages["base"]
    assert "USER tapeline" in stages["worker"]
    assert all(stages[service][0] == "base" for service in SERVICES)


def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if not nginx:
        pytest.skip("nginx is not installed, so docs/deploy/nginx.conf was NOT checked")
    # Older ones cannot look up names at run time, and there is no edge to look up here.
    site = (ROOT / "docs/deploy/compose-site.conf").read_text()
    site, names = re.subn(r"\n *resolver .*;(\n *server )edge:8080 resolve ", r"\g<1>127.0.0.1:8080 ", site)
    assert names == 1
    (tmp_path / "site.conf").write_text(site)
    text = (ROOT / "docs/deploy/nginx.conf").read_text().replace("/var/log/nginx", str(tmp_path))
    config = tmp_path / "nginx.conf"
    config.write_text(f"pid {tmp_path}/nginx.pid;\n{text}")
    ended = subprocess.run([nginx, "-t", "-p", tmp_path, "-c", config], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0, ended.stderr


def test_each_service_comes_into_nats_as_itself(compose: dict[str, Any]) -> None:
    services = compose["services"]
    passwords = services["nats"]["environment"]
    for role in permissions.ROLES:
        variable = f"TAPELINE_NATS_{role.name.upper()}_PASSWORD"
        assert passwords[variable].startswith(f"${{{variable}:?"), "compose starts nothing without"
    for name in SERVICES:
        variable = f"TAPELINE_NATS_{name.upper()}_PASSWORD"
        environment = services[name]["environment"]
        assert environment["TAPELINE_NATS_URL"] == f"nats://{name}:${{{variable}:?}}@nats:4222"
        assert "_PASSWORD" not in "".join(set(map(str, environment.values())) - {environment["TAPELINE_NATS_URL"]})


def test_nats_takes_its_configuration_and_refuses_it_without_passwords(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text((ROOT / "docs/deploy/nats.conf").read_text().replace("/data", str(tmp_path)))
    shutil.copy(ROOT / "docs/deploy/accounts.conf", tmp_path)
    passwords = {f"TAPELINE_NATS_{role.name.upper()}_PASSWORD": secrets.token_hex(24) for role in permissions.ROLES}
    assert checked(config, passwords) == (0, "")
    for variable in passwords:
        code, said = checked(config, {name: value for name, value in passwords.items() if name != variable})
        assert code == 1
        assert variable in said


def checked(config: Path, environ: dict[str, str]) -> tuple[int, str]:
    """What a real server says of the configuration: its exit code, and why it refuses."""
    server = Path(sysconfig.get_path("scripts")) / "nats-server"
    ended = subprocess.run(
        [server, "-t", "-c", config], env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    return ended.returncode, ended.stderr if ended.returncode else ""
