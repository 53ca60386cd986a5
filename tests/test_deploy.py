"""The files of deploy/ agree with the command, with the package and with one another.

Where the tools that read them are installed they check them too; none is needed.
"""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from olmoe.cli.main import _parse

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "olmoe.service"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "olmoe.yaml").read_text(encoding="utf-8")))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["olmoe"]
PORT = 8000  # the command's own


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def instruction(name: str) -> str:
    """The last one of a name: that of the final stage."""
    return [rest for found, rest in dockerfile() if found == name][-1].strip()


def unit() -> configparser.ConfigParser:
    """The systemd unit; of keys that occur twice the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str
    parser.read(UNIT, encoding="utf-8")
    return parser


def manifest(kind: str) -> dict:
    (found,) = [each for each in MANIFESTS if each["kind"] == kind]
    return found


def pod() -> dict:
    return manifest("Deployment")["spec"]["template"]["spec"]


def container() -> dict:
    (found,) = pod()["containers"]
    return found


def entrypoint() -> list[str]:
    return yaml.safe_load(instruction("ENTRYPOINT"))


def commands() -> dict[str, list[str]]:
    """Every command line in deploy/, as the arguments of `olmoe`."""
    (start,) = [unit()["Service"]["ExecStart"]]
    return {
        "systemd": shlex.split(start.replace("${OLMOE_MODEL}", "olmoe-tiny"))[1:],
        "Dockerfile": entrypoint()[1:],
        "compose": entrypoint()[1:] + COMPOSE["command"],
        "kubernetes": entrypoint()[1:] + container()["args"],
    }


@pytest.mark.parametrize("place", commands())
def test_flags_exist_and_ports_agree(place):
    arguments = _parse(commands()[place])
    assert arguments.command == "serve"
    assert arguments.port == PORT
    assert arguments.host == ("127.0.0.1" if place == "systemd" else "0.0.0.0")


def test_every_file_names_the_same_port():
    assert instruction("EXPOSE") == str(PORT)
    assert f"http://127.0.0.1:{PORT}/health" in instruction("HEALTHCHECK")
    assert container()["ports"] == [{"name": "http", "containerPort": PORT}]
    (service_port,) = manifest("Service")["spec"]["ports"]
    assert service_port["targetPort"] == "http"
    assert COMPOSE["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert f"server 127.0.0.1:{PORT};" in (DEPLOY / "proxy" / "nginx.conf").read_text(encoding="utf-8")
    assert f"reverse_proxy 127.0.0.1:{PORT} " in (DEPLOY / "proxy" / "Caddyfile").read_text(encoding="utf-8")


def test_keys_come_from_the_variable_that_the_server_reads():
    pytest.importorskip("starlette")
    from olmoe.serve.auth import VARIABLE

    assert f"\n{VARIABLE}=\n" in (DEPLOY / "systemd" / "olmoe.env").read_text(encoding="utf-8")
    assert COMPOSE["environment"].keys() == {VARIABLE}
    (key,) = [entry for entry in container()["env"] if "valueFrom" in entry]
    assert key["name"] == VARIABLE
    assert unit()["Service"]["EnvironmentFile"] == "/etc/olmoe.env"
    texts = [path.read_text(encoding="utf-8") for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".env", ".py")]
    assert not [text for text in texts if re.search(r"api[-_]key\S*[:=] *['\"]?\w{16,}", text, re.IGNORECASE)]


# ---- Docker ----


def test_the_image_has_the_torch_of_the_makefile_and_the_extra():
    (pinned,) = re.findall(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    runs = [rest for name, rest in dockerfile() if name == "RUN"]
    assert sum(pinned in run for run in runs) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert '".[serve]"' in runs[-2]
    assert "serve" in project["optional-dependencies"]
    (python,) = [rest.partition("=")[2] for name, rest in dockerfile() if name == "ARG" and rest.startswith("PYTHON")]
    assert project["requires-python"] == f">={python}"


def test_the_build_gets_what_it_copies_and_nothing_else():
    copied = [
        source for name, rest in dockerfile() if name == "COPY" and "--from" not in rest for source in rest.split()[:-1]
    ]
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[0] == "*"
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(copied)
    assert all((ROOT / source).exists() for source in copied)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {build["project"]["readme"], *build["project"]["license-files"], "CMakeLists.txt"} <= set(copied)


def test_the_image_is_slim_and_runs_without_rights():
    stages = [rest for name, rest in dockerfile() if name == "FROM"]
    assert stages == ["python:${PYTHON}-slim AS build", "python:${PYTHON}-slim"]
    after = dockerfile()[[i for i, (name, _) in enumerate(dockerfile()) if name == "FROM"][-1] :]
    assert not any("apt-get" in rest or "pip" in rest for name, rest in after if name == "RUN")
    user, group = instruction("USER").split(":")
    assert int(user) == int(group) > 1000
    security = pod()["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"], security["runAsNonRoot"]) == (int(user), int(group), True)
    assert instruction("STOPSIGNAL") == "SIGTERM"


def test_models_are_kept_in_the_volume():
    assert instruction("VOLUME") == "/models"
    assert "HF_HOME=/models" in instruction("ENV")
    assert COMPOSE["volumes"] == ["models:/models"]
    assert {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}["/models"] == "models"


# ---- Kubernetes ----


def test_selectors_volumes_and_claims_belong_together():
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Deployment")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("Service")["spec"]["selector"].items() <= labels.items()
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes.keys()
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("PersistentVolumeClaim")["metadata"]["name"]


def test_probes_ask_what_the_server_answers_without_a_key():
    pytest.importorskip("starlette")
    from olmoe.serve.app import is_open

    paths = {name: container()[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startupProbe": "/ready",
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }
    assert all(is_open(probe["path"]) and probe["port"] == "http" for probe in paths.values())


def test_the_monitor_finds_the_pods_and_has_the_key():
    (monitor,) = yaml.safe_load_all((DEPLOY / "kubernetes" / "monitor.yaml").read_text(encoding="utf-8"))
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == container()["ports"][0]["name"]
    (key,) = [entry["valueFrom"]["secretKeyRef"] for entry in container()["env"] if "valueFrom" in entry]
    assert endpoint["authorization"]["credentials"] == key


def test_a_pod_has_time_to_drain():
    pause = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    withdrawn = container()["readinessProbe"]["periodSeconds"] * container()["readinessProbe"]["failureThreshold"]
    assert pause >= withdrawn
    assert pod()["terminationGracePeriodSeconds"] >= pause + 120
    assert seconds(unit()["Service"]["TimeoutStopSec"]) >= 120
    assert seconds(COMPOSE["stop_grace_period"]) >= 120


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(s|m|min)", text).groups()
    return int(number) * (1 if unit == "s" else 60)


def test_threads_are_the_cores_of_the_limit():
    (threads,) = [entry["value"] for entry in container()["env"] if entry["name"] == "OMP_NUM_THREADS"]
    assert container()["resources"]["limits"]["cpu"] == threads


def test_kubectl_reads_the_manifest(tmp_path):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    shutil.copy(DEPLOY / "kubernetes" / "olmoe.yaml", tmp_path)
    (tmp_path / "kustomization.yaml").write_text("resources: [olmoe.yaml]\nnamePrefix: a-\n", encoding="utf-8")
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    renamed = list(yaml.safe_load_all(done.stdout))
    assert {each["metadata"]["name"] for each in renamed} == {"a-olmoe", "a-olmoe-models"}
    (deployment,) = [each for each in renamed if each["kind"] == "Deployment"]
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == "a-olmoe-models"  # it is understood as a reference


# ---- systemd ----


def test_the_service_drains_restarts_and_keeps_its_key():
    service = unit()["Service"]
    assert (service["KillSignal"], service["KillMode"], service["Restart"]) == ("SIGTERM", "mixed", "on-failure")
    assert service["DynamicUser"] == "yes"
    assert "MemoryDenyWriteExecute" not in service
    assert "OLMOE_API_KEY" not in UNIT.read_text(encoding="utf-8")


def test_systemd_understands_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = UNIT.read_text(encoding="utf-8").replace("/opt/olmoe/bin/olmoe", sys.executable)  # something that exists
    (tmp_path / "olmoe.service").write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", str(tmp_path / "olmoe.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(tmp_path / "olmoe.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze judges no files")
    assert done.returncode == 0, done.stdout  # an exposure of at most 2.0 of 10


# ---- proxies ----


def test_proxies_pass_streams_on_at_once_and_bodies_as_large_as_the_server_takes():
    nginx = (DEPLOY / "proxy" / "nginx.conf").read_text(encoding="utf-8")
    assert "proxy_buffering off;" in nginx
    assert "proxy_next_upstream off;" in nginx
    assert "flush_interval -1" in (DEPLOY / "proxy" / "Caddyfile").read_text(encoding="utf-8")
    pytest.importorskip("starlette")
    from olmoe.serve.state import ServeSettings

    assert ServeSettings().max_body_bytes == 32 * 2**20
    assert "client_max_body_size 32m;" in nginx


def test_nginx_understands_its_file(tmp_path):
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    certificate, key = tmp_path / "fullchain.pem", tmp_path / "privkey.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    text = (DEPLOY / "proxy" / "nginx.conf").read_text(encoding="utf-8").replace("/etc/ssl/olmoe", str(tmp_path))
    (tmp_path / "nginx.conf").write_text(f"events {{}}\nhttp {{\n{text}\n}}\n", encoding="utf-8")
    done = subprocess.run(["nginx", "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_caddy_understands_its_file():
    if shutil.which("caddy") is None:
        pytest.skip("caddy is not installed")
    command = ["caddy", "validate", "--config", DEPLOY / "proxy" / "Caddyfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_braces_of_the_proxies_close():
    for name in ("nginx.conf", "Caddyfile"):
        text = re.sub(r"#.*", "", (DEPLOY / "proxy" / name).read_text(encoding="utf-8"))
        assert text.count("{") == text.count("}") > 1


# ---- Ray's configuration file ----


def test_rays_file_is_what_the_application_takes():
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed: pip install 'ray[serve]'")
    sys.path.insert(0, str(ROOT))
    try:
        from deploy.ray_app import Arguments
    finally:
        sys.path.remove(str(ROOT))
    given = yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text(encoding="utf-8"))
    parsed = schema.ServeDeploySchema.model_validate(given)
    (application,) = parsed.applications
    assert application.import_path == "deploy.ray_app:build"
    assert Arguments(**application.args).max_replicas == 4
    assert parsed.http_options.port == PORT
