"""The two clusters that Ray starts over SSH: in the cloud, and on existing machines."""

from __future__ import annotations

import copy
import re
import shlex
from typing import Any

import pytest
import yaml
from deploy_commands import DEPLOY, check_shell, options

CLUSTERS = ("ray-cluster.yaml", "ray-onprem.yaml")


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / request.param).read_text()))


def shell(cluster: dict[str, Any]) -> list[str]:
    return [line for name, lines in cluster.items() if name.endswith("_commands") for line in lines]


def starts(cluster: dict[str, Any]) -> dict[str, str]:
    """The command that starts Ray: on the `head`, on a `worker`."""
    found = {}
    for kind in ("head", "worker"):
        (found[kind],) = [line for line in cluster[f"{kind}_start_ray_commands"] if "ray start" in line]
    return found


def validate(cluster: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it starts anything; the file with Ray's defaults filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = validate(cluster)
    types = prepared["available_node_types"].values()
    # All machines from the beginning: a run counts them once.
    assert sum(kind["min_workers"] for kind in types) == prepared["max_workers"] == 2


@pytest.mark.parametrize("fault", [{"head_node_typ": "head"}, {"max_workers": "2"}, {"head_node_type": "heads"}])
def test_ray_refuses_a_planted_fault(fault: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    with pytest.raises((ValidationError, ValueError)):
        validate(yaml.safe_load((DEPLOY / CLUSTERS[0]).read_text()) | fault)


def test_ray_asks_everyone_for_the_token(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"  # where Ray looks for it
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]
    for line in starts(cluster).values():
        before, _, _ = line.partition("ray start")
        assert re.search(r"\bexport\b[^;]*\bRAY_AUTH_MODE=token\b", before)
    assert "RAY_AUTH_TOKEN" not in str(cluster)  # a token in the file would be no secret


def test_ray_understands_its_flags_and_keeps_the_dashboard_on_loopback(cluster: dict[str, Any]) -> None:
    start = {kind: options(shlex.split(line[line.index("ray start") :])) for kind, line in starts(cluster).items()}
    assert start["head"]["head"] and start["head"]["dashboard_host"] == "127.0.0.1"
    assert start["worker"]["address"] == f"$RAY_HEAD_IP:{start['head']['port']}"


def test_its_commands_are_sound_shell(cluster: dict[str, Any]) -> None:
    for line in shell(cluster):  # Ray runs each in a bash of its own
        check_shell(line)


def test_it_installs_the_lock_by_hashes_and_then_the_wheel(cluster: dict[str, Any]) -> None:
    """dist/ holds both: README.md says how, and the test of its commands looks for it."""
    assert cluster["file_mounts"]["~/hover-batch"] == "dist"
    text = "\n".join(cluster["setup_commands"])
    assert "--require-hashes --no-deps -r ~/hover-batch/requirements.lock" in text
    assert "--no-deps --force-reinstall ~/hover-batch/*.whl" in text


def test_the_cloud_lets_nobody_in_but_by_its_own_group() -> None:
    """Without one, Ray makes a group that lets everyone try SSH."""
    cluster = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    groups = [kind["node_config"]["SecurityGroupIds"] for kind in cluster["available_node_types"].values()]
    assert groups == [["GROUP-ID"]] * len(groups)
