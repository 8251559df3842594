"""deploy/kubernetes: every variant rendered, held against published schemas, and its objects against each other.

No cluster is asked. Without kubectl overlays and components cannot be rendered and their tests skip; `base` and
`kserve` are then read by a few lines here, which are compared with kubectl where there is one.
"""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prometheus_client import REGISTRY
from starlette.routing import Route

from deploy.kubernetes import prometheus_rule
from parchgrad.errors import ModelError
from service import metrics, versions
from service.app import BENTOML_ROUTES, create_app
from service.settings import Settings, SettingsError
from tests.deploy import kserve_types
from tests.service.serving import PROJECT_ROOT

Object = dict[str, Any]

FOLDER = PROJECT_ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(p.name for p in (FOLDER / "overlays").iterdir() if p.is_dir())
COMPONENTS = sorted(p.name for p in (FOLDER / "components").iterdir() if p.is_dir())
OLDEST_KUBECTL = (1, 27)  # its kustomize has `labels`, components and merged generators as used here
OLDEST, NEWEST = "1.30", "1.37"  # clusters: `preStop.sleep` is on by default from 1.30; what kubernetes-validate knows
MIB = 2**20
CLOSING_S = 15  # of terminationGracePeriodSeconds, for processes to end
ADAPTER = FOLDER / "prometheus-adapter" / "config.yaml"

# Of the operator's kinds (its CRDs of 0.84.1) what is used here, and no other field.
TEXT, LABELS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
DURATION = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d))+$"}


def _fields(required: list[str], **properties: Any) -> Object:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _list(item: Object) -> Object:
    return {"type": "array", "minItems": 1, "items": item}


OPERATOR_SPECS = {
    "ServiceMonitor": _fields(
        ["selector", "endpoints"],
        selector=_fields(["matchLabels"], matchLabels=LABELS),
        endpoints=_list(
            _fields(
                ["port"], port=TEXT, path=TEXT, interval=DURATION, scrapeTimeout=DURATION,
                authorization=_fields(
                    ["credentials"], type=TEXT, credentials=_fields(["name", "key"], name=TEXT, key=TEXT)
                ),
            )
        ),
    ),
    "PrometheusRule": _fields(
        ["groups"],
        groups=_list(
            _fields(
                ["name", "rules"], name=TEXT, interval=DURATION, limit={"type": "integer"},
                rules=_list(
                    _fields(
                        ["expr"], record=TEXT, alert=TEXT, expr={"type": ["string", "integer"]}, labels=LABELS,
                        annotations=LABELS, keep_firing_for=DURATION, **{"for": DURATION},
                    )
                    | {"oneOf": [{"required": ["record"]}, {"required": ["alert"]}]}
                ),
            )
        ),
    ),
}  # fmt: skip


@cache
def _why_no_kubectl() -> str:
    found = "none"
    if shutil.which("kubectl"):
        told = subprocess.run(["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True)
        version = json.loads(told.stdout)["clientVersion"]
        number = int(version["major"]), int(re.sub(r"\D", "", version["minor"]))
        if number >= OLDEST_KUBECTL:
            return ""
        found = f"{number[0]}.{number[1]}"
    return f"kubectl 1.27 or newer is needed to render Kustomize's overlays, found {found}"


@cache
def _rendered(folder: Path) -> list[Object]:
    if reason := _why_no_kubectl():
        pytest.skip(reason)
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns: " + done.stderr
    return list(yaml.safe_load_all(done.stdout))


def render(folder: Path) -> list[Object]:
    """The objects that `kubectl apply -k` would send; the caller's own."""
    return copy.deepcopy(_rendered(folder))


def read(folder: Path) -> list[Object]:
    """Without kubectl: a kustomization of a namespace, resources and a ConfigMap, whose name gets no digest."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator"}
    assert kustomization.keys() <= known, "that takes kubectl"
    objects: list[Object] = [yaml.safe_load((folder / name).read_text()) for name in kustomization["resources"]]
    for made in kustomization.get("configMapGenerator", []):
        lines = [line for file in made["envs"] for line in (folder / file).read_text().splitlines()]
        data = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": made["name"]}, "data": data})
    for one in objects:
        one["metadata"]["namespace"] = kustomization["namespace"]
    return objects


def overlay(folder: Path, *components: str, **more: Any) -> Path:
    """A kustomization in `folder`: the processors' overlay with components."""
    there = os.path.relpath(FOLDER, folder.resolve())
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    body = {"resources": [f"{there}/overlays/cpu"], "components": [f"{there}/components/{one}" for one in components]}
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(head | body | more))
    return folder


TOGETHER = {
    "everything": [
        "volumes", "autoscaling", "monitoring", "guarded-metrics", "tracing", "kserve-names", "triton-names",
    ],
    "guarded": ["monitoring", "guarded-metrics"],
    "names": ["monitoring", "kserve-names", "triton-names"],
}  # fmt: skip
VARIANTS = ["base", "kserve", *OVERLAYS, *TOGETHER, "volumes", "autoscaling", "monitoring", "tracing"]
Variant = Callable[[str], list[Object]]


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """By name, its objects. Kustomizations that are not in the checkout are written once, and so rendered once."""
    written = tmp_path_factory.mktemp("variants")

    def made(name: str) -> list[Object]:
        if name == "base" or (name == "kserve" and _why_no_kubectl()):
            return read(FOLDER / name)
        if name == "kserve":
            return render(FOLDER / name)
        if name in OVERLAYS:
            return render(FOLDER / "overlays" / name)
        return render(overlay(written / name, *TOGETHER.get(name, [name])))

    return made


@pytest.fixture(params=VARIANTS)
def objects(request: pytest.FixtureRequest, variant: Variant) -> list[Object]:
    """Each variant: the base, the overlays, KServe, and components alone and together."""
    return variant(request.param)


@pytest.fixture(params=[name for name in VARIANTS if name != "kserve"])
def deployed(request: pytest.FixtureRequest, variant: Variant) -> list[Object]:
    """Variants that have a Deployment; KServe makes its own."""
    return variant(request.param)


@pytest.mark.parametrize("name", ["base", "kserve"])
def test_read_as_kubectl_renders(name: str) -> None:
    """What stands in for kubectl differs in the ConfigMap's name only."""

    def sorted_by_kind(objects: list[Object]) -> list[Object]:
        return sorted(objects, key=lambda one: str(one["kind"]))

    rendered = json.dumps(sorted_by_kind(render(FOLDER / name)), sort_keys=True)
    rendered = re.sub(r'"parchgrad-settings-[a-z0-9]{10}"', '"parchgrad-settings"', rendered)
    assert rendered == json.dumps(sorted_by_kind(read(FOLDER / name)), sort_keys=True)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def the(objects: list[Object], kind: str) -> Object:
    (one,) = of_kind(objects, kind)
    return one


def pod_spec(objects: list[Object]) -> Object:
    """Of the Deployment; for KServe what it merges: the runtime's containers into the predictor's fields."""
    if of_kind(objects, "Deployment"):
        spec: Object = the(objects, "Deployment")["spec"]["template"]["spec"]
        return spec
    predictor, runtime = the(objects, "InferenceService")["spec"]["predictor"], the(objects, "ServingRuntime")["spec"]
    return predictor | {"containers": runtime["containers"], "volumes": runtime["volumes"]}


def container(objects: list[Object]) -> Object:
    (one,) = pod_spec(objects)["containers"]
    return dict(one)


def environment(objects: list[Object]) -> dict[str, str]:
    """What the process gets from the manifests."""
    given: dict[str, str] = {}
    for source in container(objects).get("envFrom", []):
        (data,) = [
            m["data"] for m in of_kind(objects, "ConfigMap") if m["metadata"]["name"] == source["configMapRef"]["name"]
        ]
        given |= data
    name = the(objects, "InferenceService")["metadata"]["name"] if of_kind(objects, "InferenceService") else ""
    return given | {one["name"]: one["value"].replace("{{.Name}}", name) for one in container(objects).get("env", [])}


def settings(objects: list[Object]) -> Settings:
    return Settings.from_environment(environment(objects))


def quantity(text: str | int) -> float:
    """Kubernetes's notation: 500m, 2, 640Mi."""
    found = re.fullmatch(r"([0-9.]+)(m|k|M|G|Ki|Mi|Gi)?", str(text))
    assert found, f"{text!r} is no quantity"
    scale = {None: 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    return float(found[1]) * scale[found[2]]


def matches(selector: Object, labels: dict[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items()


# Schemas


@pytest.fixture(scope="session")
def kserve_errors() -> Iterator[kserve_types.Check]:
    """What is wrong with KServe's kinds; one process, as its types take seconds to import."""
    with kserve_types.checking() as check:
        yield check


def schema_errors(objects: list[Object], version: str, kserve_errors: kserve_types.Check) -> list[str]:
    """Unknown fields count: the strict schemas know every field there is."""
    found = []
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        try:
            if one["kind"] in OPERATOR_SPECS:
                jsonschema.validate(one["spec"], OPERATOR_SPECS[one["kind"]])
                metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": one["metadata"]}
                kubernetes_validate.validate(metadata, version, strict=True)
            elif not one["apiVersion"].startswith("serving.kserve.io/"):
                kubernetes_validate.validate(one, version, strict=True)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            found.append(f"{name}: {'.'.join(map(str, error.path))}: {error.message}")
    served = [one for one in objects if one["apiVersion"].startswith("serving.kserve.io/")]
    return found + (kserve_errors(served) if served else [])


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_schemas(objects: list[Object], version: str, kserve_errors: kserve_types.Check) -> None:
    assert schema_errors(objects, version, kserve_errors) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec.template.spec.containers.0.readonlyRootFilesystem", True),
        ("Deployment", "spec.replicas", "two"),
        ("NetworkPolicy", "spec.ingress.0.from.0.podSelektor", {}),
        ("HorizontalPodAutoscaler", "spec.metrics.0.pods.target.averageValues", "1"),
        ("PodDisruptionBudget", "spec.unhealthyPodEviction", "AlwaysAllow"),
        ("ServiceMonitor", "spec.endpoints.0.scrape_timeout", "1s"),
        ("PrometheusRule", "spec.groups.0.rules.0.fore", "1m"),
        ("ServiceMonitor", "metadata.label", {}),
        ("InferenceService", "spec.predictor.model.storageURI", "pvc://x"),
        ("InferenceService", "spec.predictor.minReplicas", "1"),
        ("ServingRuntime", "spec.containers.0.port", []),
        ("ServingRuntime", "spec.containers.0", {"image": "parchgrad:cpu"}),
    ],
)
def test_schemas_refuse_what_is_wrong(
    kind: str, path: str, value: Any, variant: Variant, kserve_errors: kserve_types.Check
) -> None:
    """The checks themselves: one mistake in an object that was right."""
    there = {"InferenceService": "kserve", "ServingRuntime": "kserve"}
    there |= {"Deployment": "base", "NetworkPolicy": "base", "PodDisruptionBudget": "base"}
    wrong = of_kind(variant(there.get(kind, "cpu-production")), kind)[0]
    assert schema_errors([wrong], NEWEST, kserve_errors) == []
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner: Any = wrong
    for part in parents:
        inner = inner[part]
    inner[last] = value
    assert len(schema_errors([wrong], NEWEST, kserve_errors)) >= 1


APART = {"namespace.yaml", "persistentvolumeclaim.yaml"}  # applied once, and never with an overlay


def claim() -> Object:
    one: Object = yaml.safe_load((FOLDER / "persistentvolumeclaim.yaml").read_text())
    return one


def test_every_file_is_in_a_variant(tmp_path: Path) -> None:
    """No manifest lies about unused: what each file names is rendered somewhere."""
    rendered = {
        (one["kind"], one["metadata"]["name"])
        for folder in [*(FOLDER / "overlays").iterdir(), FOLDER / "kserve", overlay(tmp_path, *COMPONENTS[::-1])]
        for one in render(folder)
    }
    files = [p for p in FOLDER.rglob("*.yaml") if p.name not in APART | {"kustomization.yaml", "config.yaml"}]
    assert len(files) >= 10
    for file in files:
        one = yaml.safe_load(file.read_text())
        assert (one["kind"], one["metadata"]["name"]) in rendered, file


def test_what_is_applied_apart(objects: list[Object]) -> None:
    """`kubectl delete -k` of a variant leaves the keys' namespace and the models."""
    assert {one["kind"] for one in objects} & {"Namespace", "PersistentVolumeClaim"} == set()


def test_the_claim() -> None:
    kubernetes_validate.validate(claim(), NEWEST, strict=True)
    namespace = yaml.safe_load((FOLDER / "namespace.yaml").read_text())
    assert claim()["metadata"]["namespace"] == namespace["metadata"]["name"]
    assert claim()["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_namespace() -> None:
    """Its pods are held to the restricted standard by the cluster too."""
    namespace = yaml.safe_load((FOLDER / "namespace.yaml").read_text())
    kubernetes_validate.validate(namespace, NEWEST, strict=True)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_all_in_one_namespace(objects: list[Object]) -> None:
    expected = yaml.safe_load((FOLDER / "namespace.yaml").read_text())["metadata"]["name"]
    assert {one["metadata"]["namespace"] for one in objects} == {expected}


def test_no_secret_is_among_them(objects: list[Object]) -> None:
    assert not of_kind(objects, "Secret")


# The pod


def restricted(spec: Object) -> list[str]:
    """What the restricted Pod Security Standard, and the baseline beneath it, forbid of this pod; rule by rule."""
    found = []

    def rule(right: bool, text: str) -> None:
        if not right:
            found.append(text)

    pod = spec.get("securityContext", {})
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        rule(not spec.get(name), name)
    volumes = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for one in spec.get("volumes", []):
        rule(one.keys() - {"name"} <= volumes, f"volume {one['name']}")
    rule(not pod.get("sysctls"), "sysctls")
    for one in [*spec["containers"], *spec.get("initContainers", []), *spec.get("ephemeralContainers", [])]:
        own = one.get("securityContext", {})
        rule(not own.get("privileged"), "privileged")
        rule(own.get("allowPrivilegeEscalation") is False, "allowPrivilegeEscalation")
        rule(own.get("capabilities", {}).get("drop") == ["ALL"], "capabilities.drop")
        rule(set(own.get("capabilities", {}).get("add", [])) <= {"NET_BIND_SERVICE"}, "capabilities.add")
        rule(own.get("runAsNonRoot", pod.get("runAsNonRoot")) is True, "runAsNonRoot")
        rule(own.get("procMount", "Default") == "Default", "procMount")
        for port in one.get("ports", []):
            rule(not port.get("hostPort"), "hostPort")
        for name in ("livenessProbe", "readinessProbe", "startupProbe"):
            asked = one.get(name, {})
            rule(not any(asked.get(how, {}).get("host") for how in ("httpGet", "tcpSocket")), f"{name}.host")
        for name, hook in one.get("lifecycle", {}).items():
            rule(not any(hook.get(how, {}).get("host") for how in ("httpGet", "tcpSocket")), f"{name}.host")
        seccomp = own.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
        rule(seccomp in ("RuntimeDefault", "Localhost"), "seccompProfile")
    for context in [pod, *(one.get("securityContext", {}) for one in spec["containers"])]:
        rule(context.get("runAsUser", 1) != 0, "runAsUser")
        selinux = context.get("seLinuxOptions", {})
        kinds = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
        rule(selinux.get("type", "") in kinds and not selinux.keys() & {"user", "role"}, "seLinuxOptions")
        armour = context.get("appArmorProfile", {}).get("type", "RuntimeDefault")
        rule(armour in ("RuntimeDefault", "Localhost"), "appArmorProfile")
        rule(not context.get("windowsOptions", {}).get("hostProcess"), "hostProcess")
    return found


def test_restricted(objects: list[Object]) -> None:
    """The standard's rules; and ours beyond it: a read-only root, the image's user, no token."""
    spec, own = pod_spec(objects), container(objects)["securityContext"]
    assert restricted(spec) == []
    assert own["readOnlyRootFilesystem"] is True
    user = spec.get("securityContext", {}) | own
    assert (user["runAsUser"], user["runAsGroup"]) == (10001, 10001)
    assert spec["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("spec", "hostNetwork", True),
        ("spec", "hostPID", True),
        ("spec", "hostIPC", True),
        ("spec", "volumes", [{"name": "v", "hostPath": {"path": "/"}}]),
        ("pod", "sysctls", [{"name": "kernel.shm_rmid_forced", "value": "0"}]),
        ("pod", "runAsNonRoot", False),
        ("pod", "runAsUser", 0),
        ("pod", "seccompProfile", {"type": "Unconfined"}),
        ("pod", "seLinuxOptions", {"user": "root"}),
        ("pod", "appArmorProfile", {"type": "Unconfined"}),
        ("pod", "windowsOptions", {"hostProcess": True}),
        ("own", "privileged", True),
        ("own", "allowPrivilegeEscalation", True),
        ("own", "capabilities", {"drop": ["NET_RAW"]}),
        ("own", "capabilities", {"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
        ("own", "procMount", "Unmasked"),
        ("own", "runAsUser", 0),
        ("container", "ports", [{"containerPort": 3000, "hostPort": 3000}]),
        ("container", "livenessProbe", {"httpGet": {"host": "example.com", "port": 80}}),
        ("container", "lifecycle", {"preStop": {"httpGet": {"host": "example.com", "port": 80}}}),
    ],
)
def test_restricted_refuses(where: str, name: str, value: Any) -> None:
    """Each rule of the check above can fail."""
    spec = pod_spec(read(FOLDER / "base"))
    one = spec["containers"][0]
    place = {"spec": spec, "pod": spec["securityContext"], "own": one["securityContext"], "container": one}[where]
    place[name] = value
    assert len(restricted(spec)) == 1


def test_settings(objects: list[Object]) -> None:
    """Every variable is a setting with a value that is allowed; and those that the rest leans on."""
    given = environment(objects)
    assert all(name.startswith("PARCHGRAD_") for name in given)
    read = settings(objects)
    assert read.workers == 1
    assert not read.allow_anonymous
    asked = container(objects)["resources"]["requests"]
    assert read.threads == quantity(asked["cpu"]), "threads are the cores that were asked for"


def test_settings_refuse_a_spelling_mistake() -> None:
    given = environment(read(FOLDER / "base"))
    with pytest.raises(SettingsError, match="did you mean PARCHGRAD_DRAIN_MS"):
        Settings.from_environment(given | {"PARCHGRAD_DRAIN": "1"})


def test_no_service_links(objects: list[Object]) -> None:
    """A Service `parchgrad` would set PARCHGRAD_PORT, which is no setting, and no pod would start."""
    assert pod_spec(objects)["enableServiceLinks"] is False
    with pytest.raises(SettingsError, match="PARCHGRAD_PORT"):
        Settings.from_environment({"PARCHGRAD_PORT": "tcp://10.0.0.1:80"})


def test_mounts(objects: list[Object]) -> None:
    """Every volume is mounted, every mount is a volume, only /tmp can be written, what is named lies beneath."""
    volumes = {one["name"]: one for one in pod_spec(objects)["volumes"]}
    mounts = {one["name"]: one for one in container(objects)["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert [one["mountPath"] for one in mounts.values() if not one.get("readOnly")] == ["/tmp"]
    keys = mounts["keys"]["mountPath"]
    (item,) = volumes["keys"]["secret"]["items"]
    assert settings(objects).api_keys_file == f"{keys}/{item['path']}"
    claims = [one["persistentVolumeClaim"]["claimName"] for one in volumes.values() if "persistentVolumeClaim" in one]
    if claims:
        assert claims == [claim()["metadata"]["name"]]
        read = settings(objects)
        for folder in (read.models_dir, read.tables_dir, read.graphs_dir):
            assert str(folder).startswith(mounts["data"]["mountPath"] + "/")


def test_memory(objects: list[Object]) -> None:
    """/tmp is memory of the container: bodies fit into it, and 2 GiB are left for the process (docs/operations.md)."""
    (room,) = [one["emptyDir"] for one in pod_spec(objects)["volumes"] if one["name"] == "tmp"]
    assert room["medium"] == "Memory"
    tmp, read = quantity(room["sizeLimit"]), settings(objects)
    assert tmp >= read.workers * read.max_bodies_bytes + 64 * MIB
    resources = container(objects)["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    assert quantity(resources["limits"]["memory"]) - tmp >= 2048 * MIB


def test_grace_period(objects: list[Object]) -> None:
    """preStop, drain, the longest request, gRPC after HTTP, and a little: no less, and not much more."""
    read = settings(objects)
    stop = container(objects).get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})["sleep"]["seconds"]
    http = math.ceil((read.body_timeout_ms + read.max_timeout_ms) / 1000)
    grpc = math.ceil(read.max_timeout_ms / 1000) if read.grpc_port else 0
    needed = stop + read.drain_ms / 1000 + http + grpc + CLOSING_S
    assert needed <= pod_spec(objects)["terminationGracePeriodSeconds"] <= needed + 30


def test_drain_is_seen(deployed: list[Object]) -> None:
    """While a pod drains, readiness fails often enough to be noticed before the socket closes."""
    probe = container(deployed)["readinessProbe"]
    assert settings(deployed).drain_ms / 1000 >= probe["periodSeconds"] * probe["failureThreshold"]


def test_probes(objects: list[Object]) -> None:
    """Paths that the service has and answers without a key; ports that the container has."""
    one = container(objects)
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    routes = {*BENTOML_ROUTES, *(r.path for r in create_app().routes if isinstance(r, Route))}
    probes = {name: one[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in one}
    assert {"readinessProbe", "livenessProbe"} <= probes.keys()
    for probe in probes.values():
        asked = probe["httpGet"]
        assert asked["path"] in routes
        assert asked["path"] in BENTOML_ROUTES or asked["path"].startswith("/v2/health/")
        assert ports.get(asked["port"], asked["port"]) == 3000
    assert "ready" in probes["readinessProbe"]["httpGet"]["path"]
    assert "live" in probes["livenessProbe"]["httpGet"]["path"], "a model that does not load is not mended by a restart"


def test_images(objects: list[Object]) -> None:
    """A tag that says which; the GPU's with a device and the setting, the other without both."""
    image = container(objects)["image"]
    name, _, tag = image.rpartition(":")
    assert name == "parchgrad"
    assert tag in ("cpu", "gpu")
    gpus = container(objects)["resources"]["limits"].get("nvidia.com/gpu")
    tolerated = {one["key"] for one in pod_spec(objects).get("tolerations", [])}
    expected = ("1", "cuda", {"nvidia.com/gpu"}) if tag == "gpu" else (None, "cpu", set())
    assert (gpus, settings(objects).device, tolerated) == expected


def page() -> str:
    return (PROJECT_ROOT / "docs" / "kubernetes.md").read_text()


def test_the_overlay_of_the_page(tmp_path: Path) -> None:
    """Another registry, a component and a setting, as docs/kubernetes.md has it beside a checkout."""
    (text,) = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", page(), re.S)
    there = os.path.relpath(PROJECT_ROOT, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(text.replace("[parchgrad/", f"[{there}/"))
    objects = render(tmp_path)
    assert container(objects)["image"] == "registry.example/team/parchgrad:cpu-1.0"
    assert settings(objects).max_queue == 128
    assert of_kind(objects, "ServiceMonitor")


GRAPH_TO_BE_PUT = "0" * 64  # no file's digest: whoever fills the volume puts the graph's


def test_digests(objects: list[Object]) -> None:
    """Of what lies on the volume all three are held: the bundled model's, and for its graph one that none has."""
    digests = environment(objects).get("PARCHGRAD_DIGESTS")
    if not any("persistentVolumeClaim" in one for one in pod_spec(objects)["volumes"]):
        assert digests is None
        return
    model = yaml.safe_load((PROJECT_ROOT / "models/scenes/1/model.yaml").read_text())
    table = json.loads((PROJECT_ROOT / "selection_tables/scenes/1/manifest.json").read_text())
    assert settings(objects).digests_of("scenes", "1") == {
        "weights": model["weights"]["sha256"], "table": table["table_sha256"], "graph": GRAPH_TO_BE_PUT
    }  # fmt: skip


def test_a_graph_without_its_digest_is_refused(tmp_path: Path) -> None:
    """The volume's settings as they are here, and any graph: it is not loaded, and the reason has the digest found."""
    file = tmp_path / "scenes" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a graph that nobody has approved")
    lines = (FOLDER / "components" / "volumes" / "settings.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    read = Settings.from_environment(given | {"PARCHGRAD_GRAPHS_DIR": str(tmp_path), "PARCHGRAD_MODELS_DIR": "none"})
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"graph of SHA-256 {GRAPH_TO_BE_PUT}.*found {found}"):
        versions.load(read, "scenes", "1")


# Objects against each other


def test_selectors(deployed: list[Object]) -> None:
    """Everything that chooses pods chooses these."""
    deployment = the(deployed, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert matches(deployment["spec"]["selector"], labels)
    assert the(deployed, "Service")["spec"]["selector"].items() <= labels.items()
    assert matches(the(deployed, "PodDisruptionBudget")["spec"]["selector"], labels)
    assert matches(the(deployed, "NetworkPolicy")["spec"]["podSelector"], labels)
    for spread in pod_spec(deployed)["topologySpreadConstraints"]:
        assert matches(spread["labelSelector"], labels)
    account = the(deployed, "ServiceAccount")
    assert pod_spec(deployed)["serviceAccountName"] == account["metadata"]["name"]
    assert account["automountServiceAccountToken"] is False


def test_service_ports(deployed: list[Object]) -> None:
    ports = {one["name"]: one["containerPort"] for one in container(deployed)["ports"]}
    assert ports == {"http": 3000, "grpc": settings(deployed).grpc_port}
    for port in the(deployed, "Service")["spec"]["ports"]:
        assert port["targetPort"] in ports
        assert port["name"] == port["targetPort"]
    assert {one["appProtocol"] for one in the(deployed, "Service")["spec"]["ports"]} == {"http", "kubernetes.io/h2c"}


def test_disruption_budget_leaves_a_pod_to_drain(deployed: list[Object]) -> None:
    """At the fewest replicas there may be: one may go, and one at least stays."""
    scalers = of_kind(deployed, "HorizontalPodAutoscaler")
    spec = the(deployed, "Deployment")["spec"]
    fewest = scalers[0]["spec"]["minReplicas"] if scalers else spec["replicas"]
    budget = the(deployed, "PodDisruptionBudget")["spec"]
    may_go = budget["maxUnavailable"] if "maxUnavailable" in budget else fewest - budget["minAvailable"]
    assert may_go >= 1
    assert fewest - may_go >= 1
    rolling = spec["strategy"]["rollingUpdate"]
    assert rolling["maxSurge"] + rolling["maxUnavailable"] >= 1
    assert fewest - rolling["maxUnavailable"] >= 1


def admits(policy: Object, namespace: dict[str, str], pod: dict[str, str], port: str, same: bool) -> bool:
    """Whether a NetworkPolicy lets a pod in: a rule of which one peer and one port match."""

    def let_in(peer: Object) -> bool:
        in_namespace = matches(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else same
        return in_namespace and ("podSelector" not in peer or matches(peer["podSelector"], pod))

    rules = policy["spec"]["ingress"]
    return any(any(map(let_in, r["from"])) and any(p["port"] == port for p in r["ports"]) for r in rules)


def test_network_policy(deployed: list[Object]) -> None:
    policy = the(deployed, "NetworkPolicy")
    assert sorted(policy["spec"]["policyTypes"]) == ["Egress", "Ingress"]
    collector = urlsplit(settings(deployed).traces_url)
    names, collectors = [{one["port"] for one in rule["ports"]} for rule in policy["spec"]["egress"]] or [set(), set()]
    assert (names, collectors) == (({53}, {collector.port}) if collector.hostname else (set(), set())), "calls nobody"
    for rule in policy["spec"]["egress"][1:]:
        space = rule["to"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        assert str(collector.hostname).split(".")[1] == space
    here, caller = {"kubernetes.io/metadata.name": "parchgrad"}, {"parchgrad/caller": "true"}
    monitoring, prometheus = {"kubernetes.io/metadata.name": "monitoring"}, {"app.kubernetes.io/name": "prometheus"}
    for port in ("http", "grpc"):
        assert admits(policy, here, caller, port, same=True)
        assert admits(policy, caller, {}, port, same=False)
        assert not admits(policy, here, {}, port, same=True)
        assert not admits(policy, {}, caller, port, same=False), "a label of a pod elsewhere is anybody's to set"
    assert admits(policy, monitoring, prometheus, "http", same=False)
    assert not admits(policy, monitoring, prometheus, "grpc", same=False)
    assert not admits(policy, monitoring, {}, "http", same=False)
    assert not admits(policy, {}, prometheus, "http", same=False)
    for rule in policy["spec"]["ingress"]:
        assert {p["port"] for p in rule["ports"]} <= {one["name"] for one in container(deployed)["ports"]}


def kserve_labels(variant: Variant) -> dict[str, str]:
    """Of KServe's pods and Services: the InferenceService's, and those that the runtime and the predictor add."""
    objects = variant("kserve")
    served, runtime = the(objects, "InferenceService"), the(objects, "ServingRuntime")
    given: dict[str, str] = runtime["spec"].get("labels", {}) | served["metadata"]["labels"]
    return given | served["spec"]["predictor"].get("labels", {})


def test_kserve_pods_are_none_of_ours(deployed: list[Object], variant: Variant) -> None:
    """In one namespace: no selector of a Deployment's variant chooses what KServe runs."""
    labels = kserve_labels(variant)
    assert labels
    selectors = [the(deployed, kind)["spec"]["selector"] for kind in ("Deployment", "PodDisruptionBudget")]
    selectors += [{"matchLabels": the(deployed, "Service")["spec"]["selector"]}]
    selectors += [one["spec"]["podSelector"] for one in of_kind(deployed, "NetworkPolicy")]
    selectors += [one["labelSelector"] for one in pod_spec(deployed)["topologySpreadConstraints"]]
    selectors += [one["spec"]["selector"] for one in of_kind(deployed, "ServiceMonitor")]
    assert len(selectors) >= 6
    for one in selectors:
        assert not matches(one, labels), one


def test_kserve_network_policy(variant: Variant) -> None:
    """Its own policy chooses its pods, not ours, and lets in callers and Prometheus at KServe's port."""
    objects = variant("kserve")
    policy = the(objects, "NetworkPolicy")
    assert matches(policy["spec"]["podSelector"], kserve_labels(variant))
    ours = the(variant("base"), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert not matches(policy["spec"]["podSelector"], ours)
    (port,) = [one["name"] for one in container(objects)["ports"]]
    here, caller = {"kubernetes.io/metadata.name": "parchgrad"}, {"parchgrad/caller": "true"}
    monitoring, prometheus = {"kubernetes.io/metadata.name": "monitoring"}, {"app.kubernetes.io/name": "prometheus"}
    assert admits(policy, here, caller, port, same=True)
    assert admits(policy, caller, {}, port, same=False)
    assert admits(policy, monitoring, prometheus, port, same=False)
    assert not admits(policy, here, {}, port, same=True)
    assert not admits(policy, {}, caller, port, same=False)
    assert policy["spec"]["egress"] == [], "a claim is mounted without a call"
    assert the(objects, "InferenceService")["spec"]["predictor"]["model"]["storageUri"].startswith("pvc://")


@pytest.mark.parametrize("name", ["cpu-production", "gpu-production", "monitoring", "guarded", "everything"])
def test_service_monitor(name: str, variant: Variant) -> None:
    """Chooses the Service and a port of it, sends a key where one is asked for, and is the job that the rules know."""
    deployed = variant(name)
    monitor, service = the(deployed, "ServiceMonitor"), the(deployed, "Service")
    assert matches(monitor["spec"]["selector"], service["metadata"]["labels"])
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == "http"
    assert endpoint["port"] in {one["name"] for one in service["spec"]["ports"]}
    assert endpoint["path"] in {r.path for r in create_app().routes if isinstance(r, Route)}
    assert ("authorization" in endpoint) == settings(deployed).guard_metrics
    if "authorization" in endpoint:
        assert endpoint["authorization"]["type"] == "Bearer"
    (scraped,) = yaml.safe_load((PROJECT_ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert scraped["job_name"] == service["metadata"]["name"], "the operator calls a job by its Service"
    assert scraped["metrics_path"] == endpoint["path"]


# Autoscaling


def series() -> set[str]:
    """Names of the series that /metrics has for the service's own metrics."""
    endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    endings["summary"] = ["_sum", "_count"]
    assert metrics.requests is not None  # declared by importing them
    families = [one for one in REGISTRY.collect() if one.name.startswith("parchgrad_")]
    return {one.name + ending for one in families for ending in endings[one.type]}


def adapter_rules() -> list[Object]:
    rules: list[Object] = yaml.safe_load(ADAPTER.read_text())["rules"]
    return rules


def query(rule: Object, matchers: str = 'namespace="parchgrad",pod=~"a|b"') -> str:
    """What the adapter asks Prometheus when the autoscaler asks for pods."""
    name = re.match(r"[a-z_]+", rule["seriesQuery"])
    assert name is not None
    values = {"Series": name[0], "LabelMatchers": matchers, "GroupBy": "pod"}
    return re.sub(r"<<\.(\w+)>>", lambda found: values[found[1]], rule["metricsQuery"])


def test_adapter_series_exist() -> None:
    rules = adapter_rules()
    assert len(rules) == 3
    for rule in rules:
        named = set(re.findall(r"parchgrad_\w+", rule["seriesQuery"] + query(rule)))
        assert named
        assert named <= series()
        assert re.fullmatch(rule["name"]["matches"], re.match(r"\w+", rule["seriesQuery"])[0])  # type: ignore[index]
        assert rule["resources"]["overrides"] == {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}


def targets(scaler: Object) -> dict[str, float]:
    """What the autoscaler aims at, a pod, by metric."""
    metrics = [one["pods"] for one in scaler["spec"]["metrics"]]
    return {one["metric"]["name"]: quantity(one["target"]["averageValue"]) for one in metrics}


def test_autoscaler(deployed: list[Object]) -> None:
    """Its metrics are the adapter's; the number of pods is left to it; targets are met before maps are shed."""
    if not of_kind(deployed, "HorizontalPodAutoscaler"):
        assert the(deployed, "Deployment")["spec"]["replicas"] == 2
        return
    scaler, deployment = the(deployed, "HorizontalPodAutoscaler")["spec"], the(deployed, "Deployment")
    assert scaler["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"]
    }  # fmt: skip
    assert "replicas" not in deployment["spec"]
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    aims = targets(the(deployed, "HorizontalPodAutoscaler"))
    assert aims.keys() == {rule["name"]["as"] for rule in adapter_rules()}
    read = settings(deployed)
    assert aims["parchgrad_queue_depth_images"] <= read.max_batch
    assert aims["parchgrad_queue_depth_images"] < aims["parchgrad_admitted_images"] < read.shed_bound
    assert 0 < aims["parchgrad_device_busy_ratio"] < 1
    down, up = scaler["behavior"]["scaleDown"], scaler["behavior"]["scaleUp"]
    assert down["stabilizationWindowSeconds"] >= 300 > up["stabilizationWindowSeconds"]


def test_adapter_queries_say_what_they_mean(tmp_path: Path) -> None:
    """Run by Prometheus's own evaluation: pod a is busy with maps and has a queue, pod b, of two workers, hardly."""
    if not shutil.which("promtool"):
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    where = 'namespace="parchgrad",model="m",version="1"'
    given = [
        (f'parchgrad_queue_depth_images{{{where},pod="a",kind="explain"}}', "10x20"),
        (f'parchgrad_queue_depth_images{{{where},pod="a",kind="predict"}}', "2x20"),
        (f'parchgrad_queue_depth_images{{{where},pod="b",kind="predict"}}', "1x20"),
        (f'parchgrad_queue_depth_images{{{where.replace("parchgrad", "other")},pod="a",kind="predict"}}', "500x20"),
        ('parchgrad_admitted_images{namespace="parchgrad",pod="a"}', "20x20"),
        ('parchgrad_admitted_images{namespace="parchgrad",pod="b"}', "0x20"),
        ('parchgrad_workers{namespace="parchgrad",pod="a"}', "1x20"),
        ('parchgrad_workers{namespace="parchgrad",pod="b"}', "2x20"),
        # Seconds of the device in each 15 s: 11.25 of maps and 3 of predictions; 7.5 of predictions in two processes.
        (f'parchgrad_device_seconds_sum{{{where},pod="a",kind="explain"}}', "0+11.25x20"),
        (f'parchgrad_device_seconds_sum{{{where},pod="a",kind="predict"}}', "0+3x20"),
        (f'parchgrad_device_seconds_sum{{{where},pod="b",kind="predict"}}', "0+7.5x20"),
    ]
    expected = {
        "parchgrad_queue_depth_images": {"a": 12, "b": 1},
        "parchgrad_admitted_images": {"a": 20, "b": 0},
        "parchgrad_device_busy_ratio": {"a": 0.75, "b": 0.25},
    }
    checks = []
    for rule in adapter_rules():
        samples = [{"labels": f'{{pod="{pod}"}}', "value": v} for pod, v in expected[rule["name"]["as"]].items()]
        checks.append({"expr": query(rule), "eval_time": "4m", "exp_samples": samples})
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in given],
        "promql_expr_test": checks,
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "15s", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Alerts and KServe


@pytest.mark.parametrize("component", sorted(prometheus_rule.FILES))
def test_the_rule_is_made_of_the_files(component: str, tmp_path: Path) -> None:
    """What Prometheus reads from deploy/prometheus/rules, and nothing else; `promtool` takes it too."""
    written = prometheus_rule.written(component).read_text()
    assert written == prometheus_rule.manifest(component), "python -m deploy.kubernetes.prometheus_rule"
    groups = yaml.safe_load(written)["spec"]
    files = [PROJECT_ROOT / "deploy/prometheus/rules" / name for name in prometheus_rule.FILES[component]]
    assert groups["groups"] == [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    if shutil.which("promtool"):
        (tmp_path / "rules.yml").write_text(yaml.safe_dump(groups))
        done = subprocess.run(
            ["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_other_servers_are_asked_for(objects: list[Object]) -> None:
    """Every file of rules is in one component; without theirs no series has a name that is not ours."""
    files = {p.name for p in (PROJECT_ROOT / "deploy/prometheus/rules").glob("*.yml")}
    assert sorted(name for names in prometheus_rule.FILES.values() for name in names) == sorted(files)
    rules = {one["metadata"]["name"]: one["spec"]["groups"] for one in of_kind(objects, "PrometheusRule")}
    assert ("parchgrad-kserve-names" in rules) == ("parchgrad-triton-names" in rules)
    ours = [groups for name, groups in rules.items() if not name.endswith("-names")]
    recorded = [rule["record"] for groups in ours for one in groups for rule in one["rules"] if "record" in rule]
    assert all(name.startswith("parchgrad:") for name in recorded)


def test_the_pods_memory(tmp_path: Path) -> None:
    """/tmp is the container's memory, which the service's own figure has not: what the kernel counts is watched."""
    if not shutil.which("promtool"):
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    one = yaml.safe_load((FOLDER / "components/monitoring/podrule.yaml").read_text())
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(one["spec"]))
    limit, labels = 3 * 2**30, 'namespace="parchgrad",pod="{}",container="{}"'
    given = [
        ("container_memory_working_set_bytes", "full", "parchgrad", 0.95 * limit),
        ("container_memory_working_set_bytes", "half", "parchgrad", 0.5 * limit),
        ("container_memory_working_set_bytes", "other", "database", limit),
    ]
    series = [(f"{name}{{{labels.format(pod, of)}}}", f"{value:.0f}x20") for name, pod, of, value in given]
    series += [
        (f'kube_pod_container_resource_limits{{resource="{what}",{labels.format(pod, "parchgrad")}}}', f"{value}x20")
        for pod in ("full", "half")
        for what, value in (("memory", limit), ("cpu", 2))
    ]
    fired: Object = {"exp_labels": {"severity": "ticket", "namespace": "parchgrad", "pod": "full"}}
    fired["exp_annotations"] = {
        "summary": "full uses nearly all memory of its container.",
        "description": "95% of the limit, with the uploads in /tmp.",
        "runbook_url": "docs/runbook.md#memory",
    }
    expected: list[tuple[str, list[Object]]] = [("4m", []), ("6m", [fired])]
    alerts = [
        {"eval_time": when, "alertname": "ParchgradPodMemoryNearLimit", "exp_alerts": some} for when, some in expected
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "alert_rule_test": alerts,
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "## Memory" in (PROJECT_ROOT / "docs/runbook.md").read_text()


def test_kserve(variant: Variant) -> None:
    """The predictor asks for this runtime in words that the runtime says of itself; names are the model's."""
    objects = variant("kserve")
    served, runtime = the(objects, "InferenceService"), the(objects, "ServingRuntime")
    predictor = served["spec"]["predictor"]
    model = predictor["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [{k: one[k] for k in ("name", "version")} for one in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"] in formats
    one = container(objects)
    assert one["name"] == "kserve-container", "KServe looks for this name"
    (port,) = one["ports"]
    assert port["name"] in ("http1", "h2c")
    assert (PROJECT_ROOT / "models" / settings(objects).model).is_dir()
    assert str(settings(objects).graphs_dir) == "/mnt/models"
    scheme, _, place = model["storageUri"].partition("://")
    assert (scheme, place.partition("/")[0]) == ("pvc", claim()["metadata"]["name"])
    assert predictor["timeout"] * 1000 > settings(objects).max_timeout_ms
    routes = {r.path for r in create_app().routes if isinstance(r, Route)}
    assert {"/v2/models/{name}/infer", "/v1/models/{name}:predict", "/v1/models/{name}:explain"} <= routes


# The page


def test_the_page_names_what_is_there() -> None:
    """Every path exists, every variant is told of."""
    paths = re.findall(r"-[kf] (deploy/kubernetes/[\w/.-]+)", page())
    assert len(paths) >= 4
    for path in paths:
        assert (PROJECT_ROOT / path).exists(), path
    for name in [*OVERLAYS, *COMPONENTS]:
        assert f"`{name}`" in page(), name


def test_the_page_adds_up() -> None:
    """Its table of the seconds to SIGKILL."""
    section = page().split("## Stopping")[1].split("\n## ")[0]
    *parts, whole = [int(found) for found in re.findall(r"^\| [^|]+ \| (\d+) \|", section, re.M)]
    assert sum(parts) == whole
    assert whole == pod_spec(read(FOLDER / "base"))["terminationGracePeriodSeconds"]


def scalers() -> dict[str, Object]:
    """The autoscaler of each production overlay, of the files: the GPU's patch has all three metrics."""
    files = {"cpu-production": "components/autoscaling", "gpu-production": "overlays/gpu-production"}
    return {
        name: yaml.safe_load((FOLDER / folder / "horizontalpodautoscaler.yaml").read_text())
        for name, folder in files.items()
    }


@pytest.mark.parametrize("name", ["cpu-production", "gpu-production"])
def test_the_scalers_files_are_what_is_rendered(name: str) -> None:
    assert targets(scalers()[name]) == targets(the(render(FOLDER / "overlays" / name), "HorizontalPodAutoscaler"))


def test_the_page_has_the_targets() -> None:
    rows = re.findall(r"^\| `(parchgrad_\w+)` \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|", page(), re.M)
    for column, scaler in enumerate(scalers().values(), start=1):
        assert {row[0]: float(row[column]) for row in rows} == targets(scaler)


def test_targets_are_the_worked_examples() -> None:
    """docs/scaling.md, which prints what benchmarks.replicas does: the averages at the load it aims at."""
    text = (PROJECT_ROOT / "docs" / "scaling.md").read_text()
    told = {
        name.removesuffix(" a pod"): float(value)
        for name, value in re.findall(r"^\| autoscaler: ([\w ]+) \| ([\d.]+) \|$", text, re.M)
    }
    aims = targets(scalers()["cpu-production"])
    aims["device busy"] = aims.pop("parchgrad_device_busy_ratio")
    assert aims == pytest.approx(told)


def test_the_page_tells_the_gpus_driver() -> None:
    """Whose CUDA torch was built with, as far as this machine's torch has one."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pin = re.search(r"^torch==([\d.]+)", (PROJECT_ROOT / "requirements.lock").read_text(), re.M)
    assert pin is not None
    assert f"`torch=={pin[1]}`" in page()
    if torch.version.cuda is not None and torch.__version__.split("+")[0] == pin[1]:
        assert f"`torch.version.cuda` is {torch.version.cuda}" in page()


def test_the_pages_overlay_for_ones_own_model() -> None:
    """Weights, table and graph, as the setting takes them."""
    (text,) = re.findall(r"literals: \[(PARCHGRAD_DIGESTS=[^\]]+)\]", page())
    name, _, pattern = text.partition("=")
    value = re.sub(r"\b(WEIGHTS|TABLE|GRAPH)\b", "a" * 64, pattern).replace("NAME/VERSION", "scenes/1")
    held = Settings.from_environment({name: value}).digests_of("scenes", "1")
    assert held is not None
    assert held.keys() == {"weights", "table", "graph"}
