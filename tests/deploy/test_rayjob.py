"""A cohort on Kubernetes: KubeRay's own schema, and the isolation of the cluster."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from deploy_commands import DEPLOY, ROOT, options

SCHEMA = Path(__file__).resolve().parents[3] / "shared/schemas/ray.io_rayjobs.yaml"


@pytest.fixture
def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())}


@pytest.fixture
def job(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return dict(documents["RayJob"]["spec"])


@pytest.fixture
def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Templates of all pods: the submitter's, the head's, the workers'."""
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [job["submitterPodTemplate"], *(group["template"] for group in groups)]


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    """KubeRay's schema of a RayJob, which refuses fields that it does not know, as an API server does when asked to."""
    if not SCHEMA.exists():
        pytest.skip("../shared/schemas is absent: KubeRay's schema is not here")
    definition = yaml.load(SCHEMA.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    found["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    _close(found)
    return found


def _close(node: dict[str, Any]) -> None:
    if "properties" in node:
        node.setdefault("additionalProperties", bool(node.get("x-kubernetes-preserve-unknown-fields")))
    below = [*node.get("properties", {}).values(), node.get("items"), node.get("additionalProperties")]
    for child in below:
        if isinstance(child, dict):
            _close(child)


def faults(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, fault.path))}: {fault.message}" for fault in found]


def test_kuberay_accepts_it(documents: dict[str, dict[str, Any]], schema: dict[str, Any]) -> None:
    assert faults(documents["RayJob"], schema) == []


def test_kuberay_refuses_a_planted_fault(documents: dict[str, dict[str, Any]], schema: dict[str, Any]) -> None:
    spec = documents["RayJob"]["spec"]
    spec["rayClusterSpec"]["authOptions"] = {"mode": "open"}
    spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["runAsUser"] = 0
    found = faults(documents["RayJob"], schema)
    assert len(found) == 2 and "'open'" in found[0] + found[1] and "runAsUser" in found[0] + found[1]


def test_ray_asks_everyone_for_a_token_that_the_file_does_not_know(job: dict[str, Any]) -> None:
    """The operator makes it, and sets it in all containers: one that is set here would be another."""
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH" not in (DEPLOY / "rayjob.yaml").read_text()


def test_ray_is_the_one_that_is_locked(job: dict[str, Any]) -> None:
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked and job["rayClusterSpec"]["rayVersion"] == locked[1]


def test_the_job_is_a_command_of_ours_on_the_shared_volume(job: dict[str, Any], pods: list[dict[str, Any]]) -> None:
    segment = options(shlex.split(job["entrypoint"]))
    assert segment["address"] == "auto"
    _, *of_the_cluster = pods
    for pod in of_the_cluster:
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        for path in (segment["cohort"], str(segment["output"])):
            assert f"/{Path(path).parts[1]}" in mounts


def test_ray_understands_what_it_is_started_with(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    for group, words in ((cluster["headGroupSpec"], ["--head"]), (cluster["workerGroupSpecs"][0], ["--address=h:1"])):
        options(["ray", "start", *words, *(f"--{name}={value}" for name, value in group["rayStartParams"].items())])


def test_all_workers_are_there_when_the_job_begins(job: dict[str, Any]) -> None:
    """A run counts them once; KubeRay begins when minReplicas are there."""
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_no_pod_has_more_rights_than_it_needs(pods: list[dict[str, Any]]) -> None:
    assert len(pods) == 3
    for pod in pods:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        names = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts  # all that the image writes to
            assert set(mounts.values()) <= names


def test_only_its_own_pods_and_the_operator_may_talk_to_it(
    documents: dict[str, dict[str, Any]], pods: list[dict[str, Any]]
) -> None:
    policy = documents["NetworkPolicy"]["spec"]
    own = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"]
    for pod in pods:
        assert own.items() <= pod["metadata"]["labels"].items()
    itself, operator = policy["ingress"]
    assert itself == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert [peer["podSelector"] for peer in operator["from"]] == [
        {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    ]


def test_many_pods_may_write_to_the_volume(documents: dict[str, dict[str, Any]], pods: list[dict[str, Any]]) -> None:
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    claims = [
        v["persistentVolumeClaim"]["claimName"] for p in pods for v in p["spec"]["volumes"] if v["name"] == "shared"
    ]
    assert claims == [claim["metadata"]["name"]] * 2
