"""deploy/README.md: its commands exist with the flags that it gives, and it names all files of its folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from deploy_commands import DEPLOY, blocks, check_shell, commands, options

README = (DEPLOY / "README.md").read_text()
SHELL = "".join(blocks(README))
SECTIONS = re.split(r"^## ", README, flags=re.MULTILINE)
TESTED_BY = {
    "Dockerfile": "test_dockerfile.py",
    "README.md": "test_deploy_readme.py",
    "ray-cluster.yaml": "test_ray_clusters.py",
    "ray-onprem.yaml": "test_ray_clusters.py",
    "rayjob.yaml": "test_rayjob.py",
    "slurm.sh": "test_slurm.py",
}


def test_every_file_has_its_tests_and_its_place_in_the_readme() -> None:
    assert {path.name for path in DEPLOY.iterdir()} == set(TESTED_BY)
    for name, test in TESTED_BY.items():
        assert f'"{name}"' in Path(__file__).with_name(test).read_text()
        assert name == "README.md" or f"deploy/{name}" in SHELL


def test_all_commands_of_ours_and_of_rays_are_found() -> None:
    """So that the next test does not pass for want of commands."""
    found = [" ".join(words[:2]) for words in commands(SHELL)]
    names = ["up", "down", "exec", "dashboard", "job", "get-auth-token", "status", "rsync-up", "rsync-down"]
    ray = {f"ray {name}" for name in names}
    assert set(found) == ray | {"hover-batch segment", "hover-batch status"}
    assert found.count("hover-batch segment") == 4  # Docker, on-premises, cloud, SLURM; Kubernetes' is in its YAML


@pytest.mark.parametrize("words", [*commands(SHELL)], ids=" ".join)
def test_each_command_is_understood(words: list[str]) -> None:
    options(words)


@pytest.mark.parametrize(
    "words", [["hover-batch", "segment", "--adress", "auto"], ["ray", "up", "--mind-workers", "2"]]
)
def test_a_flag_that_is_not_there_is_not_understood(words: list[str]) -> None:
    with pytest.raises(Exception, match="No such option"):
        options(words)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_each_section_is_sound_shell(section: str) -> None:
    check_shell("".join(blocks(section)))


@pytest.mark.parametrize("name", ["ray-cluster.yaml", "ray-onprem.yaml"])
def test_every_blank_of_a_cluster_is_filled_in(name: str) -> None:
    blanks = set(re.findall(r"\b[A-Z]+-(?:IP-\d|IP|ID|USER)\b", (DEPLOY / name).read_text()))
    (line,) = [line for line in SHELL.replace("\\\n", " ").splitlines() if "sed" in line and f"deploy/{name}" in line]
    assert blanks and blanks == set(re.findall(r"s/([A-Z0-9-]+)/", line))


def test_the_wheel_and_the_lock_are_laid_out_before_a_cluster_starts() -> None:
    for section in SECTIONS:
        if " ray up " in section:
            laid = section.index("uv build --wheel -o dist && cp requirements.lock dist/")
            made = section.index("ray get-auth-token --generate")
            assert max(laid, made) < section.index(" ray up ")


def test_links_lead_somewhere() -> None:
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^##? (.*)", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings
        elif "://" not in target:
            path, _, heading = target.partition("#")
            text = (DEPLOY / path).read_text()
            assert not heading or f"## {heading.replace('-', ' ')}" in text.lower()
